"""Every operator keeps its contract, at fixed inputs and at any."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings

from mixers.testing import OPERATOR_CHECKS, OPERATORS, CheckInputs, OperatorCase, check_operator
from mixers.testing.strategies import inputs


@pytest.mark.parametrize("check", OPERATOR_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("case", OPERATORS.values(), ids=str)
def test_operators(case: OperatorCase, check: Callable[[OperatorCase, CheckInputs], None]) -> None:
    check(case, CheckInputs((1, 2, 63, 64, 65, 200), batch=1))


@pytest.mark.parametrize("check", OPERATOR_CHECKS[:5], ids=lambda c: c.__name__)
@pytest.mark.parametrize("case", OPERATORS.values(), ids=str)
@settings(max_examples=max(1, settings.default.max_examples // 2))
@given(drawn=inputs())
def test_operators_for_any_input(
    case: OperatorCase, check: Callable[[OperatorCase, CheckInputs], None], drawn: CheckInputs
) -> None:
    check(case, drawn)


def test_one_call_runs_them_all() -> None:
    name = next(iter(OPERATORS))
    assert check_operator(name, CheckInputs((5,))) == [check.__name__ for check in OPERATOR_CHECKS]
