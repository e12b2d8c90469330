"""What may change what a module computes: its attributes, in words that two of them can be compared by."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (Attributes are any objects.)

from __future__ import annotations

import dataclasses
import enum
import sys
from typing import Any

import numpy as np

PLAIN = (bool, int, float, complex, str, bytes, type, np.dtype, np.generic, enum.Enum, type(None))


def _is_module(value: Any) -> bool:
    flax = sys.modules.get("flax.nnx")
    held = dataclasses.is_dataclass(value) and not isinstance(value, type)  # all of Equinox's are, and configurations
    return held or (flax is not None and isinstance(value, flax.Module))


def _words(value: Any, within: tuple[int, ...]) -> str:
    """Two values of numbers, names and dtypes, or containers and modules of them, that differ have other words. Of what
    else there is, functions among it, only the kind. `within`: the modules that hold it."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, dict):
        inner = [f"{_words(key, within)}: {_words(one, within)}" for key, one in value.items()]
    elif isinstance(value, (list, tuple)):
        inner = [_words(one, within) for one in value]
    elif isinstance(value, (set, frozenset)):
        inner = sorted(_words(one, within) for one in value)
    elif _is_module(value) and id(value) not in within:
        inner = [f"{name}={words}" for name, words in plain_attributes(value, (*within, id(value)))]
    else:
        inner = []
    return f"{type(value).__qualname__}({', '.join(inner)})"


def plain_attributes(module: Any, within: tuple[int, ...] = ()) -> tuple[tuple[str, str], ...]:
    """What may change what the module computes, in words. Not seen is what changes inside a function, or inside an
    object that is no module and no dataclass; nor what the module reads elsewhere, of its class or of globals."""
    kinds, within = (*PLAIN, dict, list, tuple, set, frozenset), within or (id(module),)
    return tuple(
        (name, _words(value, within))
        for name, value in sorted(getattr(module, "__dict__", {}).items())
        if isinstance(value, kinds) or _is_module(value)
    )
