"""Every how-to page is executed, here or in the test file that is named here."""

from __future__ import annotations

import inspect
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from experiments.ablation.grid import list_grids, load_grid
from experiments.cli import app
from experiments.config import EvaluationConfig, apply_overrides
from experiments.distill.objectives import list_objectives
from experiments.distill.recipe import list_recipes, load_recipe
from experiments.teacher.load import load_teacher
from mixers import entries, list_mixers
from mixers.testing import MIXER_CHECKS, OPERATOR_CHECKS
from tests.howto.pages import HOWTO, ROOT, SMALL_LOCAL_STAGE, SMALL_RUN, blocks, run_python_blocks
from tests.unet_adapters.linfusion_files import publish
from unet_adapters import MixerAdapter, find_sites

ABLATE = HOWTO / "run_an_ablation.md"
CHECK = HOWTO / "check_a_mixer.md"
DISTILL = HOWTO / "distill.md"
EVALUATE = HOWTO / "evaluate.md"
LARGE = HOWTO / "large_images.md"
PYTHON_PAGES = ("evaluate", "large_images")
"""Pages whose Python blocks run in order, in any folder."""

EXECUTED_BY = {
    "add_a_backend": "tests/howto/test_extensions.py",
    "add_a_host": "tests/howto/test_extensions.py",
    "add_a_metric": "tests/howto/test_extensions.py",
    "add_a_mixer": "tests/howto/test_add_a_mixer.py",
    "add_an_objective": "tests/howto/test_extensions.py",
    "check_a_mixer": "tests/howto/test_pages.py",
    "choose_a_backend": "tests/mixers/test_backends.py",
    "data": "tests/howto/test_pages.py",
    "distill": "tests/howto/test_pages.py",
    "evaluate": "tests/howto/test_pages.py",
    "hybrids": "tests/experiments/test_crossover.py",
    "large_images": "tests/howto/test_pages.py",
    "linfusion_weights": "tests/howto/test_pages.py",
    "mount_a_mixer": "tests/experiments/test_crossover.py",
    "run_an_ablation": "tests/howto/test_pages.py",
    "works_with": "tests/unet_adapters/test_order.py",
}
"""Which test file executes a page."""

WITHOUT_PYTHON = {"read_a_report"}


def test_every_page_is_executed() -> None:
    pages = {page.stem for page in HOWTO.glob("*.md")}
    unexecuted = {page for page in pages - EXECUTED_BY.keys() if blocks(HOWTO / f"{page}.md", "python")}
    assert not unexecuted, "a page with Python blocks needs a test that executes them"
    assert pages - EXECUTED_BY.keys() == WITHOUT_PYTHON
    for page, file in EXECUTED_BY.items():
        assert f"{page}" in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not name {page}"


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_a_page_of_python_runs(page: str, folder: Path) -> None:
    run_python_blocks(HOWTO / f"{page}.md")


@pytest.mark.slow  # every check of a mixer and of an operator
def test_the_page_of_the_conformance_suite_runs() -> None:
    run_python_blocks(CHECK)


def test_the_page_of_the_conformance_suite_lists_every_check() -> None:
    functions = [*(check.run for check in MIXER_CHECKS), *OPERATOR_CHECKS]
    summaries = [" ".join((inspect.getdoc(f) or "").split("\n\n")[0].split()) for f in functions]
    expected = [f"- `{f.__name__}`: {summary}" for f, summary in zip(functions, summaries, strict=True)]
    assert re.findall(r"^- `check_.*", CHECK.read_text(encoding="utf-8"), re.M) == expected


def test_the_page_of_data_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    run_python_blocks(HOWTO / "data.md")


@pytest.mark.slow  # the embedded teacher
def test_the_page_of_published_weights_runs(folder: Path) -> None:
    """With a folder in the published format in place of the Hub."""
    page = HOWTO / "linfusion_weights.md"
    pipe = load_teacher()
    weights = publish(folder / "published", pipe.unet, [None] * len(find_sites(pipe.unet)))
    local = folder / page.name
    text = page.read_text(encoding="utf-8").replace('"Yuanshi/LinFusion-1-5"', repr(str(weights)))
    local.write_text(text, encoding="utf-8")
    names = run_python_blocks(local, {"MixerAdapter": MixerAdapter, "pipe": pipe})
    assert (folder / "my-linfusion" / "config.json").is_file()
    assert names["adapter"].is_mounted  # type: ignore[attr-defined]


@pytest.mark.slow  # a short distillation
def test_the_page_of_distillation_runs(folder: Path, tiny_teacher: Path) -> None:
    recipe = folder / "my_recipe.yaml"
    recipe.write_text(*blocks(DISTILL, "yaml"), encoding="utf-8")
    tiny = ("before.0.fit.steps=1", "before.0.fit.batch_size=2", "fit.steps=2", "fit.batch_size=2", "images=4")
    changes = [f"teacher={tiny_teacher}", *(f"distillation.{setting}" for setting in tiny)]
    settings = [word for change in changes for word in ("--set", change)]
    result = CliRunner().invoke(app, ["distill", str(recipe), "--out", str(folder / "mine"), *settings])
    assert result.exit_code == 0, result.output
    assert (folder / "mine" / "card.md").is_file() and (folder / "mine" / "adapter").is_dir()


def test_the_page_of_distillation_names_every_objective_and_recipe() -> None:
    text = DISTILL.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.M)) == list_objectives()
    assert all(f"`{name}`" in text for name in list_recipes())
    lines = [shlex.split(line, comments=True) for line in blocks(DISTILL, "bash")[0].splitlines()]
    for words in lines:  # every option of the page exists
        name, *settings = words[words.index("distill") + 1 :]
        if not name.endswith(".yaml"):
            load_recipe(name, [after for word, after in pairwise(settings) if word == "--set"])


def test_the_commands_of_the_page_of_large_images_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for block in blocks(LARGE, "bash"):
        for line in block.replace("\\\n", "").splitlines():
            _, name, *words = shlex.split(line, comments=True)
            assert commands[name].make_context(name, words).params["size"] in line


def test_the_settings_of_the_page_of_evaluation_exist() -> None:
    """Every setting of the page's commands, checked without running them."""
    commands = [
        shlex.split(line) for block in blocks(EVALUATE, "bash") for line in block.replace("\\\n", "").splitlines()
    ]
    settings = [[word for before, word in pairwise(c) if before == "--set"] for c in commands]
    configs = [apply_overrides(EvaluationConfig(), overrides) for overrides in settings]
    assert (1.5, 5.0, 7.5) in [config.guidances for config in configs]
    assert 30000 in [config.generated.images for config in configs]


def test_the_table_of_grids_is_true() -> None:
    documented = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", ABLATE.read_text(encoding="utf-8"), re.M)
    trained = {name: sum(variant.trained for variant in load_grid(name).variants) for name in list_grids()}
    assert {name: int(count) for name, count in documented} == {name: trained[name] for name, _ in documented}
    assert trained.keys() - dict(documented).keys() == {"compatibility", "demo"}


@pytest.mark.slow  # two runs of a few steps
def test_the_page_of_ablations_runs(folder: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_mixers()
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))
    files = {"my_mixer.py": blocks(HOWTO / "add_a_mixer.md", "python")[0]}
    files |= dict(zip(("my_grid.py", "against.py"), blocks(ABLATE, "python"), strict=True))
    for name, code in files.items():
        Path(name).write_text(code, encoding="utf-8")
    lines = [line for line in "".join(blocks(ABLATE, "bash")).splitlines() if ".py" in line]
    assert len(lines) == 2
    rows = ("linear attention, non-causal, normalized", "power attention, non-causal, normalized")
    for line, row, more in zip(lines, rows, ((), SMALL_LOCAL_STAGE), strict=True):
        command = shlex.split(line.replace(" --budget 5m", ""))[1:]  # which would take five minutes
        changes = (f"teacher={tiny_teacher}", *SMALL_RUN, *more)
        shorter = [part for change in changes for part in ("--set", change)]
        result = CliRunner().invoke(app, [*command, *shorter])
        assert result.exit_code == 0, result.output
        assert row in Path(command[-1], "report", "index.html").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["ablate", "my_grid.py", "--budget", "5 minutes"]).exit_code == 2
