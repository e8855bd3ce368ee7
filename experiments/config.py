"""What an experiment is, as frozen, JSON-able models; an unknown key is refused everywhere."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from experiments.training import FitConfig


class Frozen(BaseModel):
    """Base of every configuration: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(Frozen):
    """One row of an ablation: a mixer and its options, mounted at the selected sites.

    `causality` and `normalize` left at None are the mixer's published defaults. `trained=False`
    mounts the mixer as it is: with softmax that is the sanity row, whose error must be zero.
    """

    name: str = Field(pattern=r"^[a-z0-9_\-]+$")
    label: str
    mixer: str
    causality: Literal["causal", "bidirectional", "noncausal"] | None = None
    normalize: bool | None = None
    options: dict[str, Any] = {}
    select: str = "all"
    trained: bool = True


class Distillation(Frozen):
    """The paper's loss, `noise + output/2 + features/2` (2409.02097 §3.4), and how it is minimised."""

    fit: FitConfig
    noise: float = Field(1.0, ge=0)
    output: float = Field(0.5, ge=0)
    features: float = Field(0.5, ge=0)
    train_projections: bool = True
    image_size: int = Field(64, gt=0)
    images: int = Field(1024, gt=0, description="training pictures drawn, encoded once")


class Evaluation(Frozen):
    """What is measured of a trained student, the same for every variant."""

    sizes: tuple[int, ...] = (64, 128, 256)
    images: int = Field(8, gt=0)
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    prompts: tuple[str, ...] = ()
    sample_sizes: tuple[int, ...] = (64, 128, 256)
    sample_steps: int = Field(20, gt=0)
    guidance: float = Field(3.0, ge=1)
    speed_sizes: tuple[int, ...] = (64, 128, 256, 512)
    speed_repeats: int = Field(3, gt=0)
    seed: int = 0


class CellConfig(Frozen):
    """One variant × one seed: everything its numbers depend on."""

    teacher: str
    data: str
    variant: Variant
    seed: int
    distillation: Distillation
    evaluation: Evaluation

    @property
    def id(self) -> str:
        """Readable name and the hash of the whole configuration."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return f"{self.variant.name}-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


class Grid(Frozen):
    """An ablation: variants × seeds over one teacher, data set, objective and evaluation."""

    name: str
    question: str
    teacher: str = "embedded"
    data: str = "emoji"
    variants: tuple[Variant, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    distillation: Distillation
    evaluation: Evaluation = Evaluation()

    def cells(self) -> list[CellConfig]:
        """One configuration per seed and variant, seed by seed, so that a first table comes early."""
        shared = {"teacher": self.teacher, "data": self.data}
        return [
            CellConfig(**shared, variant=v, seed=s, distillation=self.distillation, evaluation=self.evaluation)
            for s in self.seeds
            for v in self.variants
        ]


def override(grid: Grid, settings: list[str]) -> Grid:
    """A grid with `dotted.key=value` settings applied and checked; values are JSON, or plain text.

    Raises:
        ValueError: a setting has no `=`, or names no field; the message lists the fields there are.
    """
    tree = grid.model_dump()
    for setting in settings:
        path, separator, text = setting.partition("=")
        node, keys = tree, path.split(".")
        for depth, key in enumerate(keys):
            if not separator or not isinstance(node, dict) or key not in node:
                known = ", ".join(node) if isinstance(node, dict) else "nothing"
                where = ".".join(keys[:depth]) or "the grid"
                raise ValueError(f"Cannot set {setting!r}: expected key=value; {where} has {known}.")
            if depth < len(keys) - 1:
                node = node[key]
        try:
            node[keys[-1]] = json.loads(text)
        except json.JSONDecodeError:
            node[keys[-1]] = text
    return Grid.model_validate(tree)
