"""The source of plug-ins is in every key: changing one file changes the keys of what it computes, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.ablation.cell import open_cell_context, training_key
from experiments.config import DistillationConfig, EvaluationConfig, FitConfig, Grid, Variant
from experiments.core.plugins import load_plugin
from experiments.core.registries import REGISTRIES
from experiments.distill.recipe import DistillationRecipe, RecipeMixer
from experiments.distill.run import run_recipe
from experiments.evaluate.protocol import protocol_of
from mixers import entries, list_mixers
from mixers.user_source import source_digest
from unet_adapters import MixerAdapter
from unet_adapters.highres.fingerprint import fingerprint

FILES = {
    "mixer.py": """
import helper
from mixers import register_mixer
from mixers.zoo.linear_attention import LinearAttention

@register_mixer("mine")
class Mine(LinearAttention):
    "Mine."
""",
    "helper.py": "import deep.values\n",
    "deep/__init__.py": "",
    "deep/values.py": "scale = 1.0\n",
    "objective.py": """
from dataclasses import dataclass
from experiments.distill.objectives import register_objective
from experiments.distill.objectives.noise import NoiseObjective

@register_objective("my_noise")
@dataclass(frozen=True)
class MyNoise(NoiseObjective):
    "Mine."
""",
    "metric.py": """
from experiments.metrics import register_metric
from experiments.metrics.timesteps import TimestepErrors

@register_metric("my_metric")
class MyMetric(TimestepErrors):
    "Mine."
""",
    "unrelated.py": "x = 1\n",
}
PLUGINS = ("mixer.py", "objective.py", "metric.py")
AFFECTED = {
    "mixer.py": {"training", "stages"},
    "helper.py": {"training", "stages"},
    "deep/values.py": {"training", "stages"},
    "objective.py": {"training"},
    "metric.py": {"protocol"},
    "unrelated.py": set(),
}
"""Which keys a change of each file changes."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with plug-ins that are loaded, and registered for one test."""
    list_mixers()
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))
    for registry in REGISTRIES:
        registry.discover()
        for registered in ("_items", "_origins"):
            monkeypatch.setattr(registry, registered, dict(getattr(registry, registered)))
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    load(tmp_path)
    yield tmp_path


def load(folder: Path) -> None:
    for name in PLUGINS:
        load_plugin(folder / name)


@pytest.fixture
def plugged(folder: Path, grid: Grid) -> Grid:
    """A grid of one cell whose mixer, objective and metric are plug-ins."""
    return grid.model_copy(
        update={
            "variants": (Variant(name="mine", label="mine", mixer="mine"),),
            "distillation": DistillationConfig(
                objectives={"my_noise": 1.0}, fit=FitConfig(steps=1, batch_size=2, learning_rate=1e-3), images=2
            ),
            "evaluation": EvaluationConfig.model_validate(
                {**grid.evaluation.model_dump(), "metrics": {"my_metric": {}}}
            ),
        }
    )


def keys(grid: Grid) -> dict[str, str]:
    context = open_cell_context(grid)
    with MixerAdapter.build(context.pipe, "mine").mounted():
        stages = fingerprint(context.pipe.unet)
    return {
        "training": training_key(grid.cells()[0], context),
        "protocol": protocol_of(context, grid.evaluation, grid.data).hash,
        "stages": stages,
    }


@pytest.mark.parametrize("changed", AFFECTED)
def test_a_changed_file_changes_the_keys_of_what_it_computes(changed: str, folder: Path, plugged: Grid) -> None:
    before = keys(plugged)
    load(folder)
    assert keys(plugged) == before, "loading the same files again changes nothing"
    with (folder / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    load(folder)
    after = keys(plugged)
    assert {name for name in before if before[name] != after[name]} == AFFECTED[changed]


def test_a_distillation_does_not_continue_with_another_source(folder: Path, plugged: Grid, tmp_path: Path) -> None:
    recipe = DistillationRecipe(
        name="mine",
        about="A plug-in.",
        teacher=plugged.teacher,
        mixer=RecipeMixer(name="mine"),
        distillation=plugged.distillation,
    )
    run_recipe(recipe, tmp_path / "run", lambda *_: None)
    with (folder / "objective.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    load(folder)
    with pytest.raises(ValueError, match="holds a run of another plugin source"):
        run_recipe(recipe, tmp_path / "run", lambda *_: None)


def test_classes_of_libraries_and_of_shells_count_by_name() -> None:
    shell_class = type("Made", (), {"__module__": "__main__"})
    assert source_digest(shell_class) == source_digest(shell_class) != source_digest(Grid)
    assert source_digest(Grid) == source_digest(Grid) != source_digest(Variant)


def test_imports_of_a_package_are_followed_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative imports and those by the package's name; other installed packages are not read."""
    package = tmp_path / "site-packages" / "power_package"
    files = {
        "__init__.py": "",
        "mixer.py": "from . import near\nimport power_package.far\nimport other_package\nclass Power: ...\n",
        "near.py": "from .inner import x\n",
        "far.py": "",
        "inner/__init__.py": "x = 1\n",
        "../other_package.py": "",
    }
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(package.parent)
    from power_package.mixer import Power  # type: ignore[import-not-found]

    for name in files:
        before = source_digest(Power)
        (package / name).write_text(files[name] + "# changed\n", encoding="utf-8")
        assert (source_digest(Power) != before) == (name not in ("__init__.py", "../other_package.py")), name
