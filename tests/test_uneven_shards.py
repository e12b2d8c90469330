"""Arrays that a mesh of Auto axes does not divide: XLA fills their last tiles up with what other programs left there,
and no sum may see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _partitioning, add_rms_norm, rms_norm, rms_norm_gated, rms_norm_rope
from tests.meshes import assert_equal, draw, mesh_of, on_eight

pytestmark = on_eight
N, MOST = 64, 8


def of_heads(x: Any, weight: Any) -> Any:
    heads = x.reshape(*x.shape[:-1], 1, N)
    angles = jax.lax.stop_gradient((jnp.cos(x), jnp.sin(x)))
    return sum(jax.tree.leaves(rms_norm_rope(heads, 2 * heads, *angles, weight, weight)))


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "norm": rms_norm,
    "add": lambda x, weight: add_rms_norm(x, x + 1, weight)[0],
    "gated": lambda x, weight: rms_norm_gated(x, x + 1, weight),
    "rotated heads": of_heads,
}


def on_devices(values: Any, axis: int) -> Any:
    """Four of them, and two copies, by that axis, as the program's own steps may have it."""
    spec = P(*("data" if at == axis % values.ndim else None for at in range(values.ndim)))
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh_of("auto"), spec))


@pytest.mark.sampled(24)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("form", FORMS)
def test_rows(form: str, rows: int) -> None:
    """exp, of which a padding of zeros is ones."""
    x, weight = draw(2, MOST, N, seed=0, dtype="float32"), draw(N, seed=1, dtype="float32")

    def results(x: Any, weight: Any, place: Any) -> Any:
        given = place(jnp.exp(x)[:, :rows])
        y, pullback = jax.vjp(FORMS[form], given, weight)
        return y, *pullback(place(jnp.ones_like(y)))

    expected = jax.jit(functools.partial(results, place=lambda value: value))(x, weight)
    found = jax.jit(functools.partial(results, place=functools.partial(on_devices, axis=1)))(x, weight)
    assert_equal(found, expected)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("n", [5, 61, 62, 63])
@pytest.mark.parametrize("form", ["norm", "add", "gated"])
def test_columns(form: str, n: int) -> None:
    """Of a slice of columns that devices share."""
    x, weight = draw(4, N, seed=0, dtype="float32"), draw(N, seed=1, dtype="float32")

    def results(x: Any, weight: Any, place: Any) -> Any:
        y, pullback = jax.vjp(FORMS[form], place(x)[..., :n] + 1, weight[:n])
        return y, *pullback(jnp.ones_like(y))

    expected = jax.jit(functools.partial(results, place=lambda value: value))(x, weight)
    found = jax.jit(functools.partial(results, place=functools.partial(on_devices, axis=-1)))(x, weight)
    assert_equal(found, expected)


@pytest.mark.parametrize("mistaken", [lambda: test_rows("norm", 6), lambda: test_columns("norm", 62)])
def test_a_sum_over_uneven_tiles_is_found(mistaken: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_partitioning, "_replicated", lambda tiling, axis: tiling)
    monkeypatch.setattr(_partitioning, "version", lambda: "a mistaken one")  # not what a cache has
    with pytest.raises(AssertionError):
        mistaken()


def test_a_cache_on_disk_tells_versions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is the program's text, in which a call is still to be partitioned: programs of a version that sums what
    lies in uneven tiles would be found by the next one."""

    def text() -> str:
        given = on_devices(jnp.ones((4, N)), axis=0)
        return jax.jit(lambda x: rms_norm(x)).lower(given).as_text()

    assert "pallas_norm" in text()
    assert text() == text()
    before = text()
    monkeypatch.setattr(_partitioning, "version", lambda: "another")
    jax.clear_caches()
    assert text() != before
