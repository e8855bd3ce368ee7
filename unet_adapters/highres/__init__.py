"""Large images: progressive generation, a plan of memory before the work, and an autoencoder in tiles."""

from unet_adapters.highres.denoise import Control
from unet_adapters.highres.generate import Request, Result, generate
from unet_adapters.highres.plan import Plan, TooLittleMemory, make_plan
from unet_adapters.highres.savings import SAVINGS, save_memory
from unet_adapters.highres.vae import Tiling, decode, encode

__all__ = [
    "SAVINGS",
    "Control",
    "Plan",
    "Request",
    "Result",
    "Tiling",
    "TooLittleMemory",
    "decode",
    "encode",
    "generate",
    "make_plan",
    "save_memory",
]
