"""What a baseline is: a callable without arguments that runs a case, and a remark about what it runs."""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from collections.abc import Callable
from typing import Any

from .operands import on_gpu


class AbsentError(Exception):
    """This provider cannot run this case on this machine; the text says why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """run() gives y, (y, s) or (dx, dweight), by the case's operation."""

    run: Callable[[], Any]
    note: str = ""  # what a reader of its time has to know

    def __call__(self) -> Any:
        return self.run()


def failure(error: Exception) -> str:
    """The kind and the first line of an error, for a result file."""
    text = str(error).strip() or traceback.format_exception_only(error)[-1].strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def module(name: str, package: str | None = None) -> Any:
    """The module, or AbsentError with the reason."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package may import, but not on a machine without its compiler or its GPU
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AbsentError(f"{package or name.split('.')[0]} cannot be imported: {reason}") from error


def needs_gpu(name: str) -> None:
    if not on_gpu():
        raise AbsentError(f"{name} needs a CUDA device")
