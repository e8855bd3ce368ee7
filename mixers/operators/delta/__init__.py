"""delta_rule: a memory that erases what it holds under a key before it writes there, with decay or without."""

from mixers.operators.delta.backend import DeltaRuleBackend, DeltaRuleCall
from mixers.operators.delta.flops import flops
from mixers.operators.delta.operator import delta_rule, delta_rule_matrix

__all__ = ["DeltaRuleBackend", "DeltaRuleCall", "delta_rule", "delta_rule_matrix", "flops"]
