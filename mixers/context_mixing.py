"""How a mixer mixes in the context of a host's layer: with text beside it, rotary embeddings, and padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from mixers.context import MixingContext, RotaryPlacement, Rotation, TextAttention, TextTokens, count_tokens
from mixers.properties import MixerProperties
from mixers.streams import Streams
from mixers.text_attention import attend_to_text


class ContextMixing(MixerProperties):
    """Base of `TokenMixer`: what holds for every mixer; a mixer that can do more overrides it.

    Class attributes that a subclass sets:
        weighs_text: whether text="softmax" needs a learned weight, because the mixer has no softmax of its own.

    Attributes:
        text_bias: (h,), added to the logarithm of the number of text tokens; None unless text="softmax".
    """

    weighs_text: ClassVar[bool] = True

    text_bias: nn.Parameter | None

    @classmethod
    def feature_map_name(cls, config: Any) -> str | None:
        """Return the name of the feature map that mixers of a configuration compute with; None without one."""
        return getattr(config, "feature_map", None)

    @classmethod
    def benefits_from_temperature(cls, config: Any) -> bool:
        """Whether the option `temperature` exists and changes more than a scale; False without a feature map."""
        return False

    def mix(self, streams: Streams) -> Tensor:
        """Apply feature map, operator and normalization; see `TokenMixer.mix`."""
        raise NotImplementedError

    def mix_in_context(self, streams: Streams, context: MixingContext) -> Tensor:
        """Mix the tokens of `streams` as the host's layer does, (b, l, h, v).

        Args:
            streams: of the image tokens.
            context: in the same order as the streams.

        Raises:
            ValueError: tokens are hidden that this mixer cannot leave out, or the rotary embedding does not fit.
        """
        if context.visible is not None:
            if self.config.conv_size or self.config.local_conv_size:
                raise ValueError(
                    f"attention_mask hides tokens, which the convolution of {type(self).__name__} would show to their "
                    "neighbors: use conv_size=0 and local_conv_size=0, or call the model without a mask."
                )
            streams = self.hide_tokens(streams, context.visible)
        if context.rotation is not None:
            streams = self.rotate(streams, context.rotation)
        return self.mix(streams) if context.text is None else self.mix_with_text(streams, context.text)

    @property
    def text_attentions(self) -> dict[TextAttention, str | None]:
        """For every value of `text`: None if it is supported, otherwise the reason."""
        reason = f"{type(self).__name__} does not compute sums over φ(q)·φ(k) that text tokens could join"
        return {"softmax": None, "shared": reason, "linear": reason}

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        return {"after_map": None, "before_map": None}

    def mix_with_text(self, streams: Streams, text: TextTokens) -> Tensor:
        """Combine the mixer among image tokens with attention to the text as `text` of the configuration says.

        `softmax`: (n_i y_i + n_t exp(bias) y_t) / (n_i + n_t exp(bias)) with the numbers of tokens n; how EDiT weighs
        the two parts is not published in code.
        """
        assert self.text_bias is not None
        mixed = self.mix(streams)
        weight = text.count * self.text_bias.to(mixed.dtype).exp()[:, None]
        share = weight / (count_tokens(streams.x, streams.visible) + weight)
        return mixed + share * (attend_to_text(text).to(mixed.dtype) - mixed)

    def rotate(self, streams: Streams, rotation: Rotation) -> Streams:
        """Rotate q and k: without a feature map, before and after are the same."""
        return replace(streams, q=rotation(streams.q), k=rotation(streams.k))

    def hide_tokens(self, streams: Streams, visible: Tensor) -> Streams:
        """Return streams in which no token sees those where `visible` (b, l) is False, as if they did not exist.

        Raises:
            ValueError: the mixer has no such form.
        """
        raise ValueError(
            f"attention_mask hides tokens, which {type(self).__name__} cannot leave out: call the model without a "
            "mask, use another mixer, or unmount the adapter."
        )

    def _check_context_options(self) -> None:
        """Raise ValueError if the mixer does not support the configured `text` or `rope`."""
        self._require_supported("text", self.config.text, self.text_attentions)
        self._require_supported("rope", self.config.rope, self.rotary_placements)

    def _require_supported(self, option: str, value: str | None, reasons: Mapping[Any, str | None]) -> None:
        reason = None if value is None else reasons[value]
        if reason is not None:
            others = " or ".join(f"{option}={name!r}" for name, obstacle in reasons.items() if obstacle is None)
            advice = f" Use {others}." if others else ""
            raise ValueError(f"{type(self).__name__} does not support {option}={value!r}: {reason}.{advice}")
