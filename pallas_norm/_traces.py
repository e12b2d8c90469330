"""A module's own call as a jaxpr, and whether two such jaxprs compute the same at two sizes.

What is proved is a jaxpr at a few rows. The same class may compute something else at other sizes, where a mesh axis is
bound, or under a mesh: so what it traces to for each call is held to what was proved, equation by equation.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (Jaxprs have few types.)

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np

CALLS = frozenset({"jit", "pjit"})
# A trace at leading axes of these sizes stands for any other: where one of them comes from is seen in the size itself.
PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


class RefusedError(Exception):
    """Why a module is left."""


class Called(NamedTuple):
    """A module that can be called with another weight."""

    rebuilt: Callable[[Any], Any]  # a copy of it with this weight
    call: Callable[[Any, Any], Any]  # (module, x): the call of its own class
    held: Callable[[Any], tuple[Any, list[Any]]]  # what it is now: in words, and as objects


def struct(shape: Any, dtype: Any, *, weak: bool = False) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), weak_type=weak)


def _same(before: tuple[Any, list[Any]], after: tuple[Any, list[Any]]) -> bool:
    (words, objects), (others, other_objects) = before, after
    return (
        words == others
        and len(objects) == len(other_objects)
        and all(one is other for one, other in zip(objects, other_objects, strict=True))
    )


def traced(module: Called, x: Any, weight: Any) -> Any:
    """The closed jaxpr of its own call for arrays like these, None where it takes none. Raises RefusedError."""

    def call(x: Any, weight: Any) -> Any:
        copy = module.rebuilt(weight)
        before = module.held(copy)
        y = module.call(copy, x)
        if not _same(before, module.held(copy)):
            raise RefusedError("it changes itself when it is called, which rms_norm would not do")
        return y

    try:
        return jax.make_jaxpr(call)(x, weight)
    except RefusedError:
        raise
    except Exception:  # anybody's: an einsum or a reshape for another rank, an assertion on it
        return None


def primes(leading: tuple[int, ...], n: int) -> tuple[int, ...]:
    """A distinct one for each of these axes, of which none divides n."""
    return tuple(prime for prime in PRIMES if n % prime)[: len(leading)]


class _Comparison:
    """Of a jaxpr at primes with another one, for which each prime is another size."""

    def __init__(self, sizes: dict[int, Any]) -> None:
        self.sizes = sizes

    def at(self, size: Any) -> Any:
        """What this size of the first jaxpr is in the second."""
        found = 1
        for prime, other in self.sizes.items():
            while size and size % prime == 0:
                size, found = size // prime, found * other
        return size * found

    def values(self, first: Any, second: Any) -> bool:
        """Of parameters: numbers, which may be sizes, containers of them, and what else has an equality."""
        if isinstance(first, (tuple, list)):
            return (
                type(first) is type(second)
                and len(first) == len(second)
                and all(self.values(one, other) for one, other in zip(first, second, strict=True))
            )
        if type(first) is int:
            return bool(self.at(first) == second)
        return bool(first is second or first == second)

    def constants(self, first: Any, second: Any) -> bool:
        if first is second:
            return True
        if any(isinstance(one, jax.core.Tracer) for one in (first, second)):
            return False  # of the call that is being traced
        one, other = np.asarray(first), np.asarray(second)
        if one.dtype != other.dtype or not self.values(one.shape, other.shape):
            return False
        if one.shape == other.shape and one.tobytes() == other.tobytes():
            return True
        whole = one.ndim == 0 and float(one).is_integer()  # the number of elements of a mean over rows
        return bool(whole and float(other) == self.at(int(one)))

    def avals(self, first: Any, second: Any) -> bool:
        return (
            first.dtype == second.dtype
            and first.weak_type == second.weak_type
            and self.values(tuple(first.shape), tuple(second.shape))
        )

    def jaxprs(self, first: Any, second: Any) -> bool:
        """Of closed ones."""
        here, there = first.jaxpr, second.jaxpr
        names: dict[Any, Any] = {}  # variables of the first by those of the second

        def bind(ones: Any, others: Any) -> bool:
            same = len(ones) == len(others) and all(
                self.avals(one.aval, other.aval) for one, other in zip(ones, others, strict=True)
            )
            names.update(zip(others, ones, strict=True) if same else [])
            return same

        def atoms(ones: Any, others: Any) -> bool:
            return len(ones) == len(others) and all(atom(one, other) for one, other in zip(ones, others, strict=True))

        def atom(one: Any, other: Any) -> bool:
            if isinstance(one, jax.extend.core.Literal) and isinstance(other, jax.extend.core.Literal):
                return self.avals(one.aval, other.aval) and self.constants(one.val, other.val)
            if isinstance(one, jax.extend.core.Literal) or isinstance(other, jax.extend.core.Literal):
                return False
            return names.get(other) is one

        return (
            bind(here.constvars, there.constvars)
            and all(self.constants(one, other) for one, other in zip(first.consts, second.consts, strict=True))
            and bind(here.invars, there.invars)
            and len(here.eqns) == len(there.eqns)
            and all(
                one.primitive is other.primitive
                and atoms(one.invars, other.invars)
                and self.parameters(one, other)
                and bind(one.outvars, other.outvars)
                for one, other in zip(here.eqns, there.eqns, strict=True)
            )
            and atoms(here.outvars, there.outvars)
        )

    def parameters(self, first: Any, second: Any) -> bool:
        if first.primitive.name in CALLS:  # a name, a mesh, donations: not what is computed
            return not shards(second) and self.jaxprs(called(first), called(second))
        return first.params.keys() == second.params.keys() and all(
            self.values(value, second.params[name]) for name, value in first.params.items()
        )


def called(equation: Any) -> Any:
    """The closed jaxpr of one of CALLS."""
    return next(one for one in equation.params.values() if hasattr(one, "jaxpr"))


def shards(equation: Any) -> bool:
    """Whether it says how an array is sharded, by itself or as a program inside with shardings of its own."""
    own = (equation.params.get(name) for name in ("sharding", "out_sharding"))
    inner = itertools.chain(*(equation.params.get(name, ()) for name in ("in_shardings", "out_shardings")))
    return (
        equation.primitive.name in ("sharding_constraint", "reshard")
        or any(one is not None for one in own)
        or any(type(one).__name__ != "UnspecifiedValue" for one in inner)
    )


def alike(general: Any, leading: tuple[int, ...], other: Any, others: Any) -> bool:
    """Whether a closed jaxpr of a call with these leading axes is what `general` is, with primes for its own."""
    return _Comparison(dict(zip(leading, others, strict=True))).jaxprs(general, other)
