"""Mixers in the context of a host's layer: text, rotary embeddings and padding, against dense truths in float64."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixers import create_mixer, list_mixers, registry
from mixers.constant_mixer import ConstantMixer
from mixers.context import MixingContext, Rotation, TextTokens
from mixers.delta_mixer import DeltaMixer
from mixers.linear_mixer import LinearMixer
from mixers.mixer import TokenMixer
from mixers.stages.normalizers import NORMALIZER_NAMES
from mixers.testing.tolerances import assert_close
from mixers.zoo.softmax import Softmax
from tests.mixers.builders import disturbed, float64

DIM = 16
HEADS = 2
LENGTH = 12
TEXT = 5
K = DIM // HEADS
GRID = (3, 4)

CLASSES = {name: registry.get_mixer_entry(name).mixer for name in list_mixers()}
WITH_SUMS = [name for name, mixer in CLASSES.items() if issubclass(mixer, LinearMixer) and mixer.computes_sums]
OPTIONS: dict[str, dict[str, Any]] = {"mila": {"rotary": False}, "rala": {"rotary": False}}


def rotation(tokens: int) -> Rotation:
    angles = float64(tokens, K // 2).repeat_interleave(2, dim=1)
    return Rotation(angles.cos(), angles.sin())


def text(padded: bool = False) -> TextTokens:
    visible = torch.tensor([[True] * TEXT, [True] * 3 + [False] * 2]) if padded else None
    return TextTokens(
        float64(2, LENGTH, HEADS, K), float64(2, TEXT, HEADS, K), float64(2, TEXT, HEADS, K), rotation(TEXT), visible
    )


def build(name: str, **options: Any) -> TokenMixer:
    """The drop-in form with random parameters and projections of its own."""
    entry = registry.get_mixer_entry(name)
    settings = {**entry.mixer.tiny_options, **entry.mixer.drop_in_options, **OPTIONS.get(name, {}), **options}
    if "d_state" in settings:
        settings["d_state"] = None
    return disturbed(create_mixer(name, DIM, HEADS, **settings))


def streams_of(mixer: TokenMixer, x: Tensor) -> Any:
    return mixer.compute_streams(x, mixer.resolve_projections(None), GRID)


def decay_mask(mixer: LinearMixer, log_decay: Tensor | None, like: Tensor) -> Tensor:
    """L (b, i, j, h, k) from the definition, pair by pair; without an order, gates weigh their tokens."""
    b, length, h, k = like.shape
    gates = torch.zeros(b, length, h, k, dtype=torch.float64)
    if log_decay is not None:
        gates = (log_decay if log_decay.ndim == 4 else log_decay.expand(b, length, h)[..., None]).expand_as(gates)
    causality = mixer.config.causality
    if causality == "noncausal":
        return gates.exp()[:, None].expand(-1, length, -1, -1, -1)
    mask = torch.zeros(b, length, length, h, k, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            if j <= i:
                mask[:, i, j] = gates[:, j + 1 : i + 1].sum(1).exp()
            elif causality == "bidirectional":
                mask[:, i, j] = gates[:, i:j].sum(1).exp()
    return mask


def truth(mixer: LinearMixer, x: Tensor, turn: Rotation | None, context_text: TextTokens | None) -> Tensor:
    """The definition of `text` and `rope`, with every weight written out: (b, l, h, v)."""
    config = mixer.config
    streams = streams_of(mixer, x)
    if turn is not None and config.rope == "before_map":
        streams = replace(streams, q=turn(streams.q), k=turn(streams.k))
        turn = None
    q, k = mixer.features(streams)
    mask = decay_mask(mixer, streams.log_decay, q)
    plain = torch.einsum("bihc,bjhc,bijhc->bijh", q, k, mask)
    weights = plain if turn is None else torch.einsum("bihc,bjhc,bijhc->bijh", turn(q), turn(k), mask)
    counts = (mask != 0).any(-1).sum(2).to(q)  # (b, i, h)
    decays = mixer.has_decay and config.causality != "noncausal"
    v = streams.v
    if context_text is not None:
        visible = context_text.visible
        visible = torch.ones(2, TEXT, dtype=torch.bool) if visible is None else visible
        mask_of_text = visible[:, None, :, None].to(q)
        keys = context_text.rotation(context_text.k) if context_text.rotation else context_text.k
        scores = torch.einsum("bihc,bthc->bith", context_text.q, keys) / math.sqrt(K)
        exponentials = scores.exp() * mask_of_text
        n = visible.sum(1)[:, None, None].to(q)
    if config.text in ("linear", "shared"):
        if config.text == "linear":
            features = mixer.text_features(context_text.k)
            rotated = features if context_text.rotation is None else context_text.rotation(features)
            numerator_q = q if turn is None else turn(q)
            text_weights = torch.einsum("bihc,bthc->bith", numerator_q, rotated) * mask_of_text
            text_plain = torch.einsum("bihc,bthc->bith", q, features) * mask_of_text
        else:
            text_weights = text_plain = exponentials
        weights = torch.cat([weights, text_weights], dim=2)
        plain = torch.cat([plain, text_plain], dim=2)
        v = torch.cat([v, context_text.v], dim=1)
        counts = counts + n
    if config.normalize:
        eps = config.eps * (1 if decays else counts)
        weights = weights / (plain.sum(2) + eps)[:, :, None]
    else:
        weights = weights * mixer.scale_at(counts[:, :1, None, :] if config.scale == "mean" else 1)
    y = torch.einsum("bijh,bjhv->bihv", weights, v)
    if config.text != "softmax":
        return y
    y_text = torch.einsum("bith,bthv->bihv", exponentials / exponentials.sum(2, keepdim=True), context_text.v)
    share = n[..., None] * mixer.text_bias.exp()[:, None]
    return (LENGTH * y + share * y_text) / (LENGTH + share)


def cases() -> list[Any]:
    parameters = []
    for name in WITH_SUMS:
        entry = registry.get_mixer_entry(name)
        for causality in entry.causalities:
            for normalize in entry.normalizations:
                parameters.append(pytest.param(name, causality, normalize, id=f"{name}-{causality}-{normalize}"))
    return parameters


@pytest.mark.parametrize(("name", "causality", "normalize"), cases())
@pytest.mark.parametrize("mode", [None, "softmax", "shared", "linear"])
@pytest.mark.parametrize("rope", [None, "after_map", "before_map"])
def test_every_sum_is_what_its_definition_says(name, causality, normalize, mode, rope) -> None:
    try:
        # A row sum of relu features can be 0; eps is large enough that rounding errors are not divided by it.
        mixer = build(name, causality=causality, normalize=normalize, text=mode, rope=rope, eps=1e-3)
    except ValueError as error:
        assert "does not support text=" in str(error) or (name, rope) == ("linfusion_low_rank", "after_map")
        return
    if not mixer.has_sums:
        return  # normalized by subtraction
    x = float64(2, LENGTH, DIM)
    turn = None if rope is None else rotation(LENGTH)
    words = None if mode is None else text(padded=True)
    y = mixer.mix_in_context(streams_of(mixer, x), MixingContext(text=words, rotation=turn))
    assert_close(y, truth(mixer, x, turn, words))


@pytest.mark.parametrize("mode", ["shared", "linear"])
def test_what_a_mode_needs_is_refused_with_the_reason(mode) -> None:
    with pytest.raises(ValueError, match="normalize=False leaves no denominator"):
        build("linear_attention", normalize=False, text="shared")
    with pytest.raises(ValueError, match="G of the tokens, which the text does not have"):
        build("linfusion_low_rank", text="linear")
    for name in sorted(set(list_mixers()) - set(WITH_SUMS) - {"softmax"}):
        with pytest.raises(ValueError, match=rf"does not support text='{mode}': .*Use text='softmax'"):
            build(name, text=mode)
    with pytest.raises(ValueError, match="Did you mean 'shared'"):
        build("linear_attention", text="share")


@pytest.mark.parametrize("causality", ["noncausal", "causal"])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_attends_to_image_and_text_at_once(causality, padded) -> None:
    mixer = build("softmax", causality=causality, text="softmax", rope="after_map")
    assert mixer.text_bias is None
    x = float64(2, LENGTH, DIM)
    turn = rotation(LENGTH)
    streams = streams_of(mixer, x)
    words = replace(text(padded), q=turn(streams.q))
    keys = torch.cat([turn(streams.k), words.rotated_k], dim=1)
    scores = torch.einsum("bihc,bjhc->bhij", words.q, keys) / math.sqrt(K)
    if causality == "causal":
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        scores[..., :LENGTH] = scores[..., :LENGTH].masked_fill(future, -math.inf)
    if words.visible is not None:
        scores[..., LENGTH:] = scores[..., LENGTH:].masked_fill(~words.visible[:, None, None], -math.inf)
    expected = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), torch.cat([streams.v, words.v], dim=1))
    assert_close(mixer.mix_in_context(streams, MixingContext(text=words, rotation=turn)), expected)


def configurations(name: str, **options: Any) -> list[TokenMixer]:
    """The mixer with every causality, unnormalized, with every normalizer, and with the mean scale, where allowed."""
    entry = registry.get_mixer_entry(name)
    mixers = []
    for causality in entry.causalities:
        settings: list[dict[str, Any]] = [{"normalize": normalize} for normalize in entry.normalizations]
        settings += [{"normalize": True, "normalizer": normalizer} for normalizer in NORMALIZER_NAMES]
        settings += [{"normalize": False, "scale": "mean"}]
        for setting in settings:
            with contextlib.suppress(ValueError):
                mixers.append(build(name, causality=causality, **setting, **options))
    assert mixers
    return mixers


HIDDEN = ([2, 5, 6, 10], [0, 1, 7], list(range(LENGTH)))  # of each sample: some, the first ones, all


@pytest.mark.parametrize("name", list_mixers())
@pytest.mark.parametrize("mode", [None, "softmax"])
def test_padding_is_as_if_the_tokens_did_not_exist(name, mode) -> None:
    x = float64(len(HIDDEN), LENGTH, DIM)
    visible = torch.ones(len(HIDDEN), LENGTH, dtype=torch.bool)
    for row, hidden in zip(visible, HIDDEN, strict=True):
        row[hidden] = False
    words = None
    if mode is not None:
        words = TextTokens(*(float64(len(HIDDEN), tokens, HEADS, K) for tokens in (LENGTH, TEXT, TEXT)))
    context = MixingContext(visible=visible, text=words)
    for mixer in configurations(name, text=mode):
        one_step = isinstance(mixer, DeltaMixer) and mixer.config.causality == "noncausal"
        exact = isinstance(mixer, DeltaMixer | Softmax | ConstantMixer) or getattr(mixer, "has_sums", False)
        if one_step or not exact:
            with pytest.raises(ValueError, match="attention_mask hides tokens"):
                mixer(x, context=context)
            continue
        y = mixer(x, context=context)
        for i in (0, 1):
            rest = visible[i].nonzero().flatten()
            text_of_rest = words and TextTokens(words.q[i : i + 1, rest], words.k[i : i + 1], words.v[i : i + 1])
            alone = mixer(x[i : i + 1, rest], context=MixingContext(text=text_of_rest))
            assert_close(y[i : i + 1, rest], alone, what=f"{mixer.config}")
        gradients = torch.autograd.grad(y.sum(), list(mixer.parameters()), allow_unused=True, materialize_grads=True)
        assert all(t.isfinite().all() for t in (y, *gradients)), mixer.config


@pytest.mark.parametrize("scan", ["column", "cross"])
def test_the_context_follows_the_scan(scan) -> None:
    mixer = build("retnet", normalize=True, scan=scan, text="shared", rope="after_map")
    x = float64(2, LENGTH, DIM)
    turn = rotation(LENGTH)
    words = text()
    context = MixingContext(text=words, rotation=turn)
    order = torch.arange(LENGTH).view(GRID).t().flatten()
    raster = build("retnet", normalize=True, text="shared", rope="after_map")
    raster.load_state_dict(mixer.state_dict())
    column = raster(x[:, order], context=context.reorder(order))[:, order.argsort()]
    expected = column if scan == "column" else (column + raster(x, context=context)) / 2
    assert_close(mixer(x, grid=GRID, context=context), expected)


def test_large_scores_neither_overflow_nor_lose_the_image() -> None:
    mixer = build("linear_attention", text="shared").float()
    x = torch.randn(2, LENGTH, DIM)
    for factor in (0.0, 1e3):
        words = TextTokens(*(tensor.float() for tensor in (text().q * factor, text().k, text().v)))
        y = mixer.mix_in_context(streams_of(mixer, x), MixingContext(text=words))
        assert y.isfinite().all()


@pytest.mark.parametrize("name", list_mixers())
def test_a_temperature_is_learned_where_it_changes_the_map(name) -> None:
    entry = registry.get_mixer_entry(name)
    if not hasattr(entry.config(), "temperature"):
        return
    if name in ("focused", "polaformer"):
        with pytest.raises(ValueError, match="temperature=True has no effect"):
            build(name, temperature=True)
        return
    x = float64(2, LENGTH, DIM)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = create_mixer(name, DIM, HEADS, own_projections=True, temperature=True, **entry.mixer.tiny_options)
    torch.nn.init.zeros_(mixer.log_temperature)
    mixer = mixer.double()
    grid = GRID if mixer.traits.needs_grid else None
    before = mixer(x, grid=grid)
    mixer.log_temperature.data.fill_(math.log(2))
    changed = not torch.allclose(mixer(x, grid=grid), before)
    homogeneous = not entry.mixer.benefits_from_temperature(mixer.config)
    assert changed or (homogeneous and mixer.config.normalize) or mixer.config.norm
    mixer(x, grid=grid).square().sum().backward()
    assert mixer.log_temperature.grad is not None
