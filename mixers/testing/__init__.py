"""The conformance suite, for our mixers and for yours.

from mixers.testing import check_mixer, parametrize_with_checks

check_mixer("linfusion", causality="causal")          # a report; raises on the first broken promise

@parametrize_with_checks(["my_mixer"])                 # pytest: one test per configuration and check
def test_my_mixer(mixer, check): check(mixer)
"""

from mixers.testing.checks import CHECKS, checks_for
from mixers.testing.run import Configuration, check_mixer, configurations, parametrize_with_checks
from mixers.testing.tolerances import TOLERANCES, Tolerance

__all__ = [
    "CHECKS",
    "TOLERANCES",
    "Configuration",
    "Tolerance",
    "check_mixer",
    "checks_for",
    "configurations",
    "parametrize_with_checks",
]
