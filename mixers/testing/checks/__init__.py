"""What a mixer promises, as checks: `check_<promise>(mixer, inputs)` for a float64 mixer with its own projections."""

from mixers.testing.checks.registry import MIXER_CHECKS, MixerCheck, checks_for

__all__ = ["MIXER_CHECKS", "MixerCheck", "checks_for"]
