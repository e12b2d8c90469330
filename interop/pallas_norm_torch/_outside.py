"""What a forward reads beside its instance and its inputs, and whether it is still what it was at the proof.

Globals and members of a class are read anew at each call of a forward, so a proof holds for what they were: numbers by
value, functions by identity, a name that the class did not have by its absence.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from ._forms import ABSENT
from ._purity import codes_of, functions_of, meanings, members, names_of, simple, texts_of
from ._sources import code_digest
from ._terms import Unknown

Outside = tuple[tuple[str, Any], ...]  # (name, value), of a function the digest of its code


class _Read(NamedTuple):
    where: Any  # a class, a function, whose globals are meant, or a cell around one
    name: str
    value: Any

    @property
    def noted(self) -> Any:
        """What pickle takes to another process."""
        value = self.value.fget if isinstance(self.value, property) else self.value
        return code_digest(value) if isinstance(value, types.FunctionType) else value


def _reads(owner: type) -> list[_Read]:
    found = dict[tuple[int, str], _Read]()  # in the order of the code, which is the same in another process
    for function in functions_of(owner):
        for code in codes_of(function.__code__):
            texts = texts_of(code)
            reads = [
                _Read(where, name, value)
                for name, value, where in meanings(function, code)
                if where is not None and (isinstance(value, types.FunctionType) or simple(value))
            ]
            for name in names_of(code):
                there = [_Read(base, name, getattr(base, name)) for base, _ in members(owner, name)]
                if there or name in texts:
                    reads += [_Read(owner, name, getattr(owner, name, ABSENT)), *there]
            for one in reads:
                one = one._replace(value=getattr(one.value, "__func__", one.value))  # of a classmethod
                found.setdefault((id(one.where), one.name), one)
    return [*found.values()]


def outside_of(owner: type) -> Outside:
    """What that is now."""
    return tuple((one.name, one.noted) for one in _reads(owner))


def unchanged(owner: type, outside: Outside | None) -> Callable[[], bool]:
    """Whether that is what it was, to be asked at each call. A function that is made again, in another process, is the
    one that it was where its code is."""
    if outside is None:
        return lambda: True
    try:
        reads = _reads(owner)
    except Unknown:  # of what has been changed
        return lambda: False
    if tuple((one.name, one.noted) for one in reads) != outside:
        return lambda: False
    spaces = dict[int, tuple[dict[str, Any], dict[str, Any]]]()
    for one in reads:
        if isinstance(one.where, types.FunctionType):
            space = one.where.__globals__
            spaces.setdefault(id(space), (space, {}))[1][one.name] = one.value
    # Functions of the same globals: torch.compile puts guards on what they read, where it would copy a dict.
    readers = tuple(
        (eval(f"lambda: ({', '.join(values)},)", space), tuple(values.values())) for space, values in spaces.values()
    )
    of_classes = [one for one in reads if isinstance(one.where, type)]
    members = tuple((one.where, one.name, one.value) for one in of_classes if not isinstance(one.value, property))
    properties = tuple((one.where, one.name, one.value) for one in of_classes if isinstance(one.value, property))
    cells = tuple((one.where, "cell_contents", one.value) for one in reads if isinstance(one.where, types.CellType))
    others = properties + cells
    has_others = bool(others)

    def same_others() -> bool:
        return all(getattr(where, name, ABSENT) == value for where, name, value in others)

    if has_others:  # torch.compile cannot follow these, and has them as they are at the compile; imports torch._dynamo
        same_others = cast("Callable[[], bool]", torch.compiler.assume_constant_result(same_others))

    def still() -> bool:
        for read, values in readers:
            if read() != values:
                return False
        for where, name, value in members:
            found = getattr(where, name, ABSENT)
            if getattr(found, "__func__", found) != value:
                return False
        return not has_others or same_others()

    return still
