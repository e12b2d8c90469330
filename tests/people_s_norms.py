"""Norms that people write in Flax NNX and Equinox, and which calls of theirs are calls of `rms_norm`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import _proved_class

NO_FORM = "its bits are those of no form of rms_norm"
WAY = "; call pallas_norm.rms_norm in its __call__"


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def nnx() -> Any:
    return pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    own = _proved_class.rms_norm

    def counting(*operands: Any, **options: Any) -> Any:
        calls.append(operands)
        return own(*operands, **options)

    monkeypatch.setattr(_proved_class, "rms_norm", counting)
    return calls


def eqx() -> Any:
    return pytest.importorskip("equinox", reason="needs equinox (pip install equinox)")


def equinox_norm(body: Any, *, weight: Any = "float32", **attributes: Any) -> Any:
    """A module with these attributes whose call is body(self, x)."""
    fields: dict[str, Any] = {"eps": float, "weight": Any, **dict.fromkeys(attributes, Any)}
    space = {"__annotations__": fields, "__call__": lambda self, x: body(self, x)}
    kind = type(eqx().Module)("PersonsRMSNorm", (eqx().Module,), space)
    array = None if weight is None else 1 + 0.3 * draw(96, dtype=weight)
    return kind(eps=1e-5, weight=array, **attributes)


def unit(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    return wide / jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)


def llama(self: Any, x: Any) -> Any:
    return self.weight * unit(self, x).astype(x.dtype)
