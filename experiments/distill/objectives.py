"""What a student can be asked to match, by name. An objective says what it needs, so that a step runs no more.

    noise      the truth                                              student's forward
    output     the teacher's prediction                               both forwards
    features   what the teacher's sites put out                       both forwards
    local      the same, each site on the teacher's own input         teacher's forward, then site by site
    matrix     rows of the teacher's attention matrices, likewise     teacher's forward, then site by site

All are means over the samples of a batch of numbers of one sample each, so that a batch in parts (several processes,
micro-batches) has the loss and the gradients of the whole. Errors are float32 at least, whatever the networks are.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixers.mixer import upcast
from mixers.structure import mixing_matrix
from mixers.suggest import hint
from unet_adapters import MixerAdapter
from unet_adapters.capture import SiteCall, replay

Need = Literal["teacher", "student", "sites", "rows"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward:
    """A forward of the UNet: its prediction (b, c, h, w) and, where an objective needs sites, their calls by name."""

    prediction: Tensor
    sites: dict[str, SiteCall]


class NotRun:
    """Stands for a forward that no active objective needs; looking at it is a mistake of the objective."""

    def __init__(self, need: Need) -> None:
        self.need = need

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"an objective reads {self.need}.{name} without {self.need!r} among its `needs`")


@dataclass(frozen=True)
class Seen:
    """A step, as objectives see it. The student is mounted.

    Attributes:
        adapter: of the student, in the model `adapter.model`.
        target: what a perfect model predicts.
        picked: (b, r) in [0, 1): which rows of the matrices are compared, as shares of the tokens.
        teacher, student: their forwards.
        rows: (b, r, h, l) of the teacher's attention matrices, by site.
    """

    adapter: MixerAdapter
    target: Tensor
    picked: Tensor
    teacher: Any
    student: Any
    rows: dict[str, Tensor] = field(default_factory=dict)

    def mean_over_sites(self, error: Callable[[str, SiteCall], Tensor]) -> Tensor:
        """The mean of `error(name, the teacher's call)` over the sites where a mixer runs at this number of tokens.

        The sites share no parameters and no graph: each one's gradients are its own. Under gradient checkpointing the
        graph of one site at a time is in memory, for one more forward of each.

        Raises:
            ValueError: there is no such site.
        """
        calls = {n: c for n, c in self.teacher.sites.items() if c.input.shape[1] >= self.adapter.min_tokens}
        if not calls:
            most = max(call.input.shape[1] for call in self.teacher.sites.values())
            raise ValueError(
                f"no mixer runs at this size: the sites see {most} tokens at most, and mixers run from "
                f"min_tokens={self.adapter.min_tokens} on. Train at larger pictures, or lower min_tokens."
            )
        run = partial(checkpoint, error, use_reentrant=False) if self.adapter.model.is_gradient_checkpointing else error
        return torch.stack([run(name, call) for name, call in calls.items()]).mean()


class Objective:
    """One term of a loss: what a step has seen -> a scalar. Subclasses are frozen dataclasses; fields are options.

    Attributes:
        needs: `teacher`, `student`: their forwards; `sites`: in these, the calls of the sites; `rows`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, seen: Seen) -> Tensor:
        """The value of the term, with a graph to the student's parameters.

        Raises:
            ValueError: there is nothing to compare.
        """
        raise NotImplementedError


_OBJECTIVES: dict[str, type[Objective]] = {}
_Kind = TypeVar("_Kind", bound=type[Objective])


def register_objective(name: str) -> Callable[[_Kind], _Kind]:
    """Class decorator that makes an `Objective` known under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(kind: _Kind) -> _Kind:
        taken = _OBJECTIVES.get(name)
        if taken is not None and taken.__qualname__ != kind.__qualname__:
            raise ValueError(f"Cannot register {kind.__name__} as {name!r}: {taken.__name__} has that name.")
        _OBJECTIVES[name] = kind
        return kind

    return register


def list_objectives() -> list[str]:
    """The names that `create_objective` knows."""
    return sorted(_OBJECTIVES)


def create_objective(name: str, **options: Any) -> Objective:
    """An objective by name.

    Raises:
        ValueError: unknown name or option; the message has the nearest one.
    """
    if name not in _OBJECTIVES:
        known = list_objectives()
        raise ValueError(f"Unknown objective {name!r}: expected one of {', '.join(known)}.{hint(name, known)}")
    kind = _OBJECTIVES[name]
    fields: list[str] = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{name} has no option {option!r}: expected one of {', '.join(fields) or 'none'}.{hint(option, fields)}"
            )
    return kind(**options)


@register_objective("noise")
@dataclass(frozen=True)
class Noise(Objective):
    """‖ŷ − y‖², the teacher's own training loss: y is the true noise, or velocity."""

    needs = frozenset({"student"})

    def __call__(self, seen: Seen) -> Tensor:
        return mean_square(seen.student.prediction, seen.target)


@register_objective("output")
@dataclass(frozen=True)
class Output(Objective):
    """‖ŷ − y_T‖² to the teacher's prediction."""

    needs = frozenset({"teacher", "student"})

    def __call__(self, seen: Seen) -> Tensor:
        return mean_square(seen.student.prediction, seen.teacher.prediction)


@register_objective("features")
@dataclass(frozen=True)
class Features(Objective):
    """The mean over sites of ‖a − a_T‖², what the student's and the teacher's sites put out in their own forwards."""

    needs = frozenset({"teacher", "student", "sites"})

    def __call__(self, seen: Seen) -> Tensor:
        pairs = [(seen.student.sites[name].output, call.output) for name, call in seen.teacher.sites.items()]
        return torch.stack([mean_square(*pair) for pair in pairs]).mean()


@register_objective("local")
@dataclass(frozen=True)
class Local(Objective):
    """The mean over sites of ‖f(x_T) − a_T‖² / Var(a_T): each site is fed what the teacher's site was fed.

    The share of the teacher's output that a site leaves unexplained: 1 for a constant at the mean, 0 for the teacher.
    AdamW would not see the scale of a site's error, since sites share no parameters; but the clipping of the whole
    gradient, and the number in the log, would be ruled by the loudest site. Variances are those of one sample.
    One forward of the teacher, and forward and backward of the sites alone: nothing is propagated through the UNet.
    """

    needs = frozenset({"teacher", "sites"})

    def __call__(self, seen: Seen) -> Tensor:
        def unexplained(name: str, call: SiteCall) -> Tensor:
            wanted = call.output.to(upcast(call.output.dtype))
            error = (replay(seen.adapter.model, name, call) - wanted).square().mean((1, 2))
            return (error / wanted.var((1, 2), correction=0)).mean()

        return seen.mean_over_sites(unexplained)


@register_objective("matrix")
@dataclass(frozen=True)
class Matrix(Objective):
    """The mean over sites and heads of ‖W − W_T‖² / ‖W_T‖² on sampled rows, for the same input (2408.10189 §3.1).

    W_T is the teacher's softmax matrix, W the student's as it is applied to the values, normalized if the mixer is.
    The Frobenius norm, and not a divergence of distributions, since W may be signed or unnormalized; relative, so that
    sites of many tokens (entries of about 1/l) and of few weigh the same. Where every value channel has a matrix of its
    own (b, h, v, l, l), each is compared with the head's. Trains what makes the matrix, and not values and outputs.

    Attributes:
        max_tokens: sites with more are left out, which is logged: a student's matrix costs O(b·h·l²) memory and time
            (times v where every channel has one), at every site.
    """

    needs = frozenset({"teacher", "sites", "rows"})
    max_tokens: int = 1024

    def __call__(self, seen: Seen) -> Tensor:
        small = {n: c for n, c in seen.teacher.sites.items() if c.input.shape[1] <= self.max_tokens}
        left_out = [name for name in seen.teacher.sites if name not in small]
        if not small:
            raise ValueError(
                f"matrix has no site to compare: all see more than max_tokens={self.max_tokens} tokens. Raise it (the "
                "memory grows with its square), or train this stage at smaller pictures."
            )
        if left_out:
            _warn(f"matrix leaves out sites of more than {self.max_tokens} tokens: {', '.join(left_out)}")
        kept = dataclasses.replace(seen, teacher=Forward(seen.teacher.prediction, small))
        return kept.mean_over_sites(partial(self._distance, seen))

    def _distance(self, seen: Seen, name: str, call: SiteCall) -> Tensor:
        layer, wanted = seen.adapter.model.get_submodule(name), seen.rows[name]
        matrix = mixing_matrix(seen.adapter.mixers[name], call.input, layer, call.grid)
        samples, rows = places(seen.picked, call.input.shape[1])
        found = matrix[samples, ..., rows, :]  # (b, r, h, [v,] l)
        if found.ndim > wanted.ndim:
            wanted = wanted[..., None, :].expand_as(found)
        rest = (1, *range(3, found.ndim))
        return ((found - wanted).square().sum(rest) / wanted.square().sum(rest)).mean()


def teacher_rows(attention: nn.Module, x: Tensor, picked: Tensor) -> Tensor:
    """Rows softmax(q_i kᵀ/√k) of an attention layer's matrix for tokens x (b, l, d): (b, r, h, l), float32 at least.

    `picked`: (b, r), as in `Seen`. Costs O(b·r·h·l): only these rows are made.
    """
    layer: Any = attention
    heads, (samples, rows) = (layer.heads, -1), places(picked, x.shape[1])
    q, k = layer.to_q(x[samples, rows]).unflatten(-1, heads), layer.to_k(x).unflatten(-1, heads)
    scores = torch.einsum("brhk,blhk->brhl", q.to(upcast(q.dtype)), k.to(upcast(k.dtype)))
    return (scores * layer.scale).softmax(-1)


def places(picked: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Shares (b, r) in [0, 1) -> indices of the samples (b, 1) and of their rows (b, r), for `length` tokens."""
    rows = (picked * length).long().clamp(max=length - 1)  # a product may be rounded up to the length
    return torch.arange(len(picked), device=picked.device)[:, None], rows


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared difference, in float32 at least."""
    return (a.to(upcast(a.dtype)) - b.to(upcast(b.dtype))).square().mean()


@cache
def _warn(text: str) -> None:
    """Once for a text, not at every step."""
    _log.warning(text)
