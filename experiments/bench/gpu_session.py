"""Everything of the benchmarks that needs a GPU, the most valuable first: the kernels' tests, then the measurements.

experiments/bench/gpu.sh [FOLDER] [--budget SECONDS] [--archive FILE.tar.gz] [--dry-run]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.bench.session import SessionStep, print_outcomes, run_session

MIXLAB_BENCH = ("-m", "experiments.cli", "bench", "--no-plots")
ON_GPU = ("--device", "cuda", "--dtype", "bfloat16", "--repeats", "5", "--budget", "{seconds}")
QUICK = ("--quick", "--budget", "6")
FAST = ("--against", "[!r]*")  # without the recurrent formulation, a loop over tokens
ONE_OPERATOR = ("--only", "non-causal, normalized*", *FAST)  # of a dry run whose first step measures all of them
KERNEL_TESTS = tuple(
    f"tests/mixers/test_{name}.py" for name in ("triton_noncausal", "triton_bidirectional", "operators", "bridges")
)
"""The files with tests that need a GPU: the others need time to collect, and packages that such a machine may lack."""

DEFAULT_BUDGET = 600.0


def benchmark_step(
    name: str, max_seconds: float, suite: tuple[str, ...], folder: str, dry_suite: tuple[str, ...] | None = None
) -> SessionStep:
    """Return a step that runs `mixlab bench`.

    Args:
        name: for the log.
        max_seconds: of the step.
        suite: the arguments of `mixlab bench` that say what is measured.
        folder: inside the results folder.
        dry_suite: the same for a dry run; None: as they are.
    """
    out = ("--out", f"{{out}}/{folder}")
    return SessionStep(
        name,
        max_seconds,
        (*MIXLAB_BENCH, *suite, *ON_GPU, *out),
        (*MIXLAB_BENCH, *(suite if dry_suite is None else dry_suite), *QUICK, *out),
    )


STEPS = (
    SessionStep(
        "tests of the kernels",
        120,
        ("-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", "-p", "no:cacheprovider", *KERNEL_TESTS),
        ("-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *KERNEL_TESTS),
        is_required=True,
    ),
    benchmark_step(
        "operators, heads of SD-1.5", 90, ("operators", "--heads", "8x40,8x160", *FAST), "sd15",
        ("operators", "--heads", "2x8", "--max-tokens", "64", *FAST),
    ),
    benchmark_step(
        "UNet of SD-1.5", 80,
        ("unet", "--profile", "sd15", "--min-tokens", "4096", "--size", "512", "--size", "1024", "--size", "2048"),
        "unet", ("unet", "--min-tokens", "64", "--size", "64"),
    ),
    benchmark_step(
        "operators, heads of SDXL", 70, ("operators", "--heads", "20x64", *FAST), "sdxl",
        ("operators", "--heads", "1x16", "--max-tokens", "64", *ONE_OPERATOR),
    ),
    benchmark_step("blocks", 40, ("layers",), "layers"),
    benchmark_step(
        "operators, batch 8, 16 heads of 64", 50,
        ("operators", "--heads", "16x64", "--batch", "8", "--max-tokens", "32768", *FAST), "b8",
        ("operators", "--heads", "2x8", "--batch", "2", "--max-tokens", "64", *ONE_OPERATOR),
    ),
    benchmark_step("crossover", 50, ("crossover", "--max-tokens", "16384"), "crossover", ("crossover",)),
    benchmark_step(
        "table of backends", 50, ("--calibrate", "--table", "{out}/backends.json", "--heads", "8x64"), "calibration",
        ("--calibrate", "--table", "{out}/backends.json", "--heads", "2x8"),
    ),
)  # fmt: skip
"""In order of value."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    description = (__doc__ or "").splitlines()[0]
    return run_gpu_command("gpu.sh", description, STEPS, Path("runs/gpu"), arguments)


def run_gpu_command(
    name: str, description: str, steps: Sequence[SessionStep], out: Path, arguments: list[str] | None
) -> int:
    """Parse the arguments of a script that measures on a GPU, and run its session.

    Args:
        name: of the script.
        description: for its help.
        steps: of the session.
        out: default folder of the results.
        arguments: of the script; None: those of the process.

    Returns:
        The exit code: 0 if every step succeeded, 1 if not, 2 without a GPU.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("out", type=Path, nargs="?", default=out, help="folder of the results")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for all steps")
    parser.add_argument("--archive", type=Path, help="a .tar.gz file that receives the folder after every step")
    parser.add_argument("--dry-run", action="store_true", help="run every step on the CPU at tiny sizes")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print(
            f"{name}: torch finds no GPU here, so nothing was run. Pass --dry-run to run on the CPU.", file=sys.stderr
        )
        return 2
    device = "CPU" if options.dry_run else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}", flush=True)
    outcomes = run_session(steps, options.out, options.budget, dry_run=options.dry_run, archive=options.archive)
    print_outcomes(outcomes)
    return 0 if all(outcome.status == "succeeded" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
