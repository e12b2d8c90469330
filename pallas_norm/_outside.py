"""Outside of every trace and mesh: whether a call is there, and how a proof gets there."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (jax.extend and devices have few types.)

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.extend.core

from ._traces import RefusedError


def _in_a_thread(function: Callable[[], Any]) -> Any:
    with futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@functools.cache
def _clean() -> Any:
    return _in_a_thread(jax.extend.core.get_opaque_trace_state)


def here() -> bool:
    """Whether JAX traces nothing now, vmap and grad among it."""
    return bool(jax.extend.core.get_opaque_trace_state() == _clean())


def aside(function: Callable[[], Any]) -> Any:
    """What it gives on a CPU, whose divisions and roots are IEEE's, in a thread of its own: there no program is being
    traced and no mesh is set, which a first call is often inside of. Of traces it would lose what is around them."""
    try:
        (cpu, *_) = jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise RefusedError(
            "its proof is computed on a CPU, and JAX has none here; add cpu to JAX_PLATFORMS (cuda,cpu)"
        ) from error

    def there() -> Any:
        # What looks for faults of the user's program found the infinities and NaNs that a proof has on purpose.
        with (
            jax.default_device(cpu),
            jax.debug_nans(False),  # noqa: FBT003
            jax.debug_infs(False),  # noqa: FBT003
            jax.check_tracer_leaks(False),  # noqa: FBT003
            jax.transfer_guard("allow"),
        ):
            return function()

    return _in_a_thread(there)
