"""Programs of eight devices that outlive their process: exported, serialised, found again in JAX's disk cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _dispatch, rms_norm
from pallas_norm._spec import Spec

ROOT = Path(__file__).parent.parent
eight_devices = pytest.mark.skipif(
    jax.local_device_count("cpu") < 8 or jax.default_backend() != "cpu",
    reason="needs 8 CPU devices (jax.config jax_num_cpu_devices) and no other backend",
)
KINDS = [AxisType.Explicit, AxisType.Auto]


def gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](x)


def operands(kind: AxisType) -> tuple[jax.Array, jax.Array]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:8])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 256)), jnp.bfloat16)
    return jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(x[0], NamedSharding(mesh, P()))


def assert_equal(ours: Any, theirs: Any) -> None:
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(own, other)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """XLA serialises no CPU executable again that was itself loaded, as make test keeps them: the second run failed."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.mark.sampled(2)
@eight_devices
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_executable_is_serialised_and_loaded(kind: AxisType) -> None:
    given = operands(kind)
    compiled = jax.jit(gradient).lower(*given).compile()
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    assert_equal(loaded(*given), compiled(*given))


@pytest.mark.sampled(2)
@eight_devices
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_program_of_several_devices_is_exported(kind: AxisType) -> None:
    given = operands(kind)
    exported = export.export(jax.jit(gradient))(*given)
    again = export.deserialize(exported.serialize())
    assert again.nr_devices == 8
    assert_equal(jax.jit(again.call)(*given), jax.jit(gradient)(*given))


SECOND = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
from tests import test_stored_programs as programs
for kind in programs.KINDS:
    given = programs.operands(kind)
    hits.clear()
    jax.jit(programs.gradient).lower(*given).compile()
    print(len(hits))
"""


@pytest.mark.slow
def test_a_second_process_finds_the_program_in_the_disk_cache(tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SECOND, str(tmp_path)]
    hits = [
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout.split()
        for _ in range(2)
    ]
    assert hits == [["0", "0"], ["1", "1"]]


def test_a_call_in_a_program_is_the_same_text_in_every_process() -> None:
    """What the partitioner of Auto axes on CUDA reads is data: no address of an object, and it says all of the call."""
    spec = Spec(eps=1e-5, cast_before_scale=False, weight_offset=1.0, implementation="mosaic_gpu")
    call = _dispatch.Call("backward", ("x", "rstd", "dy", "weight"), spec, with_dweight=True, dweight_dtype="bfloat16")
    assert _dispatch.Call.decoded(call.encoded()) == call
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    weight = jax.ShapeDtypeStruct((256,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

    def text() -> str:
        jax.clear_caches()
        return jax.jit(gradient).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()

    assert text() == text()
    assert text().count("custom_call @pallas_norm") == 2
