"""The crossover is computed correctly, the stock path runs below `min_tokens`, and the pages about it run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.bench import attention_layer
from experiments.bench.attention_layer import (
    STOCK,
    AttentionLayerTimer,
    MixerCannotRun,
    SiteShape,
    TimeIsUp,
    choose_site_shapes,
    site_shapes,
)
from experiments.bench.crossover import (
    CrossoverCurve,
    CrossoverPoint,
    CrossoverResult,
    doubling_lengths,
    find_crossover,
    measure_crossovers,
    measure_curves,
)
from experiments.bench.crossover_report import plot_crossovers, print_crossovers
from experiments.cli import app
from experiments.core.timing import Quartiles, time_calls, time_interleaved
from experiments.teacher.load import EMBEDDED
from unet_adapters import MixerAdapter

ROOT = Path(__file__).resolve().parents[2]
NARROW = SiteShape(64, 2)
WIDE = SiteShape(128, 4)
LENGTHS = doubling_lengths(65536)


# --- the finder ---------------------------------------------------------------------------------------------------


@given(st.floats(65, 60000), st.floats(0.2, 2))
def test_a_power_law_crosses_where_it_crosses(true: float, slope: float) -> None:
    ratios = [(tokens, (true / tokens) ** slope) for tokens in LENGTHS]
    assert find_crossover(ratios) == pytest.approx(true, rel=1e-6)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=11))
def test_it_lies_between_the_last_loss_and_the_next_step(values: list[float]) -> None:
    ratios = list(zip(LENGTHS, values, strict=False))
    crossover = find_crossover(ratios)
    losses = [tokens for tokens, ratio in ratios if ratio > 1]
    if not losses:
        assert crossover == LENGTHS[0]
    elif losses[-1] == ratios[-1][0]:
        assert crossover is None
    else:
        assert crossover is not None and losses[-1] <= crossover <= 2 * losses[-1]


@given(st.lists(st.floats(1.0001, 100), min_size=1, max_size=11))
def test_a_mixer_that_never_wins_has_no_crossover(values: list[float]) -> None:
    assert find_crossover(list(zip(LENGTHS, values, strict=False))) is None


def test_one_loss_after_wins_counts() -> None:
    values = [2.0, 0.5, 0.5, 1.02, 0.5, 0.25]
    crossover = find_crossover(list(zip(LENGTHS, values, strict=False)))
    assert crossover is not None and 512 <= crossover < 1024
    assert find_crossover(list(zip(LENGTHS, [*values, 1.001], strict=False))) is None


@pytest.mark.parametrize(("ratios", "crossover"), [([], None), ([(64, 1.0)], 64), ([(64, 2.0), (128, 1.0)], 128)])
def test_edges(ratios: list[tuple[int, float]], crossover: float | None) -> None:
    assert find_crossover(ratios) == crossover


# --- curves, with known costs -------------------------------------------------------------------------------------


def costs(quadratic: dict[SiteShape, float], linear: dict[str, float]) -> Callable[..., dict[str, list[float]]]:
    """A `TimeLayers` with stock = a l² and mixer = b l seconds: they cross at b / a."""

    def measure(shape: SiteShape, tokens: int, names: Sequence[str]) -> dict[str, list[float]]:
        seconds = {STOCK: quadratic[shape] * tokens**2, **{name: linear[name] * tokens for name in names}}
        return {name: [value * noise for noise in (1.0, 1.1, 0.9)] for name, value in seconds.items()}

    return measure


def test_min_tokens_is_the_largest_over_sites_rounded_up() -> None:
    measure = costs({NARROW: 1e-8, WIDE: 1e-9}, {"quick": 3e-7, "slow": 1e-3})
    curves = measure_curves(["quick", "slow"], [NARROW, WIDE], doubling_lengths(4096), measure)
    quick = [curve.crossover for curve in curves if curve.mixer == "quick"]
    assert quick == pytest.approx([64, 300]) and [c.fast_from for c in curves[:2]] == [64, 512]
    assert CrossoverResult({}, curves).min_tokens == {"quick": 512, "slow": None}


def test_measuring_stops_when_softmax_is_slow_and_drops_slow_mixers() -> None:
    measure = costs({NARROW: 1e-6}, {"quick": 1e-4, "slow": 1e-2})
    quick, slow = measure_curves(["quick", "slow"], [NARROW], LENGTHS, measure, slow_seconds=2.0)
    assert [p.tokens for p in quick.points] == [64, 128, 256, 512, 1024, 2048]  # 2048: four seconds, the last
    assert quick.note is None and slow.note is not None and "not measured beyond" in slow.note
    assert [p.tokens for p in slow.points] == [64, 128, 256]
    assert slow.crossover is None


def test_the_budget_ends_the_measurement_with_a_note() -> None:
    now = [0.0]

    def measure(shape: SiteShape, tokens: int, names: Sequence[str]) -> dict[str, list[float]]:
        now[0] += 1.0
        return {name: [1.0] for name in (STOCK, *names)}

    lengths = doubling_lengths(1024)
    narrow, wide = measure_curves(["quick"], [NARROW, WIDE], lengths, measure, budget_seconds=2.5, clock=lambda: now[0])
    assert [p.tokens for p in narrow.points] == [64, 128, 256] and not wide.points
    assert narrow.note == "not measured from 512 tokens on: the time budget is spent"
    assert wide.note == "not measured from 64 tokens on: the time budget is spent"


@pytest.mark.parametrize(("seconds", "turns"), [(6.0, 0), (11.0, 1), (13.0, 2), (100.0, 5)])
def test_a_site_is_timed_in_the_time_left(seconds: float, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a second; stock attention and two mixers are tried, warmed up, and timed in turns."""
    now = [0.0]

    def call(*_: object) -> None:
        now[0] += 1.0

    monkeypatch.setattr(attention_layer, "call_layer", call)
    timer = AttentionLayerTimer(torch.float32, "cpu", 5, deadline=seconds, clock=lambda: now[0])
    names = ["linear_attention", "identity"]
    if turns:
        times = timer(NARROW, 64, names)
        assert {name: len(values) for name, values in times.items()} == dict.fromkeys((STOCK, *names), turns)
    else:
        with pytest.raises(TimeIsUp):
            timer(NARROW, 64, names)
    assert now[0] <= seconds


def test_a_mixer_that_cannot_run_leaves_the_others_alone() -> None:
    sound = costs({NARROW: 1e-8}, {"quick": 1e-6, "broken": 1e-6})

    def measure(shape: SiteShape, tokens: int, names: Sequence[str]) -> dict[str, list[float]]:
        if "broken" in names and tokens > 64:
            raise MixerCannotRun("broken", ValueError("too long"))
        return sound(shape, tokens, names)

    broken, quick = measure_curves(["broken", "quick"], [NARROW], doubling_lengths(256), measure)
    assert len(quick.points) == 3 and quick.note is None
    assert len(broken.points) == 1 and broken.note == "cannot run with 128 tokens: ValueError: too long"


def test_the_ratio_is_of_the_same_turns() -> None:
    """A machine that is three times slower for a while changes no ratio."""

    def measure(shape: SiteShape, tokens: int, names: Sequence[str]) -> dict[str, list[float]]:
        return {STOCK: [1.0, 3.0, 1.0], **{name: [0.5, 1.5, 0.5] for name in names}}

    (curve,) = measure_curves(["quick"], [NARROW], [64], measure, slow_seconds=10)
    assert curve.points == (CrossoverPoint(64, Quartiles(1.0, 1.0, 2.0), Quartiles(0.5, 0.5, 1.0), 0.5),)


# --- timing -------------------------------------------------------------------------------------------------------


def test_turns_interleave_and_short_calls_are_repeated() -> None:
    now = [0.0]
    order = []

    def work(name: str, cost: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += cost
            order.append(name)

        return run

    times = time_interleaved({"a": work("a", 4.0), "b": work("b", 1.0)}, 2, 1, min_seconds=2.0, clock=lambda: now[0])
    assert times == {"a": [4.0, 4.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", *2 * ["a", "b", "b"]]
    limited = time_interleaved({"a": work("a", 4.0)}, 9, 1, max_seconds=5.0, clock=lambda: now[0])
    assert limited == {"a": [4.0] * 3}
    assert time_calls(work("a", 4.0), 3, clock=lambda: now[0]) == 4.0
    with pytest.raises(ValueError, match="repeats=0"):
        time_interleaved({}, 0)


def test_quartiles() -> None:
    assert Quartiles.from_times([5.0]) == Quartiles(5.0, 5.0, 5.0)
    assert Quartiles.from_times([1.0, 2.0, 3.0]) == Quartiles(2.0, 1.5, 2.5)


def test_what_is_timed_is_the_stock_layer_and_the_mounted_one() -> None:
    timer = AttentionLayerTimer(torch.float32, "cpu", 1)
    stock = timer.layer(NARROW, STOCK)
    mounted = timer.layer(NARROW, "linear_attention")
    assert not hasattr(stock, "mixer") and mounted.mixer.dim == NARROW.dim
    assert stock.to_q.weight is mounted.to_q.weight
    with pytest.raises(MixerCannotRun, match="nothing"):
        timer.layer(NARROW, "nothing")


def test_every_mixer_is_measured() -> None:
    result = measure_crossovers("*", [NARROW], max_tokens=128, repeats=1)
    assert len(result.curves) > 5
    assert {len(curve.points): curve.note for curve in result.curves} == {2: None}


# --- the promise: below min_tokens the stock path runs ------------------------------------------------------------


def test_below_min_tokens_softmax_runs_and_from_it_on_the_mixer(monkeypatch) -> None:
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet").eval()
    adapter = MixerAdapter.build(unet, "linfusion", min_tokens=256)
    mixed: list[str] = []
    for name, mixer in adapter.mixers.items():
        mixer.register_forward_hook(lambda *_, name=name: mixed.append(name))
    softmax = _count_self_attention(monkeypatch)
    expected = {4: (0, 14), 8: (0, 14), 16: (6, 8), 32: (14, 0)}  # latent side -> sites with the mixer, with softmax
    for side, (mixers, stock) in (*expected.items(), *reversed(expected.items())):
        mixed.clear()
        softmax.clear()
        x = torch.randn(1, 8, side, side)
        words = torch.randn(1, 20, 128)
        with torch.no_grad():
            teacher = unet(x, 500, words).sample
            assert len(softmax) == 14 and not mixed
            softmax.clear()
            with adapter.mounted():
                student = unet(x, 500, words).sample
        assert (len(mixed), len(softmax)) == (mixers, stock), side
        assert torch.equal(student, teacher) == (mixers == 0), side


def _count_self_attention(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lists every call of the stock processor with self-attention."""
    calls: list[int] = []
    stock = AttnProcessor2_0.__call__

    def call(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is None:
            calls.append(1)
        return stock(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    monkeypatch.setattr(AttnProcessor2_0, "__call__", call)
    return calls


# --- the command --------------------------------------------------------------------------------------------------


def test_site_shapes() -> None:
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet")
    assert choose_site_shapes() == site_shapes(unet) == (NARROW, WIDE)
    assert choose_site_shapes(dim=320, heads=8) == (SiteShape(320, 8),)
    assert [shape.dim for shape in choose_site_shapes("sd15")] == [320, 640, 1280]


def test_the_command_writes_results_a_figure_and_the_line_to_copy(tmp_path: Path) -> None:
    arguments = ["crossover", "linear_attention", "--max-tokens", "128", "--repeats", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "crossover.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "crossover.json").read_text())
    assert {"device", "threads", "torch", "dtype", "batch"} <= set(record["machine"])
    assert [[p["tokens"] for p in curve["points"]] for curve in record["curves"]] == [[64, 128]] * 2
    least = record["min_tokens"]["linear_attention"]
    copied = f'MixerAdapter.build(pipe, "linear_attention", min_tokens={least})'
    assert (copied if least else "# linear_attention: no win up to 128 tokens, ") in result.output
    table = [line for line in result.output.splitlines() if line[:1] in "┏┃│└"]
    assert table and max(map(len, table)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing*"], "No linear mixer matches 'nothing*'"),
        (["softmax"], "No linear mixer matches 'softmax'"),
        (["--dim", "320"], "both a dim and heads"),
        (["--dim", "320", "--heads", "7"], "Cannot split a width of 320 into 7 heads"),
        (["--max-tokens", "64"], "max_tokens=64"),
        (["--profile", "sd99"], "expected one of embedded, sd15"),
        (["--dtype", "int8"], "expected one of float32, bfloat16, float16"),
        (["--device", "tpu"], "expected one of cpu, cuda"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["crossover", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line() -> None:
    result = CliRunner().invoke(app, ["crossover", "--device", "cuda"])
    assert result.exit_code == 2 and "torch finds no GPU here" in result.output


def test_reports_of_mixers_that_win_lose_and_cannot_run(tmp_path: Path) -> None:
    """A table, a figure and lines for mixers that win, lose and cannot be built."""
    from rich.console import Console

    fine = measure_curves(["quick"], [NARROW], doubling_lengths(1024), costs({NARROW: 1e-8}, {"quick": 3e-6}))
    bad = CrossoverCurve("broken", NARROW, (), "cannot run with 64 tokens: ValueError: no")
    result = CrossoverResult(
        {"device": "a CPU", "threads": 1, "torch": "2", "dtype": "float32", "batch": 2}, (*fine, bad)
    )
    plot_crossovers(result, tmp_path / "figure.png")
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w"))
    print_crossovers(result, console)
    text = console.export_text()
    assert 'MixerAdapter.build(pipe, "quick", min_tokens=512)' in text and "300" in text
    assert "broken (dim 64, heads 2): cannot run with 64 tokens: ValueError: no" in text
    assert max(map(len, text.splitlines())) <= 80


# --- the pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["mount_a_mixer.md", "hybrids.md"])
def test_the_page_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    text = (ROOT / "docs" / "howto" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, (code, expected) in enumerate(blocks):
        capsys.readouterr()
        exec(compile(code, f"{page}, block {number + 1}", "exec"), names)
        if expected or "print(" in code:
            assert capsys.readouterr().out == expected
    assert all(math.isfinite(v) for v in names.get("milliseconds", {}).values())  # type: ignore[attr-defined]
