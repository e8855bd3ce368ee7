"""Which backend runs a call: named, or by the table; and how one learns why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixers import operators, plugins
from mixers.operators import LinearAttentionBackend, LinearAttentionCall, register_backend
from mixers.operators import backend as registry
from mixers.operators.backend import FORMULATIONS, registered_backends
from mixers.operators.backend_table import (
    DEFAULT_TABLE,
    TABLE_VARIABLE,
    BackendPreference,
    device_name,
    load_table,
    parse_row,
    save_table,
)

CPU = torch.device("cpu")
STREAMS = tuple(torch.rand(1, 5, 2, 3) for _ in range(3))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a table for this machine's CPU and makes it the one in force."""

    def write(*rows: BackendPreference) -> Path:
        path = tmp_path / "backends.json"
        save_table(path, device_name(CPU), rows)
        monkeypatch.setenv(TABLE_VARIABLE, str(path))
        return path

    return write


def used(**settings: Any) -> operators.BackendChoice:
    with operators.observe_backends() as choices:
        operators.linear_attention(*STREAMS, **settings)
    (choice,) = choices
    return choice


def test_observers_may_be_nested() -> None:
    with operators.observe_backends() as outer:
        with operators.observe_backends() as inner:
            pass  # both lists are empty, so they are equal
        operators.linear_attention(*STREAMS)
    assert len(outer) == 1 and not inner


@pytest.mark.usefixtures("own_registry")
def test_a_broken_plug_in_hides_no_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such symbol")

    def register() -> None:
        register_backend("sound")(type("Sound", (LinearAttentionBackend,), {}))

    installed = [SimpleNamespace(name=load.__name__, value="package", load=load) for load in (fail, register)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: installed)
    registry._load_plugins.cache_clear()
    try:
        with pytest.warns(UserWarning, match="'fail'.*its backends are missing: RuntimeError: no such symbol"):
            assert operators.backends()["sound"] == "available"
    finally:
        registry._load_plugins.cache_clear()


def test_without_a_table_a_cpu_runs_the_chunked_form() -> None:
    assert used() == operators.BackendChoice("linear", "noncausal", "chunked")


def test_a_named_backend_runs_whatever_the_table_says(table) -> None:
    table(BackendPreference("linear", "*", "*", (("dense", None),)))
    for name in FORMULATIONS:
        assert used(backend=name).backend == name


def test_the_table_decides_by_operator_causality_decay_and_length(table) -> None:
    table(
        BackendPreference("linear", "causal", "none", (("recurrent", 4), ("dense", None))),
        BackendPreference("linear", "*", "scalar", (("recurrent", 5),)),
        BackendPreference("scan", "*", "*", (("dense", None),)),
    )
    causal = used(causality="causal")
    assert causal.backend == "dense" and "beyond 4 tokens" in causal.refused["recurrent"]
    assert used(causality="bidirectional", log_decay=-torch.ones(2)).backend == "recurrent"
    assert used().backend == "chunked"


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the registry, so that a test may add backends."""
    copy = {operator: dict(registered) for operator, registered in registry._REGISTRY.items()}
    monkeypatch.setattr(registry, "_REGISTRY", copy)


@pytest.mark.usefixtures("own_registry")
def test_a_backend_that_refuses_is_skipped_and_its_reason_recorded(table) -> None:
    @register_backend("first")
    class Refusing(LinearAttentionBackend):
        """Computes nothing."""

        def refuses(self, call: LinearAttentionCall) -> str:
            return f"no head of {call.q.shape[-1]}"

    table(BackendPreference("linear", "*", "*", (("first", None), ("missing", None), ("dense", None))))
    choice = used()
    assert choice.backend == "dense"
    assert choice.refused["first"] == "no head of 3" and "no such backend" in choice.refused["missing"]
    with pytest.raises(ValueError, match="no head of 3"):
        used(backend="first")


OWN_BACKEND = """
from mixers.operators import LinearAttentionBackend, register_backend

@register_backend("twice")
class Twice(LinearAttentionBackend):
    def run(self, call):
        return 2 * call.v, None
"""


@pytest.mark.usefixtures("own_registry")
def test_a_backend_of_a_users_package_is_one_module() -> None:
    exec(OWN_BACKEND, {"__name__": "a_users_module"})
    assert torch.equal(operators.linear_attention(*STREAMS, backend="twice"), 2 * STREAMS[2])
    assert operators.backends()["twice"] == "available"
    with pytest.raises(ValueError, match="that name"):
        register_backend("twice")(type("Other", (LinearAttentionBackend,), {}))
    with pytest.raises(ValueError, match="expected a subclass of LinearAttentionBackend"):
        register_backend("no_backend")(int)  # type: ignore[type-var]


def test_rows_of_other_devices_are_kept(table) -> None:
    path = table(BackendPreference("linear", "*", "*", (("dense", 7),)))
    save_table(path, "another", [BackendPreference("scan", "causal", "vector", (("recurrent", None),))])
    assert load_table(path)[device_name(CPU)] == (BackendPreference("linear", "*", "*", (("dense", 7),)),)
    assert load_table(path)["another"][0].order == (("recurrent", None),)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2, "devices": {}}', '{"format": 1, "devices": {"a": [{}]}}'])
def test_a_damaged_table_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    with pytest.raises(ValueError, match="delete it, or write it again"):
        used()
    monkeypatch.setenv(TABLE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="which is no file"):
        used()


def test_every_row_of_the_default_table_names_registered_backends() -> None:
    for rows in DEFAULT_TABLE.values():
        for row in rows:
            assert {name for name, _ in row.order} <= set(registered_backends(row.operator)), row


def test_a_table_is_obeyed_in_a_compiled_graph_too(table) -> None:
    table(BackendPreference("linear", "*", "*", (("dense", None),)))
    run = torch.compile(lambda *t: operators.linear_attention(*t), fullgraph=True, backend="eager")
    with operators.observe_backends():
        torch.testing.assert_close(run(*STREAMS), operators.linear_attention(*STREAMS, backend="recurrent"))


@pytest.mark.usefixtures("own_registry")
def test_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "choose_a_backend.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "choose_a_backend.md", "exec"), names)
    printed = capsys.readouterr().out
    for expected in (
        "chunked: available",
        "backend='fla' cannot run",
        "linear noncausal ->",
    ):
        assert expected in printed
    row = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert parse_row(row) == BackendPreference("linear", "causal", "scalar", (("dense", 64), ("chunked", None)))
