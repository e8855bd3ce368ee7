"""Scenes whose tokens need each other: hidden variables that several objects share, beside scenes named in full.

Twemoji graphics: Copyright Twitter, Inc. and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Name them wherever images are shown.
"""

from experiments.data.scenes.dataset import TRAINING_SIZE, SceneSet
from experiments.data.scenes.kinds import KINDS, SceneContext, SceneKind, register_kind
from experiments.data.scenes.scene import Placement, Scene, compose_svg, render_scene

__all__ = [
    "KINDS",
    "TRAINING_SIZE",
    "Placement",
    "Scene",
    "SceneContext",
    "SceneKind",
    "SceneSet",
    "compose_svg",
    "register_kind",
    "render_scene",
]
