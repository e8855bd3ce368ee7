"""The conformance suite, for the library's mixers and for yours.

from mixers.testing import check_mixer, parametrize_with_checks

check_mixer("linfusion", causality="causal")          # names of the checks; raises on a broken promise

@parametrize_with_checks(["my_mixer"])                 # pytest: one test per configuration and check
def test_my_mixer(mixer, check): check(mixer)
"""

from mixers.testing.checks import MIXER_CHECKS, MixerCheck, checks_for
from mixers.testing.inputs import CheckInputs
from mixers.testing.operator_cases import OPERATORS, OperatorCase
from mixers.testing.operator_checks import OPERATOR_CHECKS, check_operator
from mixers.testing.runner import (
    CheckOutcome,
    ConformanceCase,
    check_mixer,
    conformance_cases,
    parametrize_with_checks,
    run_checks,
)
from mixers.testing.tolerances import TOLERANCES, Tolerance

__all__ = [
    "MIXER_CHECKS",
    "OPERATORS",
    "OPERATOR_CHECKS",
    "TOLERANCES",
    "CheckInputs",
    "CheckOutcome",
    "ConformanceCase",
    "MixerCheck",
    "OperatorCase",
    "Tolerance",
    "check_mixer",
    "check_operator",
    "checks_for",
    "conformance_cases",
    "parametrize_with_checks",
    "run_checks",
]
