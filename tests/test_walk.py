"""How far a call walks before its first load: frames and files of pallas_norm, and returns to a file that it has left.

`python -m tests.test_walk` prints the walk. A debugger shows no fewer.
"""

# ruff: noqa: T201

from __future__ import annotations

import contextlib
import itertools
import traceback
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_norm
from pallas_norm import _lowering
from pallas_norm.kernels import forward as forward_kernel

HOME = Path(pallas_norm.__file__).parent


class Walk(NamedTuple):
    frames: list[tuple[str, str]]  # file and function, from the public function to the load

    @property
    def files(self) -> list[str]:
        """In turn: one that is left and entered again is there twice."""
        return [file for file, _ in itertools.groupby(self.frames, key=lambda frame: frame[0])]

    @property
    def returns(self) -> int:
        return len(self.files) - len(set(self.files))

    def __str__(self) -> str:
        return f"{len(self.frames)} frames, {len(set(self.files))} files, {self.returns} returns"


class _SeenError(Exception):
    pass


def walk(n: int, *, backward: bool = False) -> Walk:
    """To where the path is left open, when a program is traced, and from where it is chosen, when it is lowered."""
    x, weight = jax.ShapeDtypeStruct((8, n), jnp.bfloat16), jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    traced: list[list[tuple[str, str]]] = []
    lowered: list[list[tuple[str, str]]] = []

    def seen() -> list[tuple[str, str]]:
        stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(HOME)]
        return [(str(Path(frame.filename).relative_to(HOME)), frame.name) for frame in stack]

    def load(*_: Any, **__: Any) -> Any:
        lowered.append(seen())
        raise _SeenError

    chosen = _lowering.chosen

    def choose(*arguments: Any) -> Any:
        traced.append(seen())
        return chosen(*arguments)

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(pallas_norm.rms_norm, x, weight)[1](dy)[0]

    program, operands = (gradients, (x, weight, x)) if backward else (pallas_norm.rms_norm, (x, weight))
    skip = mock.patch.object(forward_kernel, "forward", _nothing) if backward else contextlib.nullcontext()
    jax.clear_caches()  # what is kept of a trace is not walked again
    patches = mock.patch.object(_lowering, "chosen", choose), mock.patch.object(plgpu, "load", load)
    with patches[0], patches[1], skip, pytest.raises(_SeenError):
        jax.jit(program).trace(*operands).lower(lowering_platforms=("cuda",))
    return Walk([*traced[-1], *lowered[0]])


def _nothing(operands: dict[str, Any], **_: Any) -> dict[str, Any]:
    """In place of the forward kernel, whose loads are not looked for."""
    x = operands["x"]
    return {"y": x, "rstd": jnp.zeros(x.shape[:1], jnp.float32)}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n", [128, 4096])
def test_a_call_walks_no_further(n: int, *, backward: bool) -> None:
    """Returns: to _dispatch from the rule of lowering, and from launch to what forward.py, or backward.py, does with a
    block."""
    found = walk(n, backward=backward)
    assert len(found.frames) <= (25 if backward else 24), found
    assert found.returns <= 2, found


def test_a_walk_counts_what_it_returns_to() -> None:
    there_and_back = Walk([("a.py", "f"), ("b.py", "g"), ("b.py", "h"), ("a.py", "i")])
    assert str(there_and_back) == "4 frames, 2 files, 1 returns"


if __name__ == "__main__":
    for n, backward in itertools.product((128, 4096, 32768), (False, True)):
        found = walk(n, backward=backward)
        print(n, "backward" if backward else "forward", found)
        print("   ", " > ".join(f"{file}:{name}" for file, name in found.frames))
