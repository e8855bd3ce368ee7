"""The cells of a run as tasks of a Ray cluster. Needs the extra `ray`, and `--out` on a disk that all nodes share."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from experiments.ablation.executors import (
    ATTEMPTS,
    CellProgressCallback,
    RunSettings,
    WorkerDied,
    attempt_cell,
    read_progress,
    record_failure,
)
from experiments.ablation.result import CellResult
from experiments.config import CellConfig
from experiments.core.plugins import load_plugin
from experiments.core.progress import ignore_progress


def run_on_ray(
    cells: Sequence[CellConfig],
    settings: RunSettings,
    progress: CellProgressCallback,
    address: str,
    count: int | None = None,
) -> Iterator[CellResult | None]:
    """Run every cell as a task with one GPU if the cluster has any, otherwise with one core.

    A cell whose process or node dies is tried again, once, from its last checkpoint. Every node needs this library in
    the same version.

    Args:
        cells: to run.
        settings: of the run.
        progress: called as (cell, phase, done, total).
        address: of the cluster, as `ray.init` takes it: "auto", "host:6379", "ray://host:10001", "local".
        count: cells at a time; None: as many as the cluster has room for.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: there is no cluster, or a node does not see the run's folder.
    """
    ray = _import_ray()
    connect(ray, address)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=ATTEMPTS - 1, scheduling_strategy="SPREAD")(_run_task)
    waiting = deque(cells)
    running = dict[Any, CellConfig]()
    try:
        while waiting or running:
            while waiting and (count is None or len(running) < count):
                cell = waiting.popleft()
                running[task.remote(cell, settings)] = cell
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                cell = running.pop(reference)
                yield _result(ray, reference, cell, settings)
            for cell in running.values():
                state = read_progress(settings.cell_folder(cell))
                if state:
                    progress(cell, state["phase"], state["done"], state["total"])
    finally:
        for reference in running:
            ray.cancel(reference)
        ray.shutdown()


def connect(ray: ModuleType, address: str) -> None:
    """Connect to a cluster.

    Raises:
        ValueError: there is none.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"No Ray cluster at {address!r}: {error} Start one with `ray start --head`, or use `local`."
        ) from error


def _run_task(cell: CellConfig, settings: RunSettings) -> CellResult | None:
    """Run one cell on this node."""
    if not (settings.directory / "grid.json").is_file():
        raise ValueError(
            f"The node {socket.gethostname()} does not see {settings.directory}: with --ray, --out must be on a disk "
            "that all nodes share."
        )
    for plugin in settings.plugins:
        load_plugin(plugin)
    return attempt_cell(cell, settings, ignore_progress)


def _result(ray: ModuleType, reference: Any, cell: CellConfig, settings: RunSettings) -> CellResult | None:
    """Return a task's result; if its process died too often, the record of a failure."""
    try:
        result: CellResult | None = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # an error of the task around the cell; a cell's own is in its result
        raise ValueError(str(error.cause)) from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        died = WorkerDied(f"its process or node died {ATTEMPTS} times: {reason}")
        return record_failure(cell, settings.cell_folder(cell), died)
    return result


def _import_ray() -> ModuleType:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A cluster needs Ray, which is not installed: pip install 'linear-token-mixers[ray]'."
        ) from error
    return ray  # type: ignore[no-any-return]
