"""The registries of the experiments. They live below every room, so that a configuration can check the names it holds.

Each discovers its items in a package that is named as text: the package imports this module, not the other way round.
"""

from __future__ import annotations

from typing import Any

from experiments.core.registry import Registry

OBJECTIVES: Registry[Any] = Registry("objective", package="experiments.distill.objectives")

METRICS: Registry[Any] = Registry("metric", package="experiments.metrics")

REGISTRIES: tuple[Registry[Any], ...] = (OBJECTIVES, METRICS)
"""All of them; a plug-in has to add to one of these, or to the registry of mixers."""
