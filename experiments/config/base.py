"""What all configurations share."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

ImageSide = Annotated[int, Field(ge=8, le=2**15, multiple_of=4)]
"""A side of an image in pixels; autoencoders reduce 4 or 8 pixels to one latent pixel. The largest image
that is read has sides of 2¹⁵ pixels."""

CONFIG_NAME = r"^[a-z0-9_\-]+$"
"""What a name may look like that becomes part of a file's name."""


class FrozenModel(BaseModel):
    """Base of every configuration: immutable, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def short_hash(value: Any) -> str:
    """Return ten hexadecimal digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
