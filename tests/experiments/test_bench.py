"""Benchmarks: derived numbers are right, failures and budgets are recorded, and every suite runs."""

from __future__ import annotations

import gc
import io
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from experiments.bench import baselines, calibrate
from experiments.bench.benchmark import OUT_OF_BUDGET, Benchmark, BenchmarkLimits, Measurement, run_benchmark
from experiments.bench.calibrate import REQUIRED_SHARE, order_backends
from experiments.bench.config import BenchmarkConfig
from experiments.bench.operator_benchmarks import operator_benchmarks
from experiments.bench.plots import plot_times
from experiments.bench.roofline import Roofline, Workload
from experiments.bench.scaling import scaling_exponent, scaling_exponents
from experiments.bench.suites import run_suite
from experiments.bench.tables import BenchmarkConditions, plot_path, write_results
from experiments.cli import app
from experiments.core.memory import existing_objects_uncollected, measure_peak_bytes
from experiments.core.timing import Quartiles
from mixers import operators
from mixers.operators.backend_table import TABLE_VARIABLE, preferred_backends


@pytest.fixture(autouse=True, scope="module")
def only_new_objects_collected() -> Iterator[None]:
    """Every measured call collects garbage first, which takes 0.2 s with the objects of all imported modules."""
    with existing_objects_uncollected():
        yield


@given(st.floats(0.2, 3), st.floats(1e-6, 1), st.lists(st.integers(1, 20), min_size=2, max_size=6, unique=True))
def test_the_exponent_of_a_power_law_is_recovered(power: float, factor: float, logs: list[int]) -> None:
    points = [(2**n, factor * (2**n) ** power) for n in logs]
    assert scaling_exponent(points) == pytest.approx(power, rel=1e-6)
    assert scaling_exponent(points[:1]) is None


def test_exponents_are_fitted_from_4096_on() -> None:
    def measurement(size: int, seconds: float) -> Measurement:
        return Measurement("c", "a", size, Quartiles(seconds, seconds, seconds))

    measurements = [measurement(64, 9.0), measurement(4096, 1.0), measurement(8192, 2.0), measurement(16384, 4.0)]
    measurements.append(Measurement("c", "b", 4096, error="no"))
    assert scaling_exponents(measurements) == {("c", "a"): pytest.approx(1.0)}


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_the_roofline_is_the_slower_of_the_two_limits(bytes_moved: int, flops: int) -> None:
    roofline = Roofline(bytes_per_second=2e10, flops_per_second=1e11)
    assert roofline.seconds(Workload(bytes_moved, flops)) == max(bytes_moved / 2e10, flops / 1e11)


def test_the_least_work_of_noncausal_attention() -> None:
    config = BenchmarkConfig(batch=3, heads=((2, 8),), lengths=(5,))
    workloads = [b.workload(5) for b in operator_benchmarks(config) if b.workload is not None]
    numbers = 3 * 5 * 2 * 8
    assert workloads[0] == Workload(4 * numbers * 4, 2 * 2 * numbers * 8)  # q, k, v, y; two products of multiply-adds
    assert workloads[1] == Workload(11 * numbers * 4, 6 * 2 * numbers * 8)


def do_nothing(size: int) -> Callable[[], None]:
    return lambda: None


def test_an_implementation_that_fails_is_recorded_and_the_others_go_on() -> None:
    def broken(size: int) -> Callable[[], None]:
        raise RuntimeError("no kernel\nand more")

    def broken_later(size: int) -> Callable[[], None]:
        if size > 2:
            raise MemoryError
        return lambda: None

    implementations = {"ours": do_nothing, "broken": broken, "later": broken_later}
    benchmark = Benchmark("c", implementations, (2, 4), frozenset({"later"}))
    measurements = run_benchmark(benchmark, None, BenchmarkLimits(repeats=1))
    assert {(m.implementation, m.size): m.error for m in measurements if m.error} == {
        ("broken", 2): "RuntimeError: no kernel",
        ("later", 4): "MemoryError: ",
    }
    timed = [(m.implementation, m.size) for m in measurements if m.time]
    assert timed == [("ours", 2), ("later", 2), ("ours", 4)]
    assert list(measurements[1].speedups) == ["later"] and not measurements[2].speedups


def test_an_implementation_that_fails_while_it_is_timed_is_recorded_too() -> None:
    calls = 0

    def fail_after_four_calls() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise MemoryError("out of memory")

    benchmark = Benchmark("c", {"ours": do_nothing, "failing": lambda size: fail_after_four_calls}, (2,))
    measurements = run_benchmark(benchmark, None, BenchmarkLimits(repeats=5))
    assert [(m.implementation, m.error) for m in measurements] == [
        ("failing", "MemoryError: out of memory"),
        ("ours", None),
    ]


class FakeClock:
    """A clock that calls advance, so that budgets are tested without waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.longest_call = 0.0

    def __call__(self) -> float:
        return self.now

    def build(self, seconds_per_token: float, exponent: float) -> Callable[[int], Callable[[], None]]:
        """An implementation whose call takes seconds_per_token · size^exponent."""

        def build_call(size: int) -> Callable[[], None]:
            def run() -> None:
                seconds = seconds_per_token * size**exponent
                self.now += seconds
                self.longest_call = max(self.longest_call, seconds)

            return run

        return build_call


def test_slow_implementations_are_not_measured_at_larger_sizes() -> None:
    clock = FakeClock()
    benchmark = Benchmark("c", {"a": clock.build(1e-3, 1)}, (10, 3000, 4000))
    measurements = run_benchmark(benchmark, None, BenchmarkLimits(repeats=1), clock=clock)
    assert [m.size for m in measurements] == [10, 3000]


@given(
    st.lists(st.tuples(st.floats(1e-4, 1e-2), st.floats(1, 2)), min_size=1, max_size=4),
    st.floats(0.1, 1000),
)
def test_a_budget_is_exceeded_by_one_call_at_most(costs: list[tuple[float, float]], budget: float) -> None:
    clock = FakeClock()
    implementations = {str(i): clock.build(*cost) for i, cost in enumerate(costs)}
    benchmark = Benchmark("c", implementations, (64, 256, 1024), measures_growth=True)
    limits = BenchmarkLimits(repeats=7, budget_seconds=budget, deadline=budget)
    measurements = run_benchmark(benchmark, None, limits, clock=clock)
    assert clock.now <= budget + clock.longest_call
    for name in implementations:
        rows = [m for m in measurements if m.implementation == name]
        assert rows, "every implementation is measured, or there is a row that says why not"
        assert all(m.time is not None for m in rows[:-1])
        assert rows[-1].error == OUT_OF_BUDGET or rows[-1].size == 1024


def test_the_budget_of_a_suite_bounds_all_of_its_benchmarks(tmp_path: Path) -> None:
    """Where even trying every implementation once takes too long, the rest are rows, listed in one line."""
    clock = FakeClock()
    names = [f"benchmark {i}" for i in range(30)]
    benchmarks = [Benchmark(name, {k: clock.build(1 / 64, 1) for k in "abc"}, (64, 128)) for name in names]
    output = io.StringIO()
    console = Console(file=output, width=120)
    limits = BenchmarkLimits(repeats=1, budget_seconds=6.0)
    run_suite("trial", benchmarks, BenchmarkConfig(), limits, tmp_path, console, draw_plots=False, clock=clock)
    assert clock.now <= 6.0 + clock.longest_call
    rows = json.loads((tmp_path / "trial.json").read_text())["measurements"]
    assert {(row["benchmark"], row["implementation"]) for row in rows} == {(n, k) for n in names for k in "abc"}
    assert {row["error"] for row in rows if row["time"] is None} == {OUT_OF_BUDGET}
    (listed,) = [line for line in output.getvalue().splitlines() if line.startswith(OUT_OF_BUDGET)]
    assert all(name in listed for name in names if not any(r["benchmark"] == name and r["time"] for r in rows))


def test_nothing_is_called_if_building_it_takes_the_time() -> None:
    clock = FakeClock()

    def build_slowly(size: int) -> Callable[[], None]:
        clock.now += 100.0
        return lambda: pytest.fail("called after the deadline")

    limits = BenchmarkLimits(repeats=1, budget_seconds=6.0, deadline=6.0)
    (row,) = run_benchmark(Benchmark("c", {"slow": build_slowly}, (64, 128)), None, limits, clock=clock)
    assert row.error == OUT_OF_BUDGET


class Existing:
    """Something that the garbage collector tracks."""


def test_collections_inside_a_suite_leave_out_what_exists() -> None:
    existing = Existing()
    with existing_objects_uncollected():
        created = Existing()
        tracked = gc.get_objects()
        assert any(item is created for item in tracked) and not any(item is existing for item in tracked)


def test_tables_are_written_after_every_size(tmp_path: Path) -> None:
    """A run that is killed in its second benchmark keeps the first and the sizes that the second reached."""

    def interrupted(size: int) -> Callable[[], None]:
        if size > 2:
            raise KeyboardInterrupt
        return lambda: None

    benchmarks = [
        Benchmark("first", {"ours": do_nothing}, (2,)),
        Benchmark("second", {"ours": interrupted}, (2, 4)),
    ]
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run_suite(
            "trial",
            benchmarks,
            BenchmarkConfig(),
            BenchmarkLimits(repeats=1),
            tmp_path,
            Console(file=output, width=120),
        )
    rows = json.loads((tmp_path / "trial.json").read_text())["measurements"]
    assert [(row["benchmark"], row["size"]) for row in rows] == [("first", 2), ("second", 2)]
    page = (tmp_path / "trial.md").read_text()
    assert "## first" in page and "## second" in page
    assert "first" in output.getvalue(), "the first benchmark's table was printed when it ended"


def test_results_as_json_page_and_plot(tmp_path: Path) -> None:
    measurements = [
        Measurement("c: d", "ours", 64, Quartiles(1.0, 0.9, 1.1), 5, 2**20, 0.5, {"theirs": 2.0}),
        Measurement("c: d", "theirs", 64, Quartiles(2.0, 1.9, 2.1)),
        Measurement("c: d", "other", 64, error="ValueError: no"),
    ]
    conditions = BenchmarkConditions("mixlab bench x", {"device": "a machine"}, Roofline(1e9, 1e9))
    page = write_results(measurements, conditions, tmp_path, "x").read_text()
    plot_times(measurements, plot_path(tmp_path, "x", 0))
    assert "a machine" in page
    assert "| ours | 64 | 1,000.00 | 900.00 – 1,100.00 | 5 | 1.0 | 2.00 | theirs × 2.00 |" in page
    assert "ValueError: no" in page
    assert "(x-0.png)" in page and (tmp_path / "x-0.png").stat().st_size > 1000
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["measurements"][0]["times_roofline"] == 2.0 and record["command"] == "mixlab bench x"


def test_the_published_formula_equals_the_operator() -> None:
    q, k, v = (torch.randn(2, 37, 3, 8, dtype=torch.float64) for _ in range(3))
    ours = operators.linear_attention(q, k, v, feature_map="elu_plus_one", eps=1e-4, backend="dense")
    torch.testing.assert_close(baselines.published_linfusion(q, k, v), ours)


def test_the_peak_includes_what_is_allocated() -> None:
    peak = measure_peak_bytes(lambda: torch.ones(1 << 24).sum())
    assert peak is None or 60e6 < peak < 90e6


FRAGMENT_THE_HEAP = """
import torch
from experiments.core.memory import _status_bytes, return_freed_memory
return_freed_memory()
del (first := [torch.ones(1 << 22)])[:]  # 16 MB: from here on, the C library would keep smaller tensors
before = _status_bytes("VmRSS")
blocks = [torch.ones(1 << 20) for _ in range(64)]
del blocks[:-1]
print(_status_bytes("VmRSS") - before)
"""

KEEP_AND_RETURN = """
import torch
from experiments.core.memory import _status_bytes, keep_freed_memory
before = _status_bytes("VmRSS")
with keep_freed_memory():
    torch.ones(1 << 24)  # 64 MiB, freed at once
    kept = _status_bytes("VmRSS") - before
print(kept, _status_bytes("VmRSS") - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")


def run_script(script: str) -> list[int]:
    """Run a script in a process of its own, whose allocator no other test has changed; returns what it prints."""
    completed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return [int(word) for word in completed.stdout.split()]


@needs_glibc
def test_freed_memory_is_returned() -> None:
    (resident,) = run_script(FRAGMENT_THE_HEAP)
    assert resident < 3 * 2**22  # one block of 64 is left


@needs_glibc
def test_freed_memory_is_kept_inside_the_block_and_returned_after_it() -> None:
    during, after = run_script(KEEP_AND_RETURN)
    assert during > 60e6 and after < 20e6


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), min_size=1, max_size=6))
def test_the_table_follows_the_fastest_backend(times: list[tuple[float, float]]) -> None:
    times_by_length = {4**i: {"chunked": a, "triton": b} for i, (a, b) in enumerate(times)}
    order = order_backends(times_by_length)
    bounds = [math.inf if bound is None else bound for _, bound in order]
    assert bounds == sorted(bounds) and bounds[-1] == math.inf
    for length, by_name in times_by_length.items():
        first = next(name for name, bound in order if bound is None or length <= bound)
        assert by_name[first] <= min(by_name.values()) / REQUIRED_SHARE
        assert first == "chunked" or by_name[first] <= REQUIRED_SHARE * by_name["chunked"]


def test_calibration_ends_with_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of call that was not measured at every length gets no row."""
    clock = FakeClock()

    def take_two_seconds(config: BenchmarkConfig, kind: object, length: int, *_: object) -> dict[str, float]:
        clock.now += 2.0
        return {"chunked": 1.0}

    monkeypatch.setattr(calibrate, "time_backends", take_two_seconds)
    config = BenchmarkConfig(heads=((2, 4),))
    _, rows = calibrate.calibrate_backends(config, tmp_path / "table.json", (16, 64, 256), 9.0, clock=clock)
    assert len(rows) == 1 and clock.now == 10.0


def test_the_dense_form_is_not_used_beyond_what_was_measured() -> None:
    assert order_backends({16: {"dense": 1.0, "chunked": 2.0}}) == [("dense", 16), ("chunked", None)]


def test_calibration_writes_what_auto_then_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "time_backends", lambda config, kind, length, *_: {"chunked": length, "dense": 20.0})
    config = BenchmarkConfig(heads=((2, 4),))
    path, rows = calibrate.calibrate_backends(config, tmp_path / "table.json", (16, 64))
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    assert len(rows) == 18 and preferred_backends("linear", "cpu", "causal", "none") == (
        ("chunked", 32),
        ("dense", 64),
        ("chunked", None),
    )


@pytest.mark.parametrize("suite", ["layers", "growth", "unet"])
def test_every_suite_runs(suite: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", suite, "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / f"{suite}.json").read_text())["measurements"]
    assert rows and any(row["time"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected a benchmark"),
        (["speed"], "Unknown benchmark 'speed'"),
        (["operators", "--dtype", "int8"], "Unknown dtype 'int8'"),
        (["operators", "--heads", "8"], "expected number x width"),
        (["operators", "--heads", "0x8"], "expected number x width"),
        (["operators", "--heads", "8x-40"], "expected number x width"),
        (["operators", "--device", "cpu:1"], "Unknown device 'cpu:1'"),
        (["operators", "--device", "tpu"], "Unknown device 'tpu'"),
        (["unet", "--profile", "none"], "Unknown profile 'none'"),
        (["unet", "--mixer", "linfuson"], "linfusion"),
    ],
)
def test_invalid_options_are_one_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
