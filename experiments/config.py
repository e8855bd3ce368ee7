"""What an experiment is, as frozen, JSON-able models; an unknown key is refused everywhere."""

from __future__ import annotations

import hashlib
import json
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from experiments.training import FitConfig
from mixers.suggest import hint

Model = TypeVar("Model", bound=BaseModel)

Pixels = Annotated[int, Field(ge=8, multiple_of=4)]
"""A side of an image; autoencoders make a latent place of 4 or 8 pixels."""


class Frozen(BaseModel):
    """Base of every configuration: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixerChoice(Frozen):
    """What is mounted where; `causality` and `normalize` left at None are the mixer's published defaults."""

    causality: Literal["causal", "bidirectional", "noncausal"] | None = None
    normalize: bool | None = None
    options: dict[str, Any] = {}
    select: str | tuple[str, ...] = Field("all", description="the sites, as `find_sites` takes them")
    min_tokens: int = Field(0, ge=0, description="sites with fewer tokens stay softmax")


class Term(Frozen):
    """An objective's weight in the loss: 0 before step `start`, then rising linearly over `ramp` steps."""

    weight: float = Field(1.0, ge=0)
    start: int = Field(0, ge=0)
    ramp: int = Field(0, ge=0)
    options: dict[str, Any] = Field({}, description="of the objective")

    def at(self, step: int) -> float:
        """The weight at `step`; full from step start + ramp − 1 on."""
        return self.weight * min(1.0, max(0, step - self.start + 1) / max(1, self.ramp))


class Stage(Frozen):
    """A training of the student: what is minimized, and how. In files, `noise: 0.5` is `noise: {weight: 0.5}`."""

    name: str = Field(pattern=r"^[a-z0-9_\-]+$")
    objectives: dict[str, Term]
    fit: FitConfig
    sizes: tuple[Pixels, ...] = Field((), description="step by step in turn; (): image_size")

    @field_validator("objectives", mode="before")
    @classmethod
    def _short_form(cls, terms: Any) -> Any:
        if not isinstance(terms, dict):
            return terms
        return {n: {"weight": t} if isinstance(t, int | float) else t for n, t in terms.items()}

    @field_validator("objectives")
    @classmethod
    def _known(cls, terms: dict[str, Term]) -> dict[str, Term]:
        from experiments.distill.objectives import create_objective  # which imports this module

        for name, term in terms.items():
            create_objective(name, **term.options)
        if not any(term.at(0) > 0 for term in terms.values()):
            raise ValueError("no objective has a weight at step 0, so that there would be nothing to minimize")
        return terms


class Distillation(Stage):
    """How a student is made: `before`, stage by stage, and then the stage that this is, which is often the only one.

    The default objectives are the published loss, `noise + output/2 + features/2` (2409.02097 §3.4).
    """

    name: str = Field("distill", pattern=r"^[a-z0-9_\-]+$")
    objectives: dict[str, Term] = {"noise": Term(), "output": Term(weight=0.5), "features": Term(weight=0.5)}
    before: tuple[Stage, ...] = Field((), description="stages that come first, such as matrix and local")
    train: Literal["new", "new+projections"] = Field(
        "new+projections", description="what is trained: what the mixers add, and the q, k, v and output projections"
    )
    start: Literal["host", "random"] = Field("host", description="of trained projections: the teacher's, or random")
    image_size: Pixels = 64
    images: int = Field(1024, gt=0, description="training pictures drawn, encoded once")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of captions that are replaced by the empty one")
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")

    @model_validator(mode="after")
    def _consistent(self) -> Distillation:
        if self.start == "random" and self.train == "new":
            raise ValueError("start='random' is of trained projections, and train='new' trains none: drop one of them")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need names of their own, got {', '.join(names)}")
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        return (*self.before, self)

    def sizes_of(self, stage: Stage) -> tuple[int, ...]:
        """The sizes in pixels that a stage trains at, in turn."""
        return stage.sizes or (self.image_size,)

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """`image_size`, and every other size that a stage trains at."""
        return tuple(dict.fromkeys([self.image_size, *(size for s in self.stages for size in self.sizes_of(s))]))


class Variant(MixerChoice):
    """One row of an ablation: a mixer and its options, mounted at the selected sites.

    `trained=False` mounts the mixer as it is: with softmax that is the sanity row, whose error must be zero.
    `distillation` is this row's own, where the rows differ in how they are made; None is the grid's.
    """

    name: str = Field(pattern=r"^[a-z0-9_\-]+$")
    label: str
    mixer: str
    trained: bool = True
    distillation: Distillation | None = None


class Metrics(Frozen):
    """Pictures drawn by student and teacher for Fréchet and kernel distance and text-image score."""

    images: int = Field(32, ge=0, description="captions that are drawn; 0: no metric is measured")
    sizes: tuple[Pixels, ...] = Field((64,), description="that are drawn")
    resize: int | None = Field(None, gt=0, description="of all pictures, true ones too, before a network; None: not")
    features: tuple[str, ...] = Field(("embedded",), description="networks: embedded, clip:WHERE, inception[:FILE]")
    data: str | None = Field(None, description="true pictures and captions, or coco:FOLDER; None: the training split")
    batch_size: int = Field(16, gt=0)


class Evaluation(Frozen):
    """What is measured of a trained student, the same for every variant."""

    sizes: tuple[Pixels, ...] = (64, 128, 256, 512)
    shapes: tuple[tuple[Pixels, Pixels], ...] = Field(((64, 128), (128, 64)), description="further (height, width)")
    site_sizes: tuple[Pixels, ...] = Field((64, 256), description="of sizes: where each site is compared, too")
    images: int = Field(8, gt=0, description="held-out pictures; 1 beyond four times the smallest size")
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1000)], ...] = Field((100, 300, 500, 700, 900), min_length=1)
    prompts: tuple[str, ...] = ()
    sample_sizes: tuple[Pixels, ...] = (64, 128, 256)
    sample_steps: int = Field(20, gt=0)
    guidance: float = Field(3.0, ge=1)
    guidances: tuple[Annotated[float, Field(ge=1)], ...] = Field((), description="a sweep's others, of all pictures")
    metrics: Metrics = Metrics()
    speed_sizes: tuple[Pixels, ...] = (64, 128, 256, 512)
    speed_repeats: int = Field(3, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _something(self) -> Evaluation:
        if not self.extents:
            raise ValueError("sizes and shapes are empty, so that nothing would be compared with the teacher")
        return self

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of everything that is compared with the teacher."""
        return tuple(dict.fromkeys([*((size, size) for size in self.sizes), *self.shapes]))

    @property
    def all_guidances(self) -> tuple[float, ...]:
        """`guidance`, and the others of a sweep."""
        return tuple(dict.fromkeys([self.guidance, *self.guidances]))

    def images_at(self, height: int, width: int) -> int:
        """How many held-out pictures are compared at a size."""
        return self.images if max(height, width) <= 4 * min(map(min, self.extents)) else 1


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
        return f"{self.variant.name}-s{self.seed}-{_hash(self.model_dump(mode='json'))}"

    @property
    def training(self) -> str:
        """The hash of what the trained weights depend on: all but the evaluation, the name and the label."""
        return _hash(self.model_dump(mode="json", exclude={"evaluation": True, "variant": {"name", "label"}}))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


class Claim(Frozen):
    """A hypothesis that the report holds against the numbers: what a factor's value does to the error.

    Factors are "normalization" (value "not normalized"), "causality" ("causal", "bidirectional"), and "mixer" (a name).
    Each is compared with its reference: normalized, non-causal, and the mixer of the grid's reference row.
    """

    told: str
    factor: Literal["normalization", "causality", "mixer"]
    value: str
    worse: bool = Field(description="whether the claim is that the error is higher; else that it is lower")
    beyond: bool = Field(False, description="whether it speaks of sizes that were not trained at, alone")


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
    reference: str | None = Field(None, description="the row that others are compared with; None: the first trained")
    claims: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _known_names(self) -> Grid:
        names = [variant.name for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants need names of their own: {', '.join(twice)} is there more than once")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"the reference {self.reference!r} is no variant: expected one of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _one_set_of_pictures(self) -> Grid:
        shared = (self.distillation.all_sizes, self.distillation.images)
        for variant in self.variants:
            own = variant.distillation
            if own is not None and (own.all_sizes, own.images) != shared:
                raise ValueError(
                    f"the variant {variant.name!r} trains on other pictures than the grid (sizes and images "
                    f"{(own.all_sizes, own.images)}, the grid {shared}): rows are compared on the same ones"
                )
        return self

    def cells(self) -> list[CellConfig]:
        """One configuration per seed and variant, seed by seed, so that a first table comes early."""
        shared = {"teacher": self.teacher, "data": self.data}
        return [
            CellConfig(
                **shared,
                variant=v,
                seed=s,
                distillation=v.distillation or self.distillation,
                evaluation=self.evaluation,
            )
            for s in self.seeds
            for v in self.variants
        ]


def override(model: Model, settings: list[str]) -> Model:
    """A model with `dotted.key=value` settings applied and checked; values are JSON, or plain text.

    A number as a key is a place in a list, from 0: `distillation.before.0.fit.steps=50`.

    Raises:
        ValueError: a setting has no `=`, or names no field; the message lists the fields there are.
    """
    tree = model.model_dump(mode="json")
    for setting in settings:
        path, separator, text = setting.partition("=")
        node, keys = tree, path.split(".")
        for depth, key in enumerate(keys):
            known = _keys(node)
            if not separator or key not in known:
                where = ".".join(keys[:depth]) or f"the {type(model).__name__.lower()}"
                raise ValueError(
                    f"Cannot set {setting!r}: expected key=value; {where} has {', '.join(known) or 'nothing'}."
                    f"{hint(key, known)}"
                )
            if depth < len(keys) - 1:
                node = node[known[key]]
        node[known[key]] = _value(text)
    return validated(type(model), tree)


def override_grid(grid: Grid, settings: list[str]) -> Grid:
    """`override` for a grid: what is set of `distillation` is set of every row's own plan, where it has such a field.

    Raises:
        ValueError: as `override`.
    """
    plans = [(n, v.distillation.model_dump(mode="json")) for n, v in enumerate(grid.variants) if v.distillation]
    shared = [setting for setting in settings if setting.startswith("distillation.")]
    own = [
        f"variants.{n}.{s}" for n, plan in plans for s in shared if _reaches(plan, s.partition("=")[0].split(".")[1:])
    ]
    return override(grid, [*settings, *own])


def _reaches(node: Any, keys: list[str]) -> bool:
    for key in keys:
        known = _keys(node)
        if key not in known:
            return False
        node = node[known[key]]
    return True


SIZES = frozenset({"image_size", "sizes", "shapes", "site_sizes", "sample_sizes", "speed_sizes"})


def resized(grid: Grid, size: int) -> Grid:
    """The grid with `size` px as its training pictures' side, and every other size in proportion."""
    factor = size / grid.distillation.image_size

    def times(value: Any) -> Any:
        return [times(item) for item in value] if isinstance(value, list) else round(value * factor)

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        kept = {"options": node["options"]} if "options" in node else {}
        return {key: times(value) if key in SIZES else walk(value) for key, value in node.items()} | kept

    return validated(Grid, walk(grid.model_dump(mode="json")))


def validated(kind: type[Model], tree: Any) -> Model:
    """A model of plain values.

    Raises:
        ValueError: it is not valid; one sentence that says where, and names the nearest key for an unknown one.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()  # an unknown key before the one that is missing for its sake
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        place = ".".join(str(key) for key in first["loc"]) or "it"
        if first["type"] == "extra_forbidden":
            known = _fields(kind, first["loc"][:-1])
            raise ValueError(
                f"{place} is unknown: expected one of {', '.join(known)}.{hint(str(first['loc'][-1]), known)}"
            ) from None
        raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def _keys(node: Any) -> dict[str, Any]:
    """What can be asked of a tree's node: {as it is written: as it is indexed}."""
    if isinstance(node, dict):
        return {str(key): key for key in node}
    return {str(place): place for place in range(len(node))} if isinstance(node, list) else {}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _fields(kind: Any, path: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at a path through models, dictionaries and tuples of models."""
    for key in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(key)].annotation
        else:
            kind = next(a for a in reversed(get_args(kind)) if a not in (Ellipsis, NoneType))
    return list(kind.model_fields)
