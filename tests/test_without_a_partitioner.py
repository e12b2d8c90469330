"""A newer JAX may have moved the private names by which its partitioner is asked: import and bits do not depend on
them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _spmd, rms_norm
from tests.meshes import assert_close, draw, mesh_of, on_eight

PROGRAM = """
import jax
from jax._src import custom_partitioning_sharding_rule, xla_bridge
del custom_partitioning_sharding_rule.sdy_sharding_rule_to_mlir, xla_bridge.register_plugin_callbacks
jax.config.update("jax_num_cpu_devices", 8)
from tests.test_without_a_partitioner import check
check()
print("divided by XLA")
"""


def step(x: jax.Array, weight: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    y, pullback = jax.vjp(rms_norm, x, weight)
    return y, *pullback(dy)


def check() -> None:
    """Of rows, and of columns, that four devices share, evenly and not."""
    for spec, shape in ((P("data"), (8, 96)), (P(None, "data"), (8, 96)), (P("data"), (6, 96))):
        given = [draw(*size, seed=seed, dtype="float32") for seed, size in enumerate((shape, shape[1:], shape))]
        where = NamedSharding(mesh_of("auto"), spec)

        def divided(x: jax.Array, weight: jax.Array, dy: jax.Array, where: NamedSharding = where) -> Any:
            return step(jax.lax.with_sharding_constraint(x, where), weight, dy)

        assert "custom_call @pallas_norm" not in jax.jit(divided).lower(*given).as_text()
        found, expected = jax.jit(divided)(*given), jax.jit(step)(*given)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])
        terms = np.abs(given[2] * np.asarray(rms_norm(jnp.asarray(given[0]))))
        assert_close(found[2], expected[2], 2 * len(terms) * 2.0**-24 * terms.sum(axis=0))


@pytest.mark.slow
@on_eight
def test_without_its_names_xla_divides_the_program() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["divided by XLA"], done.stderr


@on_eight
def test_with_them_the_partitioner_is_asked() -> None:
    assert _spmd.unavailable() is None
    with pytest.raises(AssertionError):
        check()


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src import xla_bridge
    from jax.interpreters import mlir

    reason = rf"^jax {re.escape(jax.__version__)} has no partitioner that this package knows \("
    monkeypatch.delattr(xla_bridge, "register_plugin_callbacks")
    assert re.match(rf"{reason}jax\._src\.xla_bridge\.register_plugin_callbacks\)$", _spmd.unavailable.__wrapped__())
    monkeypatch.delattr(mlir, "SPMDAxisContext")
    assert re.match(rf"{reason}.*SPMDAxisContext", _spmd.unavailable.__wrapped__())
