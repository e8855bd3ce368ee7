"""A distillation from end to end as one YAML file: teacher, data, mixer, stages, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml  # type: ignore[import-untyped]
from pydantic import Field

from experiments.config import DistillationConfig, FrozenModel, MixerSpec, apply_overrides, validate_config
from experiments.config.base import CONFIG_NAME
from mixers import registry
from mixers.suggest import unknown_name

_READY_MADE = Path(__file__).parent.parent / "recipes"


class RecipeMixer(MixerSpec):
    """The mixer that is distilled into the teacher."""

    name: str


class SampleConfig(FrozenModel):
    """Images of teacher and student from the same prompts and starting noise."""

    prompts: tuple[str, ...] = ()
    every: int = Field(0, ge=0, description="steps of a stage between two sets of images; 0: only at the end")
    steps: int = Field(20, gt=0, description="of the sampler")
    guidance: float = Field(7.5, ge=1)
    seed: int = 0

    def due(self, step: int) -> bool:
        """Return whether images are sampled after this many steps of a stage."""
        return bool(self.prompts and self.every) and step % self.every == 0


class DistillationRecipe(FrozenModel):
    """Everything that a distillation's result depends on.

    Attributes:
        name: of the recipe.
        about: one sentence.
        teacher: "embedded", a folder in diffusers format, or a Hub id.
        teacher_variant: the teacher's weight files to read, such as "fp16"; None: those without a variant.
        dtype: of the teacher's frozen networks; the student trains in float32.
        data: "scenes", a folder of captioned images, or whatever else `open_dataset` reads.
        cache: folder of encoded images, created if missing and completed after a stop; None encodes them in memory,
            which is fine for a few thousand small ones.
        mixer: which one, and where.
        distillation: the stages.
        samples: images for the card.
        seed: of everything random; every stage gets a seed of its own from it.
    """

    name: str = Field(pattern=CONFIG_NAME)
    about: str
    teacher: str = "embedded"
    teacher_variant: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: str = "scenes"
    cache: str | None = None
    mixer: RecipeMixer
    distillation: DistillationConfig
    samples: SampleConfig = SampleConfig()
    seed: int = 0


def list_recipes() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in _READY_MADE.glob("*.yaml"))


def load_recipe(source: str, settings: list[str] | None = None) -> DistillationRecipe:
    """Load a recipe and apply `dotted.key=value` settings to it.

    Args:
        source: the name of a ready-made recipe, such as "embedded", or the path of a YAML file.
        settings: as `apply_overrides` takes them.

    Raises:
        ValueError: no such recipe or file, invalid YAML, an unknown key, mixer or objective (the nearest one is named),
            or an invalid value; one sentence.
    """
    path = Path(source) if source.endswith((".yaml", ".yml")) else _READY_MADE / f"{source}.yaml"
    if not path.is_file():
        raise ValueError(unknown_name("recipe", source, list_recipes(), "the path of a .yaml file"))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"Cannot read the recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"Cannot read the recipe {path}: expected keys and values, got {type(tree).__name__}.")
    try:
        recipe = apply_overrides(validate_config(DistillationRecipe, tree), settings or [])
        registry.get_mixer_entry(recipe.mixer.name)  # an unknown name fails here, before any work
    except ValueError as error:
        raise ValueError(f"Cannot use the recipe {path.name}: {error}") from None
    return recipe
