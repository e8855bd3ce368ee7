"""The ready-made comparisons: operators, layers, UNets. What differs between them is which lists they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from experiments.bench import baselines
from experiments.bench.contest import Contest, Make, Work
from experiments.bench.crossover import EMBEDDED, PROFILES
from mixers import create_mixer, list_mixers, operators, registry
from mixers.operators.choice import KERNELS, unavailable

SOFTMAX = "softmax"
MOUNTED = "linfusion"  # in a UNet, unless another mixer is named
CHUNKED, RECURRENT = "chunked", "recurrent"


@dataclass(frozen=True)
class Setup:
    """Where and how large: the device, the dtype, the batch, and the sizes of heads."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: tuple[tuple[int, int], ...] = ((8, 40),)
    lengths: tuple[int, ...] = (4096, 16384, 65536, 262144)
    backward: bool = True

    @property
    def longest_recurrence(self) -> int:
        """Tokens up to which the recurrence, which takes them one by one, is tried."""
        return 16384 if self.device == "cpu" else 1024

    def normal(self, *shape: int) -> Tensor:
        """Random numbers there."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    @property
    def kernels(self) -> list[str]:
        """The backends beside the formulations that can run there."""
        return [name for name in KERNELS if unavailable(name, torch.device(self.device).type) is None]


Streams = Callable[[Setup, int, int, int], tuple[Any, ...]]
"""(setup, length, heads, width) -> the tensors of an operator."""


def unmapped(setup: Setup, length: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """q, k, v (b, l, h, k) as projections give them: views of (b, l, h · k)."""
    return tuple(setup.normal(setup.batch, length, heads * width).unflatten(-1, (heads, -1)) for _ in range(3))


def gated(decay: str, setup: Setup, length: int, heads: int, width: int) -> tuple[Any, ...]:
    """q, k, v and log decays of a kind."""
    shapes = {"scalar": (setup.batch, length, heads), "vector": (setup.batch, length, heads, width)}
    gates = -setup.normal(*shapes[decay]).float().abs() if decay in shapes else None
    return (*unmapped(setup, length, heads, width), gates)


def states(setup: Setup, length: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """u, dt, A, B, C of a selective scan with 16 states."""
    tokens = (setup.batch, length, heads)
    rates = -setup.normal(heads, width, 16).float().exp()
    return (
        setup.normal(*tokens, width),
        setup.normal(*tokens, width).sigmoid(),
        rates,
        setup.normal(*tokens, 16),
        setup.normal(*tokens, 16),
    )


def written(setup: Setup, length: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """q, k, v, beta, log decay of the gated delta rule."""
    q, k, v = unmapped(setup, length, heads, width)
    beta, gates = setup.normal(*q.shape[:3]).sigmoid(), -setup.normal(*q.shape[:3]).abs()
    return q, torch.nn.functional.normalize(k, dim=-1), v, beta, gates


def operator_contests(setup: Setup) -> Iterator[Contest]:
    """Every operator in its kinds, forward and with backward, ours against others'."""
    elu: dict[str, Any] = {"feature_map": "elu_plus_one"}
    run: Any = operators.linear_attention
    for heads, width in setup.heads:
        tag = f"b{setup.batch} h{heads} k{width}"
        whole = partial(_least_work, setup, unmapped, heads, width)
        published = {"published formula": baselines.published_linfusion, "SDPA": baselines.softmax}
        yield from _two(
            setup, f"non-causal, normalized, {tag}", partial(run, **elu), unmapped, heads, width, published, whole
        )
        plain = partial(run, normalize=False, **elu)
        yield from _two(setup, f"non-causal, {tag}", plain, unmapped, heads, width, {}, whole)
        for decay in ("none", "scalar", "vector"):
            make = partial(gated, decay)
            least = partial(_least_work, setup, make, heads, width)
            for normalize in (True, False):
                told = f"causal, decay {decay}{', normalized' if normalize else ''}, {tag}"
                ours = partial(run, causality="causal", normalize=normalize, **(elu if normalize else {}))
                others = {} if normalize else {"fla itself": baselines.fla_gla}
                yield from _two(setup, told, ours, make, heads, width, others, least)
            if decay != "none":
                both = partial(run, causality="bidirectional", **elu)
                told = f"bidirectional, decay {decay}, normalized, {tag}"
                yield from _two(setup, told, both, make, heads, width, {}, least)
        yield from _two(setup, f"selective scan, {tag}", operators.selective_scan, states, heads, width, {})
        least = partial(_least_work, setup, written, heads, width)
        yield from _two(setup, f"delta rule, {tag}", operators.delta_rule, written, heads, width, {}, least)


def _two(
    setup: Setup,
    name: str,
    ours: Callable[..., Any],
    streams: Streams,
    heads: int,
    width: int,
    others: Mapping[str, Callable[..., Any]],
    work: Callable[..., Work] | None = None,
) -> Iterator[Contest]:
    """The forward pass and, where asked for, forward and backward."""
    functions = {name: partial(ours, backend=name) for name in (CHUNKED, *setup.kernels, RECURRENT)}
    ways = {"forward": baselines.forward}
    if setup.backward:
        ways["forward and backward"] = baselines.with_backward
    for way, wrap in ways.items():

        def maker(function: Callable[..., Any], wrap: Any = wrap, bound: int | None = None) -> Make:
            def make(length: int) -> Callable[[], object]:
                if bound is not None and length > bound:
                    raise ValueError(f"not tried beyond {bound:,} tokens: it takes them one by one")
                torch.manual_seed(length)  # every contender is given the same numbers
                call: Callable[[], object] = wrap(function, *streams(setup, length, heads, width))
                return call

            return make

        makers = {n: maker(f, bound=setup.longest_recurrence if n == RECURRENT else None) for n, f in functions.items()}
        makers |= {n: maker(f) for n, f in others.items()}
        floor = None if work is None else partial(work, backward=way != "forward")
        yield Contest(f"{name}: {way}", makers, setup.lengths, frozenset({*others, RECURRENT}), floor=floor)


def _least_work(setup: Setup, streams: Streams, heads: int, width: int, length: int, backward: bool) -> Work:
    """Every tensor read and the result written once; backward reads them and dy, and writes their gradients.

    Products: keys with values and queries with their sum; backward twice as many. What an order adds is not counted.
    """
    given = [t for t in streams(replace(setup, device="meta"), length, heads, width) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in given)
    result = setup.batch * length * heads * width
    size = torch.empty(0, dtype=setup.dtype).element_size()
    return Work(moved + result * size + backward * (2 * moved + result * size), (2 + 4 * backward) * 2 * result * width)


def layer_contests(setup: Setup, dim: int = 320, heads: int = 5) -> Iterator[Contest]:
    """Whole blocks, as published, against transformers', and against softmax attention of the same width."""
    pairs = {"mamba": baselines.transformers_mamba, "mamba2": baselines.transformers_mamba2}
    for name, theirs in pairs.items():
        inner = 1 if name == "mamba" else 2 * dim // 64
        makers = {"ours": _block(setup, partial(create_mixer, name, dim, inner), dim)}
        makers["transformers"] = _block(setup, partial(theirs, dim), dim)
        makers["softmax block"] = _block(setup, partial(create_mixer, SOFTMAX, dim, heads), dim)
        others = frozenset({"transformers", "softmax block"})
        yield Contest(f"{name} block, d {dim}: forward", makers, setup.lengths, others)


def growth_contests(setup: Setup, dim: int = 320, heads: int = 8) -> Iterator[Contest]:
    """Every linear mixer as it is mounted, on one square image: how its time grows with the tokens."""

    def maker(name: str) -> Make:
        def make(length: int) -> Callable[[], object]:
            torch.manual_seed(0)
            options = registry.get_mixer_entry(name).mixer.drop_in_options
            mixer = create_mixer(name, dim, heads, **options).to(setup.device, setup.dtype).eval()
            side = math.isqrt(length)
            return baselines.forward(partial(mixer, grid=(side, side)), setup.normal(1, side * side, dim))

        return make

    makers = {name: maker(name) for name in list_mixers(linear=True)}
    yield Contest(f"mixers as mounted, d {dim}: forward", makers, setup.lengths, growth=True)


def _block(setup: Setup, build: Callable[[], Any], dim: int) -> Make:
    def make(length: int) -> Callable[[], object]:
        torch.manual_seed(0)
        layer = build().to(setup.device, setup.dtype).eval()
        return baselines.forward(layer, setup.normal(1, length, dim))

    return make


def unet_contests(setup: Setup, profile: str, mixer: str, min_tokens: int, sizes: Sequence[int]) -> Iterator[Contest]:
    """A UNet, stock, mounted, and mounted with `min_tokens`; sizes are the sides of images in pixels.

    Raises:
        ValueError: no such profile or mixer.
    """
    from unet_adapters import MixerAdapter
    from unet_adapters.hosts import find_host

    if profile not in (EMBEDDED, *PROFILES):
        raise ValueError(f"No profile {profile!r}: expected one of {', '.join((EMBEDDED, *PROFILES))}.")
    registry.get_mixer_entry(mixer)  # an unknown name fails here, before any work

    def maker(**options: Any) -> Make:
        def make(side: int) -> Callable[[], object]:
            unet, scale = _unet(profile, setup)
            if options:
                MixerAdapter.build(unet, mixer, train_projections=False, **options).mount()
            noisy = setup.normal(setup.batch, unet.config.in_channels, side // scale, side // scale)
            host = find_host(unet)
            shapes = host.condition_shapes(setup.batch)
            conditions = host.forward_arguments({name: setup.normal(*shape) for name, shape in shapes.items()})
            return baselines.forward(lambda: unet(noisy, 500, return_dict=False, **conditions)[0])

        return make

    makers = {f"{mixer}": maker(select="all"), "stock": maker()}
    makers[f"{mixer} from {min_tokens} tokens"] = maker(min_tokens=min_tokens)
    yield Contest(f"UNet {profile}: forward", makers, sizes, frozenset({"stock"}), axis="px")


def _unet(profile: str, setup: Setup) -> tuple[UNet2DConditionModel, int]:
    """A UNet and the pixels of a latent place."""
    from experiments.teacher.load import load_teacher
    from unet_adapters import profiles

    if profile == EMBEDDED:
        return load_teacher().unet.to(setup.device, setup.dtype), 4
    known = {"sd15": "SD-1.5", "sd21": "SD-2.1", "sdxl": "SDXL base"}
    found = next(p for p in profiles.PROFILES if p.name == known[profile])
    return found.unet(setup.device).to(setup.dtype).requires_grad_(False), 8


def matching(contests: Iterator[Contest], pattern: str) -> list[Contest]:
    """The contests with only those baselines that match a wildcard pattern."""
    found = []
    for contest in contests:
        kept = {n: m for n, m in contest.contenders.items() if n not in contest.baselines or fnmatchcase(n, pattern)}
        found.append(replace(contest, contenders=kept))
    return found
