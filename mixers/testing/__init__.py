"""The conformance suite, for our mixers and for yours.

from mixers.testing import check_mixer, parametrize_with_checks

check_mixer("linfusion", causality="causal")          # names of the checks; raises on a broken promise

@parametrize_with_checks(["my_mixer"])                 # pytest: one test per configuration and check
def test_my_mixer(mixer, check): check(mixer)
"""

from mixers.testing.checks import CHECKS, Check, checks_for
from mixers.testing.inputs import Inputs
from mixers.testing.run import (
    Configuration,
    Outcome,
    check_mixer,
    configurations,
    parametrize_with_checks,
    run_checks,
)
from mixers.testing.tolerances import TOLERANCES, Tolerance

__all__ = [
    "CHECKS",
    "TOLERANCES",
    "Check",
    "Configuration",
    "Inputs",
    "Outcome",
    "Tolerance",
    "check_mixer",
    "checks_for",
    "configurations",
    "parametrize_with_checks",
    "run_checks",
]
