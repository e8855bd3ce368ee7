"""Benchmarks: what is computed from times is right, a failure is recorded, and every verb runs."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.bench import baselines, calibrate
from experiments.bench.calibrate import LEAD, best
from experiments.bench.contest import Contest, Limits, Rates, Row, Work, exponents, growth, run_contest
from experiments.bench.contests import Setup, operator_contests
from experiments.bench.results import write
from experiments.cli import app
from experiments.core.memory import measure_peak_bytes
from experiments.core.timing import Quartiles
from mixers import operators
from mixers.operators.preference import VARIABLE, preferred


@given(st.floats(0.2, 3), st.floats(1e-6, 1), st.lists(st.integers(1, 20), min_size=2, max_size=6, unique=True))
def test_the_exponent_of_a_power_is_its_exponent(power: float, factor: float, logs: list[int]) -> None:
    points = [(2**n, factor * (2**n) ** power) for n in logs]
    assert growth(points) == pytest.approx(power, rel=1e-6)
    assert growth(points[:1]) is None


def test_exponents_are_of_the_upper_part() -> None:
    def row(size: int, seconds: float) -> Row:
        return Row("c", "a", size, Quartiles(seconds, seconds, seconds))

    rows = [row(64, 9.0), row(4096, 1.0), row(8192, 2.0), row(16384, 4.0), Row("c", "b", 4096, error="no")]
    assert exponents(rows) == {("c", "a"): pytest.approx(1.0)}


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_the_floor_is_the_slower_of_the_two_limits(moved: int, flops: int) -> None:
    rates = Rates(bandwidth=2e10, flops=1e11)
    assert Work(moved, flops).seconds(rates) == max(moved / 2e10, flops / 1e11)


def test_the_least_work_of_noncausal_attention() -> None:
    setup = Setup(batch=3, heads=((2, 8),), lengths=(5,))
    floors = [c.floor(5) for c in operator_contests(setup) if c.floor is not None]
    numbers = 3 * 5 * 2 * 8
    assert floors[0] == Work(4 * numbers * 4, 2 * 2 * numbers * 8)  # q, k, v, y; two products of multiply-adds
    assert floors[1] == Work(11 * numbers * 4, 6 * 2 * numbers * 8)


def test_a_contender_that_fails_is_recorded_and_the_others_go_on() -> None:
    def broken(size: int):  # type: ignore[no-untyped-def]
        raise RuntimeError("no kernel\nand more")

    def later(size: int):  # type: ignore[no-untyped-def]
        if size > 2:
            raise MemoryError
        return lambda: None

    contest = Contest(
        "c", {"ours": lambda size: lambda: None, "broken": broken, "later": later}, (2, 4), frozenset({"later"})
    )
    rows = run_contest(contest, None, Limits(repeats=1))
    assert {(r.contender, r.size): r.error for r in rows if r.error} == {
        ("broken", 2): "RuntimeError: no kernel",
        ("later", 4): "MemoryError: ",
    }
    assert [(r.contender, r.size) for r in rows if r.time] == [("ours", 2), ("later", 2), ("ours", 4)]
    assert list(rows[1].ratios) == ["later"] and not rows[2].ratios


def test_a_contender_that_fails_in_its_turn_is_recorded_too() -> None:
    calls = {"n": 0}

    def tired() -> None:
        calls["n"] += 1
        if calls["n"] > 4:
            raise MemoryError("out of memory")

    contest = Contest("c", {"ours": lambda size: lambda: None, "tired": lambda size: tired}, (2,))
    rows = run_contest(contest, None, Limits(repeats=5))
    assert [(r.contender, r.error) for r in rows] == [("tired", "MemoryError: out of memory"), ("ours", None)]


def test_slow_contenders_stop_climbing() -> None:
    contest = Contest("c", {"a": lambda size: lambda: sum(range(size))}, (10, 3 * 10**6, 4 * 10**6))
    rows = run_contest(contest, None, Limits(repeats=1, slow=1e-3))
    assert [row.size for row in rows] == [10, 3 * 10**6]


def test_records_tables_and_plots(tmp_path: Path) -> None:
    rows = [
        Row("c: d", "ours", 64, Quartiles(1.0, 0.9, 1.1), 2**20, 0.5, {"theirs": 2.0}),
        Row("c: d", "theirs", 64, Quartiles(2.0, 1.9, 2.1)),
        Row("c: d", "other", 64, error="ValueError: no"),
    ]
    page = write(rows, Rates(1e9, 1e9), {"device": "a machine"}, "mixlab bench x", tmp_path, "x")
    text = page.read_text()
    assert "a machine" in text and "| ours | 64 | 1,000.00 | 900.00 – 1,100.00 | 1.0 | 2.00 | theirs × 2.00 |" in text
    assert "failed: ValueError: no" in text and (tmp_path / "x-0.png").stat().st_size > 1000
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["rows"][0]["over_floor"] == 2.0 and record["command"] == "mixlab bench x"


def test_the_published_formula_is_ours_up_to_where_eps_is_added() -> None:
    q, k, v = (torch.randn(2, 37, 3, 8, dtype=torch.float64) for _ in range(3))
    ours = operators.linear_attention(q, k, v, feature_map="elu_plus_one", eps=1e-4, backend="dense")
    torch.testing.assert_close(baselines.published_linfusion(q, k, v), ours)


def test_peaks_see_what_is_allocated() -> None:
    peak = measure_peak_bytes(lambda: torch.ones(1 << 24).sum())
    assert peak is None or 60e6 < peak < 90e6


HOLES = """
import torch
from experiments.core.memory import _status_bytes, return_freed_memory
return_freed_memory()
del (first := [torch.ones(1 << 22)])[:]  # 16 MB: from here on, the C library by itself keeps what is smaller
before = _status_bytes("VmRSS")
blocks = [torch.ones(1 << 20) for _ in range(64)]
del blocks[:-1]
print(_status_bytes("VmRSS") - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_freed_memory_is_given_back() -> None:
    held = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True).stdout
    assert int(held) < 3 * 2**22  # one block of 64 is left


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), min_size=1, max_size=6))
def test_the_table_follows_the_fastest(times: list[tuple[float, float]]) -> None:
    timed = {4**i: {"chunked": a, "triton": b} for i, (a, b) in enumerate(times)}
    order = best(timed)
    bounds = [math.inf if bound is None else bound for _, bound in order]
    assert bounds == sorted(bounds) and bounds[-1] == math.inf
    for length, by_name in timed.items():
        chosen = next(name for name, bound in order if bound is None or length <= bound)
        assert by_name[chosen] <= min(by_name.values()) / LEAD
        assert chosen == "chunked" or by_name[chosen] <= LEAD * by_name["chunked"]


def test_the_dense_form_is_not_trusted_beyond_what_was_measured() -> None:
    assert best({16: {"dense": 1.0, "chunked": 2.0}}) == [("dense", 16), ("chunked", None)]


def test_calibration_writes_what_auto_then_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "time_backends", lambda setup, call, length, *_: {"chunked": length, "dense": 20.0})
    path, rows = calibrate.calibrate(Setup(heads=((2, 4),)), tmp_path / "table.json", (16, 64))
    monkeypatch.setenv(VARIABLE, str(path))
    assert len(rows) == 14 and preferred("linear", "cpu", "causal", "none") == (
        ("chunked", 32),
        ("dense", 64),
        ("chunked", None),
    )


@pytest.mark.parametrize("verb", ["layers", "growth", "unet"])
def test_every_verb_runs(verb: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", verb, "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / f"{verb}.json").read_text())["rows"]
    assert rows and any(row["time"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected a benchmark"),
        (["speed"], "No benchmark 'speed'"),
        (["operators", "--dtype", "int8"], "No dtype 'int8'"),
        (["operators", "--heads", "8"], "expected heads x width"),
        (["operators", "--device", "tpu"], "No device 'tpu'"),
        (["unet", "--profile", "none"], "No profile 'none'"),
        (["unet", "--mixer", "linfuson"], "linfusion"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
