"""Linear token mixers: interchangeable layers that map tokens (b, l, d) to tokens (b, l, d), in a registry.

    mixer = create_mixer("linfusion", dim=64, heads=4)
    y = mixer(x)                                  # (b, l, d)
    structure.mixing_matrix(mixer, x)             # (b, h, l, l)

Needs torch and einops only. Axis letters: b batch, h heads, l tokens, d model, k key, v value, n state, c chunk.
"""

from mixers import operators, structure
from mixers.config import MixerConfig
from mixers.linear_mixer import LinearConfig, LinearMixer
from mixers.mixer import TokenMixer
from mixers.registry import create_mixer, list_mixers, load_plugin, mixer_from_state_dict, register_mixer
from mixers.state_space_mixer import StateSpaceConfig, StateSpaceMixer
from mixers.streams import Streams
from mixers.traits import Traits

__all__ = [
    "LinearConfig",
    "LinearMixer",
    "MixerConfig",
    "StateSpaceConfig",
    "StateSpaceMixer",
    "Streams",
    "TokenMixer",
    "Traits",
    "create_mixer",
    "list_mixers",
    "load_plugin",
    "mixer_from_state_dict",
    "operators",
    "register_mixer",
    "structure",
]
