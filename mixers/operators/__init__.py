"""Operators: one matrix per head applied to the values, each in several formulations that must agree."""

from mixers.operators.linear import LinearState, backends, linear_attention, linear_weights

__all__ = ["LinearState", "backends", "linear_attention", "linear_weights"]
