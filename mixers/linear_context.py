"""Linear mixers in the context of a host's layer: the sums of a linear mixer, and who else takes part in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mixers import operators
from mixers.context import RotaryPlacement, Rotation, TextAttention, TextTokens, count_tokens
from mixers.feature_maps import FeatureMap
from mixers.normalization import count_unmasked_tokens
from mixers.normalized_mixer import NormalizedMixer
from mixers.precision import no_autocast
from mixers.streams import Streams
from mixers.text_attention import share_denominator


class LinearContext(NormalizedMixer):
    """Base of `LinearMixer`: rotary embeddings after the feature map, text in the sums, padding.

    Everything here is computed from `sums`, the numerator and the denominator of the mixer. Mixers that mix in another
    form, or are normalized otherwise than by row sums, have what every mixer has.
    """

    computes_sums: ClassVar[bool]
    has_decay: ClassVar[bool]

    config: Any
    feature_map: FeatureMap

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Compute φ(q) and φ(k); see `LinearMixer.features`."""
        raise NotImplementedError

    def scaled_k(self, k: Tensor) -> Tensor:
        """Return keys times their temperature; see `LinearMixer.scaled_k`."""
        raise NotImplementedError

    def scale_at(self, length: Any) -> Any:
        """Return the factor of unnormalized weights; see `LinearMixer.scale_at`."""
        raise NotImplementedError

    @property
    def has_sums(self) -> bool:
        """Whether `sums` is what the mixer computes, as configured."""
        return self.computes_sums and self.config.row_normalizer in (None, "row_sum")

    def sums(self, streams: Streams, text: TextTokens | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute Σ_j W_ij v_j and Σ_j W_ij before any division, over image tokens and the keys of a text.

        Rotated features are signed, so the denominator is computed without the rotation. Text tokens have no place in
        an order: every token sees them, and their weights do not decay. Of a mixer with a step size, theirs is 1.

        Args:
            streams: of the image tokens.
            text: tokens whose keys join those of the image; None: none.

        Returns:
            (b, l, h, v), and if the mixer is normalized (b, l, h, 1), with eps; float32 at least.
        """
        q, k = self.features(streams)
        plain_q, plain_k = self.denominator_features(streams, q, k)
        if streams.rotation is not None:
            q, k = streams.rotation(q), streams.rotation(k)
        v = streams.values
        if streams.visible is not None:
            hidden = ~streams.visible[..., None, None]
            k, plain_k, v = (tensor.masked_fill(hidden, 0) for tensor in (k, plain_k, v))
        ones = torch.ones_like(v[..., :1])
        numerator = self._sum_products(q, k, v, streams.log_decay)
        denominator = self._sum_products(plain_q, plain_k, ones, streams.log_decay) if self.config.normalize else None
        if text is not None:
            keys, values = self._text_sums(text)
            rotated_keys = keys if text.rotation is None else text.rotation(keys)
            numerator = numerator + _read(q, rotated_keys, values)
            if denominator is not None:
                denominator = denominator + _read(plain_q, keys, torch.ones_like(values[..., :1]))
        if denominator is None:
            return numerator * self.scale_at(self._count(streams, text)), None
        return numerator, denominator + self._row_eps(streams, text)

    def denominator_features(self, streams: Streams, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features whose products make the denominator; by default those of the numerator."""
        return q, k

    def mix_with_text(self, streams: Streams, text: TextTokens) -> Tensor:
        """Combine the mixer among image tokens with attention to the text as `text` of the configuration says."""
        if self.config.text == "linear":
            return divide(*self.sums(streams, text))
        if self.config.text == "shared":
            numerator, denominator = self.sums(streams)
            assert denominator is not None
            return share_denominator(numerator, denominator + self._text_eps(text, streams), text)
        return super().mix_with_text(streams, text)

    def rotate(self, streams: Streams, rotation: Rotation) -> Streams:
        """Rotate the features in the numerator, or q and k before the map, as `rope` of the configuration says."""
        if self.config.rope == "before_map" or not self.computes_sums:
            return super().rotate(streams, rotation)
        return replace(streams, rotation=rotation)

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Return streams whose hidden tokens have no features and no values, and let nothing decay."""
        if not self.has_sums:
            return super().hide_tokens(streams, visible)
        log_decay = streams.log_decay
        if log_decay is not None:
            log_decay = log_decay.expand(*streams.v.shape[:3]) if log_decay.ndim == 1 else log_decay
            hidden = ~visible.view(*visible.shape, *(1 for _ in log_decay.shape[2:]))
            log_decay = log_decay.masked_fill(hidden, 0)
        v = streams.v.masked_fill(~visible[..., None, None], 0)
        return replace(streams, log_decay=log_decay, v=v, visible=visible)

    @property
    def text_attentions(self) -> dict[TextAttention, str | None]:
        """For every value of `text`: None if it is supported, otherwise the reason."""
        if not self.has_sums:
            return super().text_attentions
        shared = None if self.config.normalize else "normalize=False leaves no denominator to share"
        return {"softmax": None, "shared": shared, "linear": self._why_no_text_features}

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        rotates_in_denominator = self.feature_map.positive or self.config.row_normalizer == "decoupled"
        after = None
        if not self.computes_sums and rotates_in_denominator:
            after = "its numerator and its denominator are not computed apart"
        return {"after_map": after, "before_map": None}

    @property
    def _why_no_text_features(self) -> str | None:
        """Why keys of the text have no features; None if they have."""
        return None

    def text_features(self, k: Tensor) -> Tensor:
        """Compute φ(k) of text tokens, (b, t, h, k)."""
        return self.feature_map.apply(self.scaled_k(k))

    def _text_sums(self, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Return the features and the values of the text, without its padding, float32 at least."""
        dtype = torch.promote_types(text.v.dtype, torch.float32)
        keys = self.text_features(text.k.to(dtype))
        values = text.v.to(dtype)
        if text.visible is None:
            return keys, values
        hidden = ~text.visible[..., None, None]
        return keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)

    def _sum_products(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        config = self.config
        sums = operators.linear_attention(
            q, k, v, log_decay, causality=config.causality, normalize=False, backend=config.backend
        )
        return cast(Tensor, sums)

    def _count(self, streams: Streams, text: TextTokens | None) -> Any:
        counts = count_tokens(streams.v, streams.visible) + (0 if text is None else text.count)
        return counts.clamp_min(1) if isinstance(counts, Tensor) else counts

    def _row_eps(self, streams: Streams, text: TextTokens | None) -> Tensor:
        """Return what is added to the row sums: eps times the number of visible tokens, or eps where sums decay."""
        v = streams.values
        if self._sums_decay:
            return v.new_tensor(self.config.eps)
        counts = count_unmasked_tokens(v, self.config.causality, streams.visible)
        counts = counts + (0 if text is None else text.count)
        return self.config.eps * counts.clamp_min(1)  # a token that sees nothing gets 0 / eps

    def _text_eps(self, text: TextTokens, streams: Streams) -> Any:
        """Return the share of the text in `_row_eps`."""
        return 0 if self._sums_decay else self.config.eps * text.count

    @property
    def _sums_decay(self) -> bool:
        return self.has_decay and self.config.causality != "noncausal"


def divide(numerator: Tensor, denominator: Tensor | None) -> Tensor:
    """Divide (b, l, h, v) by (b, l, h, 1) unless the latter is None."""
    return numerator if denominator is None else numerator / denominator


def _read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Σ_t (q_i·k_t) v_t through the sums of k_t v_tᵀ: (b, l, h, v). Costs O((l + t)·k·v) time."""
    with no_autocast(q):
        return torch.einsum("blhk,bhkv->blhv", q, torch.einsum("bthk,bthv->bhkv", k, v))
