"""The cells of a run as tasks of a Ray cluster. Needs the extra `ray`, and `--out` on a disk that all nodes share."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from experiments.ablation import store
from experiments.ablation.spread import TRIES, Died, Record, Tell, Work, attempt, record_failure
from experiments.config import CellConfig
from experiments.core.files import read_json
from experiments.core.plugins import load_plugin


def on_ray(
    cells: Sequence[CellConfig], work: Work, tell: Tell, address: str, count: int | None = None
) -> Iterator[Record | None]:
    """A task for each cell: a GPU each where the cluster has some, else a core each.

    A cell whose process or node dies is tried again, once, from its last checkpoint. Every node needs this library,
    installed alike.

    Args:
        address: of the cluster, as `ray.init` takes it: "auto", "host:6379", "ray://host:10001", "local".
        count: cells at a time; None: as many as the cluster has room for.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: there is no cluster, or a node does not see the run's folder.
    """
    ray = _ray()
    connect(ray, address)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1, scheduling_strategy="SPREAD")(_do)
    waiting, running = deque(cells), dict[Any, CellConfig]()
    try:
        while waiting or running:
            while waiting and (count is None or len(running) < count):
                cell = waiting.popleft()
                running[task.remote(cell, work)] = cell
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                cell = running.pop(reference)
                yield _result(ray, reference, cell, work)
            for cell in running.values():
                progress = read_json(work.folder(cell) / store.PROGRESS)
                if progress:
                    tell(cell, progress["phase"], progress["done"], progress["total"])
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
            f"No Ray cluster at {address!r}: {error} Start one with `ray start --head`, or say `local`."
        ) from error


def _do(cell: CellConfig, work: Work) -> Record | None:
    """One cell, on whatever node this is."""
    if not (work.directory / "grid.json").is_file():
        raise ValueError(
            f"The node {socket.gethostname()} does not see {work.directory}: with --ray, --out has to lie on a disk "
            "that all nodes share."
        )
    for plugin in work.plugins:
        load_plugin(plugin)
    return attempt(cell, work, lambda *_: None)


def _result(ray: ModuleType, reference: Any, cell: CellConfig, work: Work) -> Record | None:
    """What a task gave; where its process died too often, the record of a failure."""
    try:
        record: Record | None = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # not of the cell, whose errors are in its record
        raise ValueError(str(error.cause)) from error
    except ray.exceptions.RayError as error:
        told = str(error).strip().splitlines()[0]
        return record_failure(cell, work.folder(cell), Died(f"its process or node died {TRIES} times: {told}"))
    return record


def _ray() -> ModuleType:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A cluster needs Ray, which is not installed: pip install 'linear-token-mixers[ray]'."
        ) from error
    return ray  # type: ignore[no-any-return]
