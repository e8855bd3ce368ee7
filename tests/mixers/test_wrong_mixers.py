"""The conformance suite catches mixers that are wrong in their forward pass and in their matrix alike."""

from __future__ import annotations

import pytest

from mixers.testing import MIXER_CHECKS, checks_for, run_checks
from mixers.testing.wrong_mixers import WRONG_MIXERS

CHECKS_BY_NAME = {check.name: check for check in MIXER_CHECKS}
AGREEMENT = ("check_forward_equals_its_matrix", "check_matrix_by_probing")


@pytest.mark.parametrize("fault", WRONG_MIXERS)
def test_a_wrong_mixer_is_caught_by_its_check(fault: str) -> None:
    build, catching = WRONG_MIXERS[fault]
    mixer = build()
    assert CHECKS_BY_NAME[catching] in checks_for(mixer)
    names = (*AGREEMENT, catching)
    statuses = {
        outcome.check: outcome.status for outcome in run_checks(mixer, checks=[CHECKS_BY_NAME[n] for n in names])
    }
    assert statuses == dict.fromkeys(AGREEMENT, "passed") | {catching: "failed"}
