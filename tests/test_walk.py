"""How far a call walks before its first load: frames and files of pallas_norm, and returns to a file that it has left.

`python -m tests.test_walk` prints the walk. A debugger shows no fewer.
"""

# ruff: noqa: T201

from __future__ import annotations

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
    x, weight = jax.ShapeDtypeStruct((8, n), jnp.bfloat16), jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    found: list[Walk] = []

    def load(*_: Any, **__: Any) -> Any:
        stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(HOME)]
        found.append(Walk([(str(Path(frame.filename).relative_to(HOME)), frame.name) for frame in stack]))
        raise _SeenError

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        _, pullback = jax.vjp(pallas_norm.rms_norm, x, weight)
        with mock.patch.object(plgpu, "load", load):
            return pullback(dy)

    def forward(x: Any, weight: Any) -> Any:
        with mock.patch.object(plgpu, "load", load):
            return pallas_norm.rms_norm(x, weight)

    program, operands = (gradients, (x, weight, x)) if backward else (forward, (x, weight))
    with pytest.raises(_SeenError):
        jax.jit(program).trace(*operands)
    return found[0]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n", [128, 4096])
def test_a_call_walks_no_further(n: int, *, backward: bool) -> None:
    """The one return: launch calls what forward.py, or backward.py, does with a block. It was three, of 23 and 24
    frames, where each kernel had a grid of its own."""
    found = walk(n, backward=backward)
    assert len(found.frames) <= 24, found
    assert found.returns <= 1, found


def test_a_walk_counts_what_it_returns_to() -> None:
    there_and_back = Walk([("a.py", "f"), ("b.py", "g"), ("b.py", "h"), ("a.py", "i")])
    assert str(there_and_back) == "4 frames, 2 files, 1 returns"


if __name__ == "__main__":
    for n, backward in itertools.product((128, 4096, 32768), (False, True)):
        found = walk(n, backward=backward)
        print(n, "backward" if backward else "forward", found)
        print("   ", " > ".join(f"{file}:{name}" for file, name in found.frames))
