"""Linear token mixers: a registry of interchangeable layers tokens (b, l, d) -> tokens (b, l, d).

    mixer = create_mixer("linfusion", dim=64, heads=4)
    y = mixer(x)                                  # (b, l, d)
    structure.mixing_matrix(mixer, x)             # (b, h, l, l)

Needs torch and einops only. Axis letters: b batch, h heads, l tokens, d model, k key, v value.
"""

from mixers import operators, structure
from mixers.mixer import TokenMixer
from mixers.registry import create_mixer, list_mixers, mixer_from_state_dict, register_mixer

__all__ = [
    "TokenMixer",
    "create_mixer",
    "list_mixers",
    "mixer_from_state_dict",
    "operators",
    "register_mixer",
    "structure",
]
