"""Which backend runs a call: named, or by the table; and how one learns why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixers import operators
from mixers.operators import choice, linear
from mixers.operators.selection import FORMULATIONS, Problem, choose
from mixers.operators.backend_table import DEFAULT, VARIABLE, Row, _read, device_name, load_table, save_table

CPU = torch.device("cpu")
STREAMS = tuple(torch.rand(1, 5, 2, 3) for _ in range(3))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a table for this machine's CPU and makes it the one in force."""

    def write(*rows: Row) -> Path:
        path = tmp_path / "backends.json"
        save_table(path, device_name(CPU), rows)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return write


def used(**settings: Any) -> operators.BackendChoice:
    with operators.observe_backends() as seen:
        operators.linear_attention(*STREAMS, **settings)
    (choice,) = seen
    return choice


def test_without_a_table_a_cpu_runs_the_chunked_form() -> None:
    assert used() == operators.BackendChoice("linear", "noncausal", "chunked")


def test_a_named_backend_runs_whatever_the_table_says(table) -> None:
    table(Row("linear", "*", "*", (("dense", None),)))
    for name in FORMULATIONS:
        assert used(backend=name).backend == name


def test_the_table_decides_by_operator_causality_decay_and_length(table) -> None:
    table(
        Row("linear", "causal", "none", (("recurrent", 4), ("dense", None))),
        Row("linear", "*", "scalar", (("recurrent", 5),)),
        Row("scan", "*", "*", (("dense", None),)),
    )
    causal = used(causality="causal")
    assert causal.backend == "dense" and "beyond 4 tokens" in causal.refused["recurrent"]
    assert used(causality="bidirectional", log_decay=-torch.ones(2)).backend == "recurrent"
    assert used().backend == "chunked"


def test_what_refuses_is_passed_over_and_the_reason_kept(table, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Row("linear", "*", "*", (("triton", None), ("fla", None), ("dense", None))))
    monkeypatch.setattr(choice, "unavailable", lambda backend, device: None)  # as if all were installed

    class Refusing:
        @staticmethod
        def refuses(problem: Problem) -> str:
            return f"no head of {problem.tensors['q'].shape[-1]}"

    implemented = {**linear._BACKENDS, "triton": Refusing, "fla": Refusing}
    tensors = dict(zip("qkv", STREAMS, strict=True))
    with operators.observe_backends() as seen:
        assert choose(implemented, "auto", Problem("linear", tensors, "causal")) is implemented["dense"]
    assert seen[0].refused == {"triton": "no head of 3", "fla": "no head of 3"}
    with pytest.raises(ValueError, match="no head of 3"):
        choose(implemented, "fla", Problem("linear", tensors, "causal"))


def test_rows_of_other_devices_are_kept(table) -> None:
    path = table(Row("linear", "*", "*", (("dense", 7),)))
    save_table(path, "another", [Row("scan", "causal", "vector", (("recurrent", None),))])
    assert load_table(path)[device_name(CPU)] == (Row("linear", "*", "*", (("dense", 7),)),)
    assert load_table(path)["another"][0].order == (("recurrent", None),)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2, "devices": {}}', '{"format": 1, "devices": {"a": [{}]}}'])
def test_a_damaged_table_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ValueError, match="delete it, or write it again"):
        used()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="which is no file"):
        used()


def test_every_default_row_names_what_exists() -> None:
    implemented = {"linear": linear._BACKENDS, "scan": operators.scan._BACKENDS, "delta": operators.delta._BACKENDS}
    for rows in DEFAULT.values():
        for row in rows:
            assert {name for name, _ in row.order} <= set(implemented[row.operator]), row


def test_a_table_is_obeyed_in_a_compiled_graph_too(table) -> None:
    table(Row("linear", "*", "*", (("dense", None),)))
    run = torch.compile(lambda *t: operators.linear_attention(*t), fullgraph=True, backend="eager")
    with operators.observe_backends():
        torch.testing.assert_close(run(*STREAMS), operators.linear_attention(*STREAMS, backend="recurrent"))


def test_the_page_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "choose_a_backend.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "choose_a_backend.md", "exec"), names)
    told = capsys.readouterr().out
    assert "chunked: available" in told and "backend='fla' cannot run" in told and "linear noncausal ->" in told
    row = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert _read(row) == Row("linear", "causal", "scalar", (("dense", 64), ("chunked", None)))
