"""Gated DeltaNet (Yang et al. 2024, 2412.06464)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch import Tensor

from mixers.config import MixerConfig
from mixers.entries import register_mixer
from mixers.mixer import TokenMixer
from mixers.operators import delta, delta_rule, delta_rule_matrix
from mixers.precision import accumulation_dtype
from mixers.stages.decays import ScalarDecay
from mixers.stages.projections import FullPrecisionLinear, Projections
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict, require_tensors
from mixers.streams import Streams
from mixers.traits import Causality


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Options of `gated_deltanet`.

    Attributes:
        expand_k: width of queries and keys over the model width, rounded to whole channels per head. Published: 0.75,
            with values twice as wide (expand 1.5); without a gate 1 and 2, which costs the same.
        allow_neg_eigval: β ranges up to 2 instead of 1, so that a token can flip the sign of what is stored under its
            key (2411.12537).
        decay: forget by one gate per token and head; without it, the mixer is DeltaNet (2406.06484).
        backend: implementation of the operator.
    """

    causality: Causality = "causal"
    normalize: bool = False
    expand: float = 1.5
    conv_size: int = 4
    conv_bias: bool = False
    norm: bool = True
    gate: bool = True
    expand_k: float = 0.75
    allow_neg_eigval: bool = False
    decay: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expand_k <= 0:
            raise ValueError(f"Expected expand_k > 0, got {self.expand_k}.")


@register_mixer(
    "gated_deltanet",
    causalities=("causal", "bidirectional"),
    normalizations=(False,),
    unsupported={
        "noncausal": "a token erases what came before it, which needs an order",
        "True": "erasing makes entries of the mixing matrix negative, so its row sums can vanish",
    },
)
class GatedDeltaNet(TokenMixer):
    """Gated DeltaNet (2412.06464): S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, y_t = q_tᵀ S_t / √k.

    q and k have norm 1, β = σ(to_beta(x)), α = exp(−Δ exp(A_log)) with Δ = softplus(to_dt(x) + dt_bias). The result is
    normalized by RMSNorm per head and multiplied by SiLU(to_gate(x)). No layer has a bias.

    Deviations from the published block: without the short convolution, q, k and v do not pass through SiLU, because
    the drop-in form starts from a host's projections; fla applies it.
    """

    Config: ClassVar[type[MixerConfig]] = GatedDeltaNetConfig
    drop_in_options: ClassVar[Mapping[str, Any]] = {
        "expand": 1,
        "expand_k": 1,
        "conv_size": 0,
        "norm": False,
        "gate": False,
    }

    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.to_beta = FullPrecisionLinear(dim, heads, bias=False)
        self.decay = ScalarDecay(dim, heads, a_range=(0.0, 16.0)) if config.decay else None

    @property
    def key_width(self) -> int:
        """expand_k · d, rounded to whole channels per head."""
        return self.heads * max(1, round(self.dim * self.config.expand_k / self.heads))

    def create_projections(self) -> Projections:
        """Create the mixer's own projections, without biases."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def add_gates(self, streams: Streams) -> Streams:
        """Add β and log α, (b, l, h) each."""
        beta = self.to_beta(streams.x).sigmoid()
        log_decay = None if self.decay is None else self.decay(streams.x)[1]
        return replace(streams, beta=2 * beta if self.config.allow_neg_eigval else beta, log_decay=log_decay)

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Return streams whose hidden tokens write nothing and let nothing decay."""
        assert streams.beta is not None
        hidden = ~visible[..., None]
        log_decay = None if streams.log_decay is None else streams.log_decay.masked_fill(hidden, 0)
        return replace(streams, beta=streams.beta.masked_fill(hidden, 0), log_decay=log_decay)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Scale q and k to norm 1, (b, l, h, k) each, float32 at least; zero stays zero."""
        return _unit_norm(streams.q), _unit_norm(streams.k)

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v), in float32 at least."""
        assert streams.beta is not None
        q, k = self.features(streams)
        mixed = delta_rule(
            q,
            k,
            streams.values,
            streams.beta,
            streams.log_decay,
            causality=self.config.causality,
            scale=self.scale,
            backend=self.config.backend,
        )
        return cast(Tensor, mixed)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W, (b, h, l, l), from its formula."""
        assert streams.beta is not None
        q, k = self.features(streams)
        return delta_rule_matrix(
            q, k, streams.beta, streams.log_decay, causality=self.config.causality, scale=self.scale
        )

    @property
    def scale(self) -> float:
        """1 / √k."""
        return self.key_dim**-0.5

    @property
    def permutation_equivariant(self) -> bool:
        """False: which tokens a token erases depends on the order."""
        return False

    @property
    def positive(self) -> bool:
        """False: erasing makes entries of the mixing matrix negative."""
        return False

    def state_size(self, length: int) -> int:
        """Return h·k·v."""
        return self.heads * self.key_dim * self.head_dim

    def mixing_flops(self, length: int) -> int:
        """Add the operations of β and α."""
        layers = 1 if self.decay is None else 2
        return super().mixing_flops(length) + 2 * length * self.dim * self.heads * layers

    def operator_flops(self, length: int) -> int:
        """Return the operations of the delta rule in chunks, without its triangular solves."""
        return self.heads * delta.flops(length, self.key_dim, self.head_dim, self.config.causality)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Convert the state dict of `fla`'s GatedDeltaNet with short convolutions.

        Pass allow_neg_eigval if it is set. Not supported: more heads of values than of keys, a gate other than SiLU.
        """
        names = {
            "a_proj.weight": "decay.to_dt.weight",
            "A_log": "decay.A_log",
            "dt_bias": "decay.dt_bias",
            "b_proj.weight": "to_beta.weight",
        }
        require_tensors(state, "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")
        converted = convert_fla_state_dict(state, options, names)
        derived = {"expand_k": len(state["q_proj.weight"]) / converted.dim}
        return replace(converted, options=derived | converted.options)


def _unit_norm(x: Tensor) -> Tensor:
    """Return x / √(|x|² + 1e-6) over the channels, float32 at least."""
    x = x.to(accumulation_dtype(x))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
