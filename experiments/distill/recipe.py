"""A distillation from end to end as one YAML file: teacher, data, mixer, stages, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml  # type: ignore[import-untyped]
from pydantic import Field

from experiments.config import Distillation, Frozen, MixerChoice, override, validated
from mixers import registry
from mixers.suggest import hint

_READY_MADE = Path(__file__).parent.parent / "recipes"


class Mixer(MixerChoice):
    """The mixer that is distilled into the teacher."""

    name: str


class Samples(Frozen):
    """Pictures of teacher and student from the same prompts and starting noise."""

    prompts: tuple[str, ...] = ()
    every: int = Field(0, ge=0, description="steps of a stage; 0: at the end alone")
    steps: int = Field(20, gt=0)
    guidance: float = Field(7.5, ge=1)
    seed: int = 0

    def due(self, step: int) -> bool:
        """Whether pictures are drawn after this many steps of a stage."""
        return bool(self.prompts and self.every) and step % self.every == 0


class Recipe(Frozen):
    """Everything that a distillation's result depends on.

    Attributes:
        name: of the recipe.
        about: one sentence.
        teacher: "embedded", a folder in diffusers format, or a Hub id.
        dtype: of the teacher's frozen networks; the student trains in float32.
        data: "emoji", a folder of captioned images, or what else `open_dataset` reads.
        cache: folder of encoded pictures, made where there is none and gone on with after a stop; None encodes them in
            memory, which goes for a few thousand small ones.
        seed: of everything random; stages draw apart.
    """

    name: str = Field(pattern=r"^[a-z0-9_\-]+$")
    about: str
    teacher: str = "embedded"
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: str = "emoji"
    cache: str | None = None
    mixer: Mixer
    distillation: Distillation
    samples: Samples = Samples()
    seed: int = 0


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in _READY_MADE.glob("*.yaml"))


def load_recipe(source: str, settings: list[str] | None = None) -> Recipe:
    """A ready-made recipe by name ("embedded"), or a YAML file of your own; with `dotted.key=value` settings applied.

    Raises:
        ValueError: no such recipe or file, no YAML, an unknown key, mixer or objective (the nearest one is named), or a
            value that does not fit; one sentence.
    """
    path = Path(source) if source.endswith((".yaml", ".yml")) else _READY_MADE / f"{source}.yaml"
    if not path.is_file():
        known = list_recipes()
        raise ValueError(
            f"No recipe {source!r}: expected one of {', '.join(known)}, or the path of a .yaml file."
            f"{hint(source, known)}"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"Cannot read the recipe {path}: expected keys and values, got {type(tree).__name__}.")
    try:
        recipe = override(validated(Recipe, tree), settings or [])
        registry.get_mixer_entry(recipe.mixer.name)  # an unknown name fails here, before any work
    except ValueError as error:
        raise ValueError(f"Cannot use the recipe {path.name}: {error}") from None
    return recipe
