"""One file per mixer, found by a scan: adding a file here is all it takes."""

import importlib
import pkgutil


def load() -> None:
    """Import every mixer in this folder, which registers it."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
