"""Operators: one matrix per head applied to the values, each with several backends that must agree."""

from mixers.operators import delta, linear, scan
from mixers.operators.backend import Backend, OperatorCall, register_backend
from mixers.operators.delta import DeltaRuleBackend, DeltaRuleCall, delta_rule, delta_rule_matrix
from mixers.operators.linear import (
    LinearAttentionBackend,
    LinearAttentionCall,
    linear_attention,
    linear_attention_matrix,
)
from mixers.operators.recurrent_state import RecurrentState
from mixers.operators.scan import SelectiveScanBackend, SelectiveScanCall, selective_scan, selective_scan_matrix
from mixers.operators.selection import BackendChoice, BackendRefusedError, backends, observe_backends

__all__ = [
    "Backend",
    "BackendChoice",
    "BackendRefusedError",
    "DeltaRuleBackend",
    "DeltaRuleCall",
    "LinearAttentionBackend",
    "LinearAttentionCall",
    "OperatorCall",
    "RecurrentState",
    "SelectiveScanBackend",
    "SelectiveScanCall",
    "backends",
    "delta",
    "delta_rule",
    "delta_rule_matrix",
    "linear",
    "linear_attention",
    "linear_attention_matrix",
    "observe_backends",
    "register_backend",
    "scan",
    "selective_scan",
    "selective_scan_matrix",
]
