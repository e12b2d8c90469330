"""Programs with gated norms: lowered to kernels for CUDA, on meshes of eight devices, in pjit and shard_map."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import rms_norm_gated
from pallas_norm._gated import Call
from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form
from tests.meshes import COLLECTIVE, mesh_of, on_eight
from tests.meshes import KINDS as MESHES
from tests.oracle import BF16
from tests.test_lowering import KINDS, ROWS, array, check
from tests.test_quantized_programs import PLACES

FORMS: dict[str, dict[str, Any]] = {
    "mamba2": {"norm_before_gate": False},
    "groups": {"norm_before_gate": False, "group_size": 64},
    "qwen3-next": {},
    "kimi": {"activation": "sigmoid", "cast_before_scale": False, "out_dtype": jnp.bfloat16},
}
N = 256


def trained(x: Any, gate: Any, weight: Any, **options: Any) -> Any:
    y, pullback = jax.vjp(functools.partial(rms_norm_gated, **options), x, gate, weight)
    return y, *pullback(y)


@pytest.mark.sampled(41)
@pytest.mark.parametrize(
    ("dtype", "n"), [(dtype, n) for dtype, widths in KINDS.items() for n in widths[:: 1 if dtype == "bfloat16" else 3]]
)
def test_every_kind_of_plan_lowers_to_its_kernels_for_cuda_and_to_none_elsewhere(dtype: str, n: int) -> None:
    x, weight = array(ROWS, n, dtype=dtype), array(n, dtype=dtype)
    options = {"norm_before_gate": bool(n % 3), "activation": ("silu", "sigmoid")[n % 2]}
    check(functools.partial(rms_norm_gated, **options), x, x, weight, kernels=1)
    check(functools.partial(trained, **options), x, x, weight, kernels=3)


def test_groups_with_weights_of_their_own_have_kernels_from_1024_elements_on() -> None:
    x, weight = array(4, 8192, dtype="bfloat16"), array(8192, dtype="bfloat16")
    check(functools.partial(trained, group_size=1024), x, x, weight, kernels=3)
    check(functools.partial(trained, group_size=512), x, x, weight, kernels=0)
    check(functools.partial(rms_norm_gated, group_size=512), x, x, kernels=1)


def test_a_gate_of_another_dtype_has_the_forward_kernel_alone() -> None:
    x, gate, weight = array(4, 1024, dtype="bfloat16"), array(4, 1024, dtype="float32"), array(1024, dtype="bfloat16")
    check(rms_norm_gated, x, gate, weight, kernels=1)
    check(trained, x, gate, weight, kernels=1)
    check(rms_norm_gated, array(0, 256, dtype="bfloat16"), array(0, 256, dtype="bfloat16"), kernels=0)
    check(rms_norm_gated, array(4, 31, dtype="bfloat16"), array(4, 31, dtype="bfloat16"), kernels=0)


def test_a_call_is_read_from_a_program_as_it_was_written() -> None:
    call = Call("gated_backward", ("x", "gate"), Spec(eps=0.5), Form("sigmoid", False, 64), with_dweight=True)  # noqa: FBT003
    assert Call.decoded(call.encoded()) == call


def draw(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32).astype(BF16)


@pytest.mark.sampled(16)
@on_eight
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_the_bits_are_those_of_one_device(kind: str, place: str) -> None:
    mesh, spec = mesh_of(kind), PLACES[place]
    x, gate, weight = draw(8, 16, N, seed=0), draw(8, 16, N, seed=1), draw(N, seed=2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(value, NamedSharding(mesh, spec)) for value in (x, gate)]
        placed.append(jax.device_put(weight, NamedSharding(mesh, P())))
        for form in ("groups", "qwen3-next"):
            y, dx, dgate, dweight = trained(x, gate, weight, **FORMS[form])
            program = jax.jit(functools.partial(trained, **FORMS[form]))
            *found, of_weight = program(*placed)
            for one, many in zip((y, dx, dgate), found, strict=True):
                assert np.asarray(many).tobytes() == np.asarray(one).tobytes()
            distance = np.abs(np.asarray(of_weight, np.float32) - np.asarray(dweight, np.float32))
            assert distance.max() <= 2.0**-7 * np.abs(np.asarray(dweight, np.float32)).max()
            text = jax.jit(functools.partial(rms_norm_gated, **FORMS[form])).lower(*placed).compile().as_text()
            if "model" not in spec or spec == PLACES["both"]:
                assert not COLLECTIVE.findall(text)


@pytest.mark.sampled(2)
@on_eight
@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_a_program_for_cuda_has_the_kernels_of_local_rows(kind: str) -> None:
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 16, N), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
        traced = jax.jit(jax.grad(lambda x: jnp.sum(rms_norm_gated(x, x)))).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) or ("@pallas_norm" in text)
    assert "stablehlo.reduce_precision" not in text  # no reference


@pytest.mark.slow
@on_eight
def test_shard_map_runs_on_local_rows() -> None:
    mesh = mesh_of("auto")
    x, gate, weight = draw(8, 16, N, seed=0), draw(8, 16, N, seed=1), draw(N, seed=2)
    for form in FORMS:
        local = functools.partial(rms_norm_gated, **FORMS[form])
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
        assert np.asarray(jax.jit(mapped)(x, gate, weight)).tobytes() == np.asarray(local(x, gate, weight)).tobytes()
