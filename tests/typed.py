"""The shapes and dtypes in the packages' signatures, checked in every test, by jaxtyping and beartype.

The packages import jaxtyping for type checkers only. Here they are imported as a type checker would, so that their
annotations mean something while they run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import threading
import typing
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

# What comes to these has been validated: whatever does not fit their types is a bug of the package.
SPECIFICATION = tuple(
    f"pallas_norm.{name}"
    for name in (
        *("reference", "quantized_reference", "gated_reference", "rope_reference"),
        *("_row_sum", "_inverse_root", "_quotient", "_activation"),
    )
)
# These have messages of their own. Once they have accepted a call, it and its results have the types that they tell.
PUBLIC = {
    "pallas_norm._api": ("rms_norm", "add_rms_norm"),
    "pallas_norm._api_gated": ("rms_norm_gated",),
    "pallas_norm._api_rope": ("rms_norm_rope", "rms_norm_rope_qkv"),
    "pallas_norm._api_quantized": ("rms_norm_quantized", "add_rms_norm_quantized"),
}
NEEDED = "jaxtyping", "beartype"


def missing() -> str | None:
    """Why nothing is checked, where these are not installed: a machine with a GPU may have neither."""
    names = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"shapes and dtypes of signatures are not checked: no {' and no '.join(names)}" if names else None


@functools.cache  # what forks with the package imported has installed it, and its children's conftest.py does nothing
def install() -> None:
    """Before anything imports pallas_norm."""
    assert "pallas_norm" not in sys.modules, "pallas_norm was imported before its types could be checked"
    import beartype as beartype  # before what follows, which the package alone is to see
    import jaxtyping

    checking = mock.patch.object(typing, "TYPE_CHECKING", new=True)
    with checking, jaxtyping.install_import_hook(SPECIFICATION, "beartype.beartype"):
        for name in PUBLIC:
            importlib.import_module(name)
    for home, names in PUBLIC.items():
        for name in names:
            _put_in_place(getattr(sys.modules[home], name))


def _put_in_place(function: Callable[..., Any]) -> None:
    checked = after(function)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "pallas_norm":
            for attribute, value in list(vars(module).items()):
                if value is function:
                    setattr(module, attribute, checked)


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and once it has returned a check of what it was given and of what it gave."""
    import beartype
    import jaxtyping

    given = inspect.signature(function)
    hints = typing.get_type_hints(function)
    # The options are left alone, which may be NumPy's numbers too.
    shaped = {name: hint for name, hint in hints.items() if "Array, " in function.__annotations__[name]}
    parameters = [
        one.replace(annotation=shaped.get(one.name, inspect.Parameter.empty)) for one in given.parameters.values()
    ]
    result = threading.local()

    def recalled(*_: Any, **__: Any) -> Any:
        return vars(result).pop("value")  # kept, it would be a leaked tracer

    recalled.__signature__ = given.replace(parameters=parameters, return_annotation=shaped["return"])  # pyright: ignore[reportFunctionMemberAccess]
    check = jaxtyping.jaxtyped(recalled, typechecker=beartype.beartype)

    def as_array(value: Any) -> Any:
        return jnp.asarray(value) if isinstance(value, np.ndarray) else value

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        result.value = function(*args, **options)
        return check(*map(as_array, args), **{name: as_array(value) for name, value in options.items()})

    return checked
