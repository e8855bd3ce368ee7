"""Every operator keeps its contract, at fixed inputs and at any."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings

from mixers.testing import OPERATOR_CHECKS, OPERATORS, CheckInputs, OperatorCase, check_operator, operator_checks
from mixers.testing.strategies import inputs


@pytest.mark.parametrize("check", OPERATOR_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("case", OPERATORS.values(), ids=str)
def test_operators(case: OperatorCase, check: Callable[[OperatorCase, CheckInputs], None]) -> None:
    check(case, CheckInputs((1, 2, 31, 32, 33, 70), batch=1))


FOR_ANY_INPUT = (
    operator_checks.check_formulations_agree,
    operator_checks.check_equals_its_matrix,
    operator_checks.check_streaming_equals_one_pass,
    operator_checks.check_never_looks_ahead,
)


@pytest.mark.parametrize("check", FOR_ANY_INPUT, ids=lambda c: c.__name__)
@pytest.mark.parametrize("case", OPERATORS.values(), ids=str)
@settings(max_examples=max(1, settings.default.max_examples // 2))
@given(any_inputs=inputs())
def test_operators_for_any_input(
    case: OperatorCase, check: Callable[[OperatorCase, CheckInputs], None], any_inputs: CheckInputs
) -> None:
    check(case, any_inputs)


def test_one_call_runs_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def check_nothing(case: OperatorCase, inputs: CheckInputs) -> None:
        calls.append((case, inputs))

    monkeypatch.setattr(operator_checks, "OPERATOR_CHECKS", (check_nothing, check_nothing))
    inputs = CheckInputs((5,))
    assert check_operator("linear_attention", inputs) == ["check_nothing", "check_nothing"]
    assert calls == [(OPERATORS["linear_attention"], inputs)] * 2
