"""The mixer of one site: its name and its options, completed by what the site's layer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixers import create_mixer
from mixers.registry import get_mixer_entry
from unet_adapters.sites import Site

OF_THE_SITE = frozenset({"name", "dim", "heads", "own_projections"})  # config entries that a site or its file decides

LAYER_OPTIONS = {"text": ("softmax", "attends to text tokens"), "rope": ("after_map", "rotates queries and keys")}
"""Options for layers of a kind: their value where none is given, and what such layers do."""


@dataclass(frozen=True)
class SiteMixer:
    """How to make the mixer of one site: its registered name and its config, as plain JSON."""

    mixer: str
    config: Mapping[str, Any]

    def create(self, site: Site) -> Any:
        """A new mixer, without projections, with random weights.

        Raises:
            ValueError: the mixer refuses its options, or cannot be mounted in such a layer; the message says why.
        """
        options = {key: value for key, value in self.config.items() if key not in OF_THE_SITE}
        for name, applies in (("text", site.text), ("rope", site.rotary)):
            default, _ = LAYER_OPTIONS[name]
            options[name] = (options.get(name) or default) if applies else None
        if site.qk_norm and options.get("temperature") is None:
            names = ("normalize", "feature_map")
            entry = get_mixer_entry(self.mixer)
            config = entry.config(**{name: options[name] for name in names if options.get(name) is not None})
            if entry.mixer.benefits_from_temperature(config):
                options["temperature"] = True
        return create_mixer(self.mixer, site.dim, site.heads, own_projections=False, **options)


def check_layer_options(sites: Sequence[Site], options: Mapping[str, Any]) -> None:
    """Refuse options that concern none of the sites.

    Raises:
        ValueError: `text` is given and no site attends to text, or `rope` and none rotates queries and keys.
    """
    applies = {"text": any(site.text for site in sites), "rope": any(site.rotary for site in sites)}
    for name, (_, action) in LAYER_OPTIONS.items():
        if options.get(name) is not None and not applies[name]:
            raise ValueError(f"{name}={options[name]!r} has no effect: none of the selected sites {action}. Drop it")
