"""Gated DeltaNet (Yang et al. 2024, 2412.06464)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mixers.mixer import MixerConfig, Streams, TokenMixer, upcast
from mixers.operators import delta, delta_rule, delta_rule_weights
from mixers.precision import accumulation_dtype, no_autocast
from mixers.registry import register_mixer
from mixers.stages.decays import ScalarDecay
from mixers.stages.projections import Projections
from mixers.state_dicts import ConvertedStateDict, convert_fla_state_dict, require_tensors
from mixers.traits import Causality


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Options of `gated_deltanet`.

    Attributes:
        expand_k: width of queries and keys over the model width, rounded to whole channels a head. Published are
            0.75 with values twice as wide, 1.5; without a gate 1 and 2, which costs as much.
        allow_neg_eigval: β is up to 2, so that a token can turn what it finds around (2411.12537).
        decay: forget by a gate a token and head; without it the mixer is DeltaNet (2406.06484).
        backend: of the operator.
    """

    causality: Causality = "causal"
    normalize: bool = False
    expand: float = 1.5
    conv_size: int = 4
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
        "noncausal": "a token erases what came before it, and without an order there is no before",
        "True": "erasing makes weights negative, so their sum is nothing to divide by",
    },
)
class GatedDeltaNet(TokenMixer):
    """Gated DeltaNet (2412.06464): S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, y_t = q_tᵀ S_t / √k.

    q and k have length 1, β = σ(to_beta(x)), α = exp(−Δ exp(A_log)) with Δ = softplus(to_dt(x) + dt_bias). The result
    goes through RMSNorm, one a head, and times SiLU(to_gate(x)). No biases but the convolution's. Without a short
    convolution there is no SiLU on q, k and v either.
    """

    Config: ClassVar[Any] = GatedDeltaNetConfig
    drop_in_options: ClassVar[dict[str, Any]] = {
        **{"expand": 1, "expand_k": 1, "conv_size": 0, "norm": False, "gate": False},
    }

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        self.to_beta = nn.Linear(dim, heads, bias=False)
        self.decay = ScalarDecay(dim, heads, a_range=(0.0, 16.0)) if config.decay else None

    @property
    def key_width(self) -> int:
        """expand_k · d, in whole channels a head."""
        return self.heads * max(1, round(self.dim * self.config.expand_k / self.heads))

    def create_projections(self) -> Projections:
        """Projections without a bias."""
        return Projections(self.dim, self.key_width, self.value_width, bias=False)

    def add_gates(self, streams: Streams) -> Streams:
        """Add β and log α, (b, l, h) each."""
        x = streams.x
        dtype = accumulation_dtype(x, self.to_beta.weight)
        with no_autocast(x):
            beta = F.linear(x.to(dtype), self.to_beta.weight.to(dtype)).sigmoid()
        log_decay = None if self.decay is None else self.decay(x)[1]
        return replace(streams, beta=(2 if self.config.allow_neg_eigval else 1) * beta, log_decay=log_decay)

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """q and k over their lengths, (b, l, h, k) each, float32 at least; zero stays zero."""
        q, k = (t.to(upcast(t.dtype)) for t in (streams.q, streams.k))
        return _unit(q), _unit(k)

    def mix(self, streams: Streams) -> Tensor:
        """W v, (b, l, h, v), float32 at least."""
        assert streams.beta is not None
        (q, k), v = self.features(streams), streams.values
        settings: dict[str, Any] = {"causality": self.config.causality, "scale": self.scale}
        mixed = delta_rule(q, k, v, streams.beta, streams.log_decay, backend=self.config.backend, **settings)
        return cast(Tensor, mixed)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """(b, h, l, l), from the formula."""
        assert streams.beta is not None
        q, k = self.features(streams)
        settings: dict[str, Any] = {"causality": self.config.causality, "scale": self.scale}
        return delta_rule_weights(q, k, streams.beta, streams.log_decay, **settings)

    @property
    def scale(self) -> float:
        """1 / √k."""
        return self.key_dim**-0.5

    @property
    def permutation_equivariant(self) -> bool:
        """Never: what a token erases came before it."""
        return False

    @property
    def positive(self) -> bool:
        """Erasing makes weights negative."""
        return False

    def state_size(self, length: int) -> int:
        """h·k·v."""
        return self.heads * self.key_dim * self.head_dim

    def mixing_flops(self, length: int) -> int:
        """Those of convolution, gate and operator, and β's and α's."""
        small = self.heads * (1 if self.decay is None else 2)
        return super().mixing_flops(length) + 2 * length * self.dim * small

    def operator_flops(self, length: int) -> int:
        """Those of the delta rule in chunks, without the solving of its triangles."""
        return self.heads * delta.flops(length, self.key_dim, self.head_dim, self.config.causality)

    @classmethod
    def convert_state_dict(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ConvertedStateDict:
        """Of `fla`'s GatedDeltaNet with short convolutions; say allow_neg_eigval where allow_neg_eigval is set.

        Not read: more heads of values than of keys, a gate other than SiLU.
        """
        names = {"a_proj.weight": "decay.to_dt.weight", "A_log": "decay.A_log", "dt_bias": "decay.dt_bias"}
        require_tensors(state, "q_conv1d.weight k_conv1d.weight v_conv1d.weight")
        read = convert_fla_state_dict(state, options, {**names, "b_proj.weight": "to_beta.weight"})
        return replace(read, options={"expand_k": len(state["q_proj.weight"]) / read.dim, **read.options})


def _unit(x: Tensor) -> Tensor:
    """x / √(|x|² + 1e-6) over the channels."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
