"""JAX with one process for each GPU, by jax.distributed over 127.0.0.1: each holds its own rows of arrays of both.

Every process compares its rows, and dweight, with what NumPy knows before: `known` in torch's tests, without torch.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm
from tests.two_gpus import checks, ports

WORLD = 2
REHEARSAL = "--rehearsal" in sys.argv
ROWS, N = (256, 4096) if not REHEARSAL else (16, 64)
SECONDS = 200
KINDS = {"Explicit": AxisType.Explicit, "Auto": AxisType.Auto}


def operands() -> dict[str, Any]:
    """Signs, so unit is x, which eps moves by less than bfloat16 keeps; dweight is a sum of integers."""
    draw = np.random.default_rng(0)
    x = draw.choice([-1.0, 1.0], (ROWS, N)).astype("float32")
    weight = draw.choice([-1.0, 0.5, 1.0, 2.0], N).astype("float32")
    dy = draw.integers(-3, 4, (ROWS, N)).astype("float32")
    return {"x": x, "weight": weight, "dy": dy, "y": x * weight, "dweight": (dy * x).sum(0)}


def of_both(mesh: Any, values: Any, spec: P, dtype: str) -> jax.Array:
    """One array of both processes, of which each makes its own shard."""
    values = values.astype(jnp.dtype(dtype))
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda index: values[index])


def assert_shards(found: jax.Array, expected: Any, *, shape: tuple[int, ...]) -> None:
    assert found.shape == expected.shape
    assert len(found.addressable_shards) == 1
    for shard in found.addressable_shards:
        assert shard.data.shape == shape, shard.data.shape
        np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected[shard.index])


def norms(kind: str, spec: P, weight_spec: P) -> None:
    mesh = jax.make_mesh((WORLD,), ("data",), axis_types=(KINDS[kind],))
    assert {device.process_index for device in mesh.devices.flat} == set(range(WORLD))
    known = operands()
    x, dy = of_both(mesh, known["x"], spec, "bfloat16"), of_both(mesh, known["dy"], spec, "float32")
    weight = of_both(mesh, known["weight"], weight_spec, "float32")
    rows = (ROWS // WORLD, N) if spec else (ROWS, N)
    assert_shards(jax.jit(rms_norm)(x, weight), known["y"], shape=rows)
    y, s = jax.jit(add_rms_norm)(x, jnp.zeros_like(x), weight)
    assert_shards(y, known["y"], shape=rows)
    assert_shards(s, known["x"], shape=rows)

    @jax.jit
    def gradients(x: jax.Array, weight: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(rms_norm, x, weight)[1](dy)

    dx, dweight = gradients(x, weight, dy)
    g = known["dy"] * known["weight"]
    exact = g - known["x"] * (g * known["x"]).mean(-1, keepdims=True)
    for shard in dx.addressable_shards:
        assert shard.data.shape == rows
        off = np.abs(np.asarray(shard.data, np.float64) - exact[shard.index])
        assert np.all(off <= 2.0**-8 * np.abs(exact[shard.index]) + 2.4e-5)  # as in known.py
    # Each shard's sum and their sum are those of integers times unit, which eps moves by 5e-7, and 24 bits keep so much
    # of it that the sum may be off by ROWS * 3 times that.
    for shard in dweight.addressable_shards:
        off = np.abs(np.asarray(shard.data, np.float64) - known["dweight"][shard.index])
        assert np.all(off <= ROWS * 3 * 1e-6), off.max()


def inside_shard_map(kind: str) -> None:
    mesh = jax.make_mesh((WORLD,), ("data",), axis_types=(KINDS[kind],))
    known, rows = operands(), P("data")
    x, weight = of_both(mesh, known["x"], rows, "bfloat16"), of_both(mesh, known["weight"], P(), "float32")
    mapped = jax.jit(jax.shard_map(rms_norm, mesh=mesh, in_specs=(rows, P()), out_specs=rows))
    assert_shards(mapped(x, weight), known["y"], shape=(ROWS // WORLD, N))


def on_own_gpu() -> None:
    """What no mesh is around stays in its process."""
    known = operands()
    y = jax.jit(rms_norm)(jnp.asarray(known["x"], "bfloat16"), jnp.asarray(known["weight"]))
    assert y.devices() == {jax.local_devices()[0]}
    np.testing.assert_array_equal(np.asarray(y, np.float32), known["y"])


def of_process() -> list[checks.Check]:
    found: list[tuple[str, Callable[[], object]]] = [("jax.distributed: a process's own GPU", on_own_gpu)]
    for kind in KINDS:
        for words, spec, weight in (
            ("rows split", P("data"), P()),
            ("weight split as well", P("data"), P("data")),
            ("nothing split", P(), P()),
        ):
            found.append((f"jax.distributed, {kind}: {words}", functools.partial(norms, kind, spec, weight)))
        found.append((f"jax.distributed, {kind}: shard_map", functools.partial(inside_shard_map, kind)))
    return found


def process(number: int, port: int) -> int:
    local: dict[str, Any] = {} if REHEARSAL else {"local_device_ids": [number]}
    if REHEARSAL:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", WORLD, number, initialization_timeout=60, **local)
    assert (jax.local_device_count(), jax.device_count()) == (1, WORLD)
    found = of_process()
    passed, failed = checks.run(found, label=f"process {number}: ")
    if passed == len(found):
        jax.distributed.shutdown()  # waits for the other one
    return 0 if failed == 0 else 1


def main() -> int:
    """Starts both, prints what they say, and fails if one of them does."""
    options, port = [*(["--rehearsal"] if REHEARSAL else [])], str(ports.free())
    own = [sys.executable, "-m", "tests.two_gpus.jax_processes"]
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen([*own, str(number), port, *options], stdout=said, stderr=subprocess.STDOUT, text=True)
            for number in range(WORLD)
        ]
        try:
            statuses = [one.wait(SECONDS) for one in started]
        finally:
            for one in started:
                one.kill()
            said.seek(0)
            text = said.read()
            print(text, end="", flush=True)
    passed, failed = (text.count(f": {word} jax.distributed") for word in ("ok    ", "FAILED"))
    status = checks.finish(passed, failed, wanted=WORLD * len(of_process()))
    return status or max(map(abs, statuses))


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    sys.exit(process(*numbers) if len(numbers) == 2 else main())
