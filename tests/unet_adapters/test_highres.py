"""Large images: ladders, tiles, savings that change nothing, plans that hold, runs that go on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tests.unet_adapters import pipelines
from unet_adapters import MixerAdapter
from unet_adapters.highres import (
    SAVINGS,
    Control,
    Plan,
    Request,
    Tiling,
    decode,
    encode,
    generate,
)
from unet_adapters.highres.denoise import Guide, Schedule, denoise
from unet_adapters.highres.ladder import ladder
from unet_adapters.highres.plan import (
    latent_unit,
    make_plan,
)
from unet_adapters.highres.savings import save_memory
from unet_adapters.highres.tiles import Canvas, spans

FAMILIES = ("text-to-image", "SDXL")
SMALL = {"steps": 3, "guidance": 3.0}


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    made = pipelines.make(request.param)
    made.set_progress_bar_config(disable=True)
    return made


@cache
def plan_for(family: str, size: tuple[int, int]) -> Plan:
    """A plan without savings; making one takes seconds."""
    return make_plan(pipelines.make(family), size, base=32, steps=3, guidance=3.0)


def family_of(pipe: Any) -> str:
    return FAMILIES[hasattr(pipe, "text_encoder_2")]


def latents_of(pipe: Any, *size: int, seed: int = 0) -> Tensor:
    return pipelines.noise(1, 4, *size, seed=seed)


# --- the way up ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40), st.sampled_from([8, 16, 64]))
def test_a_ladder_ends_at_the_size_and_doubles(rows: int, columns: int, base: int, unit: int) -> None:
    size = (rows * unit, columns * unit)
    stages = ladder(size, base * unit, unit)
    assert stages[-1].size == size and stages[0].strength == 1
    assert all(side % unit == 0 for stage in stages for side in stage.size)
    for small, large in pairwise(stages):
        for a, b in zip(small.size, large.size, strict=True):
            assert a < b <= 2 * a + unit or a == b == unit
    first = stages[0].size
    assert first[0] * first[1] <= (base * unit) ** 2 or min(first) < 2 * unit


def test_the_published_strengths_and_then_the_last_one() -> None:
    assert [s.strength for s in ladder((2048, 2048), 64, 64)] == [1, 0.4, 0.3, 0.2, 0.1, 0.1]


@pytest.mark.parametrize(("size", "message"), [((100, 64), "64 × 128 is the nearest"), ((0, 64), "64 × 64")])
def test_a_size_that_cannot_be_is_one_sentence(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladder(size, 64, 64)


# --- tiles --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(8, 50), st.integers(0, 20), st.integers(0, 2), st.sampled_from([1, 4, 8]))
def test_cores_make_up_the_axis_and_weights_sum_to_one(
    total: int, tile: int, margin: int, blend: int, factor: int
) -> None:
    found = spans(total, tile, margin, blend)
    assert [place for span in found for place in range(*span.core)] == list(range(total))
    sums = torch.zeros(total * factor)
    for span in found:
        start, stop, weights = span.weights(factor)
        assert span.start * factor <= start and stop <= span.stop * factor
        sums[start:stop] += weights
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_canvas_keeps_what_it_is_given() -> None:
    pixels = pipelines.noise(3, 20, 30).clamp(-1, 1)
    canvas = Canvas(20, 30)
    for row in spans(20, 8, 3, 2):
        for column in spans(30, 8, 3, 2):
            rows, columns = row.weights(1), column.weights(1)
            canvas.add(pixels[:, rows[0] : rows[1], columns[0] : columns[1]], rows, columns)
        canvas.finish(row.core[1] - row.blend[1])
    wanted = (pixels.permute(1, 2, 0) + 1) * 127.5
    assert (canvas.pixels - wanted).abs().max() <= 0.51


@pytest.mark.parametrize("whole_middle", [0, 10**6])
@torch.no_grad()
def test_exact_tiles_are_the_plain_autoencoder(whole_middle: int) -> None:
    vae = pipelines.make().vae
    if not whole_middle:  # a tile's middle sees its tile alone: exact only without attention
        vae.decoder.mid_block.attentions[0] = vae.encoder.mid_block.attentions[0] = None
    latents = latents_of(pipelines.make(), 40, 31)
    plain = vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0).clamp(-1, 1)
    tiling = Tiling(tile=12, margin=24, blend=2, exact=True, whole_middle=whole_middle)
    assert (decode(vae, latents, tiling) - (plain + 1) * 127.5).abs().max() < 0.51
    image = torch.randint(0, 256, (80, 62, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = (image / 127.5 - 1).permute(2, 0, 1)[None]
    wanted = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(encode(vae, image, tiling), wanted, rtol=1e-5, atol=1e-5)
    assert all(type(m) is nn.GroupNorm for m in vae.modules() if isinstance(m, nn.GroupNorm))


@torch.no_grad()
def test_an_overview_brings_tiles_nearer_to_the_whole() -> None:
    vae = pipelines.make().vae
    slope = torch.linspace(-2, 2, 48)  # an image whose corners differ: alone, every tile would be of middling tone
    latents = latents_of(pipelines.make(), 48, 48) * 0.3 + slope[:, None] + slope
    plain = (vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    errors = [
        float((decode(vae, latents, Tiling(tile=12, blend=2, overview=overview)) - plain).abs().mean())
        for overview in (0, 24)
    ]
    assert errors[1] < 0.5 * errors[0]


@torch.no_grad()
def test_what_is_not_finite_is_no_picture() -> None:
    vae, latents = pipelines.make().vae, latents_of(pipelines.make(), 16, 16)
    with pytest.raises(FloatingPointError, match="latents that are not finite"):
        decode(vae, latents.log(), Tiling(tile=12))
    vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="overflows in float16"):
        decode(vae, latents, Tiling(tile=12))


# --- savings ------------------------------------------------------------------------------------------------------


def predictions(pipe: Any, savings: tuple[str, ...], control: Control | None = None) -> Tensor:
    """One guided prediction in float64, with these savings."""
    from unet_adapters.highres.generate import _conditions

    positive, negative = _conditions(pipe, Request("abc", "de"))
    ids = {"time_ids": torch.tensor([[32.0, 48, 0, 0, 32, 48]])}
    sized = [{k: t.double() for k, t in {**c, **(ids if "pooled" in c else {})}.items()} for c in (positive, negative)]
    guide = Guide(sized[0], sized[1], 3.0, "guidance" in savings, control)
    with torch.no_grad(), save_memory(pipe.unet, savings, chunk_tokens=37):
        return guide.predict(pipe.unet.double(), latents_of(pipe, 16, 24).double(), torch.tensor(500))


@pytest.mark.parametrize("savings", [s for n in (1, 2, 4) for s in combinations(SAVINGS, n)], ids="+".join)
def test_savings_leave_the_result_as_it_is(pipe: Any, savings: tuple[str, ...]) -> None:
    before = pipelines.fingerprint(pipe.unet.double())
    plain = predictions(pipe, ())
    torch.testing.assert_close(predictions(pipe, savings), plain, rtol=1e-9, atol=1e-9)
    pipelines.assert_same_model(pipelines.fingerprint(pipe.unet), before)
    assert torch.equal(predictions(pipe, ()), plain)
    with MixerAdapter.build(pipe, "linfusion").mounted():
        torch.testing.assert_close(predictions(pipe, savings), predictions(pipe, ()), rtol=1e-9, atol=1e-9)


def test_savings_beside_a_controlnet() -> None:
    pipe = pipelines.make()
    network = pipelines.seeded(lambda: ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)))
    for block in network.controlnet_down_blocks:
        block.weight.data.normal_(std=0.1)
    control = Control(network.double(), pipelines.noise(1, 3, 32, 48).sigmoid())
    plain = predictions(pipe, (), control)
    assert not torch.allclose(plain, predictions(pipe, ()))
    torch.testing.assert_close(predictions(pipe, SAVINGS, control), plain, rtol=1e-9, atol=1e-9)


def test_savings_are_for_inference() -> None:
    pipe = pipelines.make()
    x, text = latents_of(pipe, 8, 8).requires_grad_(), torch.zeros(1, 3, pipe.unet.config.cross_attention_dim)
    for saving in ("activations", "feed_forward"):
        with save_memory(pipe.unet, [saving]), pytest.raises(RuntimeError, match="inference only"):
            pipe.unet(x, 5, text)
    with pytest.raises(ValueError, match="Unknown saving 'magic'"), save_memory(pipe.unet, ["magic"]):
        pass


# --- images -------------------------------------------------------------------------------------------------------


def test_one_stage_is_the_pipelines_own_image(pipe: Any) -> None:
    side = latent_unit(pipe) * 4
    result = generate(pipe, "abc", (side, side), base=side, seed=3, **SMALL)
    noise = torch.randn(1, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(3 * 1_000_003))
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "", "output_type": "pt"}
    theirs = pipe("abc", height=side, width=side, latents=noise, **settings).images[0]
    assert (result.pixels / 255 - theirs.permute(1, 2, 0)).abs().max() < 1 / 255


class Killed(Exception):
    pass


@pytest.mark.parametrize("enlarge", ["pixels", "latents"])
def test_a_run_that_was_killed_goes_on_after_its_last_stage(pipe: Any, tmp_path: Path, enlarge: str) -> None:
    size = (64, 96)
    asked = {"base": 32, "enlarge": enlarge, "residual": 3.0, "plan": plan_for(family_of(pipe), size), **SMALL}
    whole = generate(pipe, "abc", size, **asked)
    assert len(whole.stages) == 3

    def kill(what: str, done: int, total: int) -> None:
        if what == "96 × 64":
            raise Killed

    with pytest.raises(Killed):
        generate(pipe, "abc", size, keep=tmp_path, report=kill, **asked)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    again = generate(pipe, "abc", size, keep=tmp_path, **asked)
    assert again.resumed == 2 and torch.equal(again.pixels, whole.pixels)
    for path in tmp_path.iterdir():  # damaged: the stages are made again
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(generate(pipe, "abc", size, keep=tmp_path, **asked).pixels, whole.pixels)
    assert generate(pipe, "other", size, keep=tmp_path, **asked).resumed == 0
    with MixerAdapter.build(pipe, "linfusion").mounted():
        assert generate(pipe, "abc", size, keep=tmp_path, **asked).resumed == 0


def test_savings_and_tiles_give_the_same_image(pipe: Any) -> None:
    size, asked = (64, 64), {"base": 32, **SMALL}
    free = generate(pipe, "abc", size, plan=plan_for(family_of(pipe), size), **asked)
    plan = replace(free.plan, savings=SAVINGS, chunk_tokens=37)
    saved = generate(pipe, "abc", size, plan=plan, **asked)
    assert (saved.pixels.int() - free.pixels.int()).abs().max() <= 1


def test_a_given_image_is_enlarged_or_changed(tmp_path: Path) -> None:
    pipe = pipelines.make()
    given = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    larger = generate(pipe, "abc", (64, 64), image=given, base=32, **SMALL)
    assert [s.size for s in larger.stages] == [(32, 32), (64, 64)] and larger.pixels.shape == (64, 64, 3)
    changed = generate(pipe, "abc", (32, 32), image=given, strength=0.4, base=32, **SMALL)
    assert changed.stages[0].strength == 0.4 and changed.pixels.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="has 32 × 32 pixels already"):
        generate(pipe, "abc", (32, 32), image=given, **SMALL)
    with pytest.raises(ValueError, match="stage by stage"):
        generate(pipe, "abc", (64, 64), image=given, mode="direct", **SMALL)
    larger.save(tmp_path / "image.png", model="tiny")
    told = json.loads(Image.open(tmp_path / "image.png").text["mixers"])
    assert told["mode"] == "progressive" and told["prompt"] == "abc" and len(told["stages"]) == 2
    assert told["model"] == "tiny" and told["savings"] == ["activations"]


def test_kept_stages_of_another_image_are_not_taken(tmp_path: Path) -> None:
    pipe, asked = pipelines.make(), {"base": 32, "plan": plan_for(FAMILIES[0], (64, 64)), **SMALL}
    for seed, resumed in ((0, 0), (0, 2), (1, 0)):
        generator = torch.Generator().manual_seed(seed)
        given = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator).numpy())
        found = generate(pipe, "abc", (64, 64), image=given, keep=tmp_path, **asked)
        assert found.resumed == resumed and found.pixels.shape == (64, 64, 3)


def test_direct_and_dilated_images_differ_and_leave_no_trace(pipe: Any) -> None:
    before = [(m.dilation, m.padding) for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)]
    images = [generate(pipe, "abc", (64, 64), base=32, mode="direct", dilation=d, **SMALL).pixels for d in (1, 2)]
    assert not torch.equal(*images)
    assert before == [(m.dilation, m.padding) for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("option", [{"mode": "sideways"}, {"steps": 0}, {"enlarge": "words"}])
def test_a_request_that_cannot_be_is_one_sentence(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Request("abc", **option)


def test_a_part_of_the_schedule_is_its_end() -> None:
    scheduler = pipelines.make().scheduler
    whole, part = (Schedule.of(scheduler, 10, strength, torch.device("cpu")) for strength in (1.0, 0.3))
    assert torch.equal(part.timesteps, whole.timesteps[7:]) and len(whole.timesteps) == 10
    seen: list[int] = []
    pipe = pipelines.make()
    text = {"text": torch.zeros(1, 3, pipe.unet.config.cross_attention_dim)}
    denoise(pipe.unet, Guide(text, text), part, latents_of(pipe, 8, 8), torch.Generator(), lambda n, of: seen.append(n))
    assert seen == [0, 1, 2, 3]
