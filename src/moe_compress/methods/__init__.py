"""The methods, one file each; importing a file registers what it holds."""

import importlib
import pkgutil


def register_all() -> None:
    """Import every method file of the package."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
