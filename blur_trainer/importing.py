"""Imports without garbage collection: what an import makes stays. Looking for garbage takes a fifth of its time."""

import gc
import importlib
from types import ModuleType


def import_quickly(name: str) -> ModuleType:
    """The module `name`. If it must be loaded first, the garbage collector rests until it is."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collects:
            gc.enable()
