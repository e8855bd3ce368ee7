"""The mixers that ship, one file each; every file in this folder is imported, so adding one registers its mixer."""

import importlib
import pkgutil


def load() -> None:
    """Import every module of this folder, which registers its mixers."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
