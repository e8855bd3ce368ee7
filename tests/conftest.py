"""What every test gets: a fixed seed, one thread, hypothesis profiles, and GPU tests that skip aloud."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: nothing here may ask the network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels run on the CPU then

PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # a busy machine is no failure
# The same ten examples each time; `explore` draws others, and `deep` many.
settings.register_profile("default", derandomize=True, max_examples=10, **PATIENT)
settings.register_profile(
    "explore", derandomize=False, max_examples=20, print_blob=True, **PATIENT
)  # new examples each run
settings.register_profile("deep", derandomize=False, max_examples=1000, **PATIENT)
# `pytest --hypothesis-profile=deep` is applied after this and wins.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no GPU, with the reason in the summary."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Leave what exists by now, modules and test items, out of every later garbage collection.

    Walking through them takes a second, and everything that measures memory collects garbage before each call.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter take everything down in order; extension modules report as leaks what stays frozen."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Seed Python, NumPy and torch for each test and put their states back afterwards."""
    python = random.getstate()
    numpy = np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
