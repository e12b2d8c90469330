"""Programs with 8-bit results: lowered to one kernel for CUDA, on meshes of eight devices, in pjit and shard_map."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm_quantized, rms_norm_quantized
from tests.meshes import COLLECTIVE, mesh_of, on_eight
from tests.meshes import KINDS as MESHES
from tests.oracle import BF16
from tests.test_lowering import KINDS, ROWS, array, check

FORMS: dict[str, dict[str, Any]] = {"tensor": {"scale": np.float32(0.02)}, "row": {}, "group": {"group_size": 128}}
N = 256


@pytest.mark.sampled(41)
@pytest.mark.parametrize(
    ("dtype", "n"), [(dtype, n) for dtype, widths in KINDS.items() for n in widths[:: 1 if dtype == "bfloat16" else 3]]
)
def test_every_kind_of_plan_lowers_to_one_kernel_for_cuda_and_to_none_elsewhere(dtype: str, n: int) -> None:
    x, weight = array(ROWS, n, dtype=dtype), array(n, dtype=dtype)
    forms = {name: options for name, options in FORMS.items() if name != "group" or n % 128 == 0}
    for i, options in enumerate(forms.values()):
        kind = ("float8_e4m3fn", "int8")[(i + n) % 2]
        function = functools.partial(add_rms_norm_quantized, **options, dtype=kind, return_y=bool(n % 2))
        check(function, x, x, weight, kernels=1)


def test_no_rows_and_no_kernel_for_n_need_none() -> None:
    check(rms_norm_quantized, array(0, 256, dtype="bfloat16"), kernels=0)
    check(rms_norm_quantized, array(4, 31, dtype="bfloat16"), kernels=0)
    check(functools.partial(rms_norm_quantized, group_size=128), array(4, 1152, dtype="float32"), kernels=0)


def draw(*shape: int, seed: int) -> Any:
    return np.round(np.random.default_rng(seed).standard_normal(shape)).astype(BF16)


def call(x: Any, residual: Any, weight: Any, *, form: str) -> Any:
    return add_rms_norm_quantized(x, residual, weight, return_y=True, **FORMS[form])


PLACES = {
    "rows": P("data"),
    "both": P("data", "model"),
    "columns": P(None, None, "model"),
    "all": P("data", None, "model"),
}


@pytest.mark.sampled(16)
@on_eight
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_the_bits_are_those_of_one_device(kind: str, place: str) -> None:
    mesh, spec = mesh_of(kind), PLACES[place]
    x, residual, weight = draw(8, 16, N, seed=0), draw(8, 16, N, seed=1), draw(N, seed=2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(value, NamedSharding(mesh, spec)) for value in (x, residual)]
        for form in FORMS:
            single = call(x, residual, weight, form=form)
            program = jax.jit(functools.partial(call, form=form))
            found = program(*placed, jax.device_put(weight, NamedSharding(mesh, P())))
            for one, many in zip(single, found, strict=True):
                assert np.asarray(many).tobytes() == np.asarray(one).tobytes()
            text = program.lower(*placed, jax.device_put(weight, NamedSharding(mesh, P()))).compile().as_text()
            if "model" not in spec or spec == PLACES["both"]:
                assert not COLLECTIVE.findall(text)


@pytest.mark.sampled(2)
@on_eight
@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_a_program_for_cuda_has_the_kernel_of_local_rows(kind: str) -> None:
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 16, N), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
        traced = jax.jit(lambda x: rms_norm_quantized(x)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) or ("@pallas_norm" in text)
    assert "stablehlo.reduce_precision" not in text  # no reference


@pytest.mark.slow
@on_eight
def test_shard_map_runs_on_local_rows() -> None:
    mesh = mesh_of("auto")
    x, residual, weight = draw(8, 16, N, seed=0), draw(8, 16, N, seed=1), draw(N, seed=2)
    for form in FORMS:
        local = functools.partial(call, form=form)
        scales = P() if form == "tensor" else P("data")
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("data"), P("data"), P()),
            out_specs=(P("data"), scales, P("data"), P("data")),
        )
        for one, many in zip(local(x, residual, weight), jax.jit(mapped)(x, residual, weight), strict=True):
            assert np.asarray(many).tobytes() == np.asarray(one).tobytes()
