"""Operators: one matrix per head applied to the values, each in several formulations that must agree."""

from mixers.operators.choice import Choice, backends, observe_backends
from mixers.operators.delta import delta_rule, delta_rule_weights
from mixers.operators.linear import linear_attention, linear_weights
from mixers.operators.scan import selective_scan, selective_scan_weights
from mixers.operators.state import State

__all__ = [
    "Choice",
    "State",
    "backends",
    "delta_rule",
    "delta_rule_weights",
    "linear_attention",
    "linear_weights",
    "observe_backends",
    "selective_scan",
    "selective_scan_weights",
]
