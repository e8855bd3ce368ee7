"""Large images: progressive generation, a memory plan before the work, and an autoencoder in tiles."""

from unet_adapters.highres.autoencoder import Tiling, decode_tiled, encode_tiled
from unet_adapters.highres.denoising import ControlNetCondition
from unet_adapters.highres.generation import generate
from unet_adapters.highres.plan import InsufficientMemoryError, MemoryPlan, plan_memory
from unet_adapters.highres.request import GenerationRequest, GenerationResult
from unet_adapters.highres.savings import SAVINGS, save_memory

__all__ = [
    "SAVINGS",
    "ControlNetCondition",
    "GenerationRequest",
    "GenerationResult",
    "InsufficientMemoryError",
    "MemoryPlan",
    "Tiling",
    "decode_tiled",
    "encode_tiled",
    "generate",
    "plan_memory",
    "save_memory",
]
