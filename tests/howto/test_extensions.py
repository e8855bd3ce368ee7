"""The pages on adding a metric, an objective, a backend and a host, each one file outside the repository."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from experiments.core.plugins import load_plugin
from experiments.core.registries import OBJECTIVES
from mixers.operators import backend
from tests.howto.pages import (
    HOWTO,
    SMALL_LOCAL_STAGE,
    SMALL_RUN,
    as_options,
    assert_printed,
    assert_runs_here,
    blocks,
    run_python_blocks,
)
from unet_adapters.hosts import base as hosts

BACKEND = HOWTO / "add_a_backend.md"
HOST = HOWTO / "add_a_host.md"
METRIC = HOWTO / "add_a_metric.md"
OBJECTIVE = HOWTO / "add_an_objective.md"
SMALL_DISTILLATION = ("fit.steps=2", "fit.batch_size=2", "images=4", "before=[]")


def test_a_metric_is_listed(folder: Path) -> None:
    (folder / "detail.py").write_text(blocks(METRIC, "python")[0], encoding="utf-8")
    assert_printed(assert_runs_here(blocks(METRIC, "bash")[0]), blocks(METRIC, "text")[0])


@pytest.mark.slow  # cells of an ablation
def test_a_metric_is_measured_and_reported(folder: Path, tiny_teacher: Path) -> None:
    """The metric is settable, measured, and in the report, without a change of the library."""
    (folder / "detail.py").write_text(blocks(METRIC, "python")[0], encoding="utf-8")
    settings = as_options((f"teacher={tiny_teacher}", *SMALL_RUN, *SMALL_LOCAL_STAGE))
    assert_runs_here(f"{blocks(METRIC, 'bash')[1].strip()} --only 'softmax*' {settings}")
    report = folder / "runs" / "detail" / "report"
    assert "## Error of detail" in (report / "report.md").read_text(encoding="utf-8")
    with (report / "results.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "detail"]
    assert {(row["size"], row["timestep"]) for row in rows} == {("64", "900"), ("128", "900")}
    assert {row["relative_error"] for row in rows if row["variant"] == "softmax"} == {"0.0"}
    assert_runs_here("mixlab report runs/detail")
    html = (report / "index.html").read_text(encoding="utf-8")
    assert "rows of the metric &#39;detail&#39; are not reported" in html


def test_an_objective_is_checked_and_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registered in ("_items", "_origins"):  # so that the objective is gone after this test
        monkeypatch.setattr(OBJECTIVES, registered, dict(getattr(OBJECTIVES, registered)))
    (folder / "huber.py").write_text(blocks(OBJECTIVE, "python")[0], encoding="utf-8")
    assert "huber: " in assert_runs_here(blocks(OBJECTIVE, "bash")[0])
    monkeypatch.syspath_prepend(folder)
    run_python_blocks(OBJECTIVE)


@pytest.mark.slow  # a start of mixlab and a short distillation
def test_an_objective_is_trained_with(folder: Path, tiny_teacher: Path) -> None:
    (folder / "huber.py").write_text(blocks(OBJECTIVE, "python")[0], encoding="utf-8")
    settings = [f"teacher={tiny_teacher}", *(f"distillation.{setting}" for setting in SMALL_DISTILLATION)]
    command = blocks(OBJECTIVE, "bash")[1].replace("\\\n", "").strip()
    assert_runs_here(f"{command} {as_options(settings)}")
    assert "huber" in (folder / "runs" / "huber" / "card.md").read_text(encoding="utf-8")


def test_a_backend_is_checked_and_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {operator: dict(backends) for operator, backends in backend._REGISTRY.items()}
    monkeypatch.setattr(backend, "_REGISTRY", registered)  # so that the backend is gone after this test
    run_python_blocks(BACKEND)


@pytest.mark.slow  # a start of mixlab and a benchmark
def test_a_backend_is_benchmarked(folder: Path) -> None:
    (folder / "two_products.py").write_text(blocks(BACKEND, "python")[0], encoding="utf-8")
    assert_runs_here(blocks(BACKEND, "bash")[0])
    assert "| two_products | 64 |" in (folder / "runs" / "bench" / "operators.md").read_text(encoding="utf-8")


def test_a_host_mounts_saves_and_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_HOSTS", dict(hosts._HOSTS))  # so that the host is gone after this test
    (folder / "dit_host.py").write_text(blocks(HOST, "python")[0], encoding="utf-8")
    assert load_plugin(folder / "dit_host.py") == ["host dit"]
    hosts._HOSTS.pop("dit")
    run_python_blocks(HOST)
    assert (folder / "dit-adapter" / "adapter.json").is_file()
