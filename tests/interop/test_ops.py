"""rms_norm and add_rms_norm for torch: the bits of JAX's where the kernel or JAX computes them, whatever the dtype, the
shape and the strides. test_statements.py is of the other way."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools

import pytest
import torch

from pallas_norm_torch import RMSNorm, add_rms_norm, explain, rms_norm
from tests.interop.cases import (
    DEVICES,
    DTYPES,
    add_by_jax,
    assert_same,
    bits,
    by_jax,
    draw,
    gradients_by_jax,
    hugging_face,
    way_of_jax,
)

WIDTHS = (1, 8, 32, 33, 64, 80, 128, 200, 896, 1000, 1024, 2880, 4096, 4097)
LONG = [pytest.param(n, marks=pytest.mark.gpu) for n in (8192, 16384, 32768, 65536, 131072, 131073)]


@pytest.mark.sampled(42)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [*WIDTHS, *LONG])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_jax_s(dtype: torch.dtype, n: int, device: str) -> None:
    x, weight = draw(37, n, dtype=dtype, device=device), draw(n, dtype=dtype, device=device, seed=1)
    way = way_of_jax(x)
    assert_same(rms_norm(x, weight, **way), by_jax(x, weight))
    assert_same(rms_norm(x, **way), by_jax(x))
    y, s = add_rms_norm(x, x.flip(0), weight, **way)
    for found, expected in zip((y, s), add_by_jax(x, x.flip(0), weight), strict=True):
        assert_same(found, expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.permutations(DTYPES, 2)], ids=str)
def test_a_weight_of_another_dtype_promotes(dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    x, weight = draw(5, 96, dtype=dtype, device=device), draw(96, dtype=weight_dtype, device=device)
    y = rms_norm(x, weight, **way_of_jax(x))
    assert y.dtype == rms_norm(x, weight).dtype == torch.promote_types(dtype, weight_dtype)
    assert_same(y, by_jax(x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_and_an_offset(dtype: torch.dtype, device: str) -> None:
    x, weight = draw(9, 256, dtype=dtype, device=device), draw(256, dtype=dtype, device=device)
    options = {"cast_before_scale": False, "weight_offset": 1.0, "eps": 1e-5}
    assert_same(rms_norm(x, weight, **options, **way_of_jax(x)), by_jax(x, weight, **options))
    wide = x.float()
    once = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + weight.float())).to(dtype)
    differ = (bits(rms_norm(x, weight, **options)) != bits(once)).float().mean()
    assert differ <= 0.02 or dtype is torch.float32  # an rstd one ULP off changes few elements


@pytest.mark.parametrize("device", DEVICES)
def test_eps_of_zero_is_zero(device: str) -> None:
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
    x[0] = 2.0**-60
    y = rms_norm(x, eps=0.0)
    assert bool((y[0] == 1.0).all())
    assert bool(y[1].isnan().all())
    assert bool((rms_norm(x, eps=1e-6)[0] < 1e-10).all())


@pytest.mark.parametrize("device", DEVICES)
def test_the_options_of_one_call_are_not_those_of_another(device: str) -> None:
    x, weight = draw(4, 64, dtype=torch.float32, device=device), draw(64, dtype=torch.float32, device=device)
    first = rms_norm(x, weight, 1e-6)
    for _ in range(2):  # checked, then by a prepared call
        assert not torch.equal(rms_norm(x, weight, 1e-2), first)
        assert not torch.equal(rms_norm(x, weight, weight_offset=1.0), first)
        assert torch.equal(rms_norm(x, weight, 1e-6), first)
    half = x.bfloat16()
    assert not torch.equal(
        rms_norm(half, weight.bfloat16()), rms_norm(half, weight.bfloat16(), cast_before_scale=False)
    )


def test_the_bits_are_hugging_face_s_where_its_sum_is_exact() -> None:
    x = torch.randint(-8, 9, (300, 512)).to(torch.bfloat16)
    weight = draw(512, dtype=torch.bfloat16)
    assert_same(rms_norm(x, weight), hugging_face(x, weight))
    single = torch.nn.functional.rms_norm(x, (512,), weight, 1e-6)
    assert (bits(rms_norm(x, weight)) != bits(single)).float().mean() > 0.1  # what this library exists for


@pytest.mark.parametrize("device", DEVICES)
def test_any_leading_axes(device: str) -> None:
    x = draw(2, 3, 5, 64, dtype=torch.bfloat16, device=device)
    whole = rms_norm(x)
    assert_same(whole[1, 2, 3], rms_norm(x[1, 2, 3]))
    assert rms_norm(x[:0]).shape == (0, 3, 5, 64)
    y, s = add_rms_norm(x[:, :0], x[:, :0])
    assert y.shape == s.shape == (2, 0, 5, 64)


def _views(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    flat = draw(64 * 41 * 3, dtype=dtype, device=device)
    fused = draw(7, 5, 96, dtype=dtype, device=device)
    return {
        "heads of a fused projection": fused[:, 1:4, :64],
        "columns": draw(11, 80, dtype=dtype, device=device)[:, 8:72],
        "columns at an odd address": draw(11, 80, dtype=dtype, device=device)[:, 7:71],
        "every other row": draw(12, 64, dtype=dtype, device=device)[::2],
        "rows from an odd address on": flat[1 : 1 + 64 * 40].view(40, 64),
        "rows from an address that is no multiple of 256 bytes": flat[64:].view(-1, 64)[: 41 * 2],
        "expanded": draw(64, dtype=dtype, device=device).expand(6, 64),
        "transposed": draw(64, 9, dtype=dtype, device=device).T,
        "three strides": draw(4, 6, 8, 80, dtype=dtype, device=device)[::2, ::3, ::4, :64],
        "permuted": draw(3, 5, 7, 64, dtype=dtype, device=device).permute(2, 0, 1, 3),
        "one row": draw(3, 80, dtype=dtype, device=device)[1, 8:72],
    }


VIEWS = tuple(_views(torch.bfloat16, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_and_offsets_do_not_matter(view: str, dtype: torch.dtype, device: str) -> None:
    """A kernel's addresses are compiled as multiples of 256 bytes; those of a view need not be."""
    x = _views(dtype, device)[view]
    weight = draw(64, dtype=dtype, device=device, seed=1)
    before, plain = x.clone(), x.clone(memory_format=torch.contiguous_format)
    assert_same(rms_norm(x, weight), rms_norm(plain, weight))
    for found, expected in zip(
        add_rms_norm(x, x.flip(-1), weight), add_rms_norm(plain, plain.flip(-1), weight), strict=True
    ):
        assert_same(found, expected)
    assert_same(x, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "expanded"])
def test_in_place_writes_the_rows_and_nothing_else(view: str, device: str) -> None:
    x = _views(torch.bfloat16, device)[view]
    base = x if x._base is None else x._base
    weight = draw(64, dtype=torch.bfloat16, device=device, seed=1)
    expected_base = base.clone(memory_format=torch.preserve_format)
    expected = expected_base.as_strided(x.shape, x.stride(), x.storage_offset())
    expected.copy_(rms_norm(x, weight))
    version = x._version
    assert rms_norm(x, weight, out=x) is x
    assert_same(base, expected_base)
    assert x._version > version  # or autograd would use what it saved without noticing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "n", [64, 4096, pytest.param(65536, marks=pytest.mark.gpu), pytest.param(65541, marks=pytest.mark.gpu)]
)
def test_out_receives_y(n: int, device: str) -> None:
    x, weight = draw(6, n, dtype=torch.bfloat16, device=device), draw(n, dtype=torch.float32, device=device)
    expected = rms_norm(x, weight)
    out = torch.full_like(expected, torch.nan)
    for _ in range(2):
        assert rms_norm(x, weight, out=out) is out
        assert_same(out, expected)
    wide = torch.full((6, n + 8), torch.nan, device=device)
    rms_norm(x, weight, out=wide[:, :n])
    assert_same(wide[:, :n], expected)
    assert bool(wide[:, n:].isnan().all())
    narrow = x.clone()
    for _ in range(2):
        x.copy_(narrow)
        rms_norm(x, weight.bfloat16(), out=x)
        assert_same(x, rms_norm(narrow, weight.bfloat16()))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "n", [33, 128, 1000, pytest.param(4096, marks=pytest.mark.gpu), pytest.param(16384, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_bits_of_jax_s(dtype: torch.dtype, n: int, device: str) -> None:
    rows = 301
    x, residual, dy, ds = (draw(rows, n, dtype=dtype, device=device, seed=seed) for seed in range(4))
    weight = draw(n, dtype=dtype, device=device, seed=4)
    way = way_of_jax(x)
    operands = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    found = torch.autograd.grad(rms_norm(*operands, **way), operands, dy)
    for gradient, expected in zip(found, gradients_by_jax(x, weight, dy), strict=True):
        assert_same(gradient, expected)
    operands = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    found = torch.autograd.grad(add_rms_norm(*operands, **way), operands, (dy, ds))
    for gradient, expected in zip(found, gradients_by_jax(x, residual, weight, dy, ds), strict=True):
        assert_same(gradient, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_operands_and_unused_results(device: str) -> None:
    x, weight = draw(17, 128, dtype=torch.float32, device=device), draw(128, dtype=torch.float32, device=device)
    x_leaf, weight_leaf = x.clone().requires_grad_(), weight.clone().requires_grad_()
    dx, dweight = torch.autograd.grad(rms_norm(x_leaf, weight_leaf).sum(), (x_leaf, weight_leaf))
    (alone,) = torch.autograd.grad(rms_norm(x_leaf, weight).sum(), x_leaf)
    assert_same(alone, dx)
    (alone,) = torch.autograd.grad(rms_norm(x, weight_leaf).sum(), weight_leaf)
    assert_same(alone, dweight)
    _, s = add_rms_norm(x_leaf, x, weight)
    (alone,) = torch.autograd.grad(s.sum(), x_leaf)
    assert_same(alone, torch.ones_like(x))
    assert not rms_norm(x, weight).requires_grad
    with torch.no_grad():
        assert not rms_norm(x_leaf, weight_leaf).requires_grad
    with torch.inference_mode():
        assert_same(rms_norm(x_leaf, weight_leaf).clone(), rms_norm(x, weight))


def test_autocast_adds_no_cast() -> None:
    x, weight = draw(4, 64, dtype=torch.bfloat16), draw(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rms_norm(x, weight).dtype == hugging_face(x, weight).dtype == torch.float32
        assert rms_norm(x.float(), weight).dtype == torch.float32
        assert rms_norm(x.float()).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_eight_threads(device: str) -> None:
    shapes = [(rows, n) for n in (33, 64, 128, 1000, 4096) for rows in (1, 17, 90)]
    operands = [
        (draw(*shape, dtype=torch.bfloat16, device=device), draw(shape[1], dtype=torch.bfloat16, device=device))
        for shape in shapes
    ]
    expected = [rms_norm(*pair) for pair in operands]

    def work(seed: int) -> None:
        for i in range(40):
            k = (seed * 7 + i) % len(operands)
            if i % 9 == 0:
                with pytest.raises(ValueError, match="weight has shape"):
                    rms_norm(operands[k][0], operands[k - 3][1] if k % 3 == 0 else operands[k][1][:-1])
            assert_same(rms_norm(*operands[k]), expected[k])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result()


@pytest.mark.slow
def test_round_trips_do_not_accumulate_memory() -> None:
    """60,000 round trips through JAX: what each leaves behind would be seen."""
    import resource

    from pallas_norm_torch import to_jax, to_torch

    tensor = torch.ones(1024)

    def trips(count: int) -> int:
        for _ in range(count):
            to_torch(to_jax(tensor))
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = trips(5_000)
    assert trips(60_000) - before < 4_000  # KB; one array kept for each would be 245,000


@pytest.mark.parametrize("device", DEVICES)
def test_the_module_has_the_parameter_and_the_bits_of_hugging_face_s(device: str) -> None:
    norm = RMSNorm(96, eps=1e-5, device=device, dtype=torch.bfloat16)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert repr(norm) == "RMSNorm(96, eps=1e-05)"
    x = draw(5, 96, dtype=torch.bfloat16, device=device)
    assert_same(norm(x), rms_norm(x, norm.weight.detach(), 1e-5).detach())
    gemma = RMSNorm(96, cast_before_scale=False, weight_offset=1.0)
    assert gemma.weight.detach().abs().sum() == 0.0
    assert repr(gemma) == "RMSNorm(96, eps=1e-06, cast_before_scale=False, weight_offset=1.0)"
    assert RMSNorm(96, with_weight=False).weight is None
    assert RMSNorm(96, eps=None).eps == torch.finfo(torch.float32).eps  # as torch.nn.RMSNorm


@pytest.mark.gpu
def test_the_kernel_is_launched_directly_on_a_gpu() -> None:
    assert explain(4096, torch.bfloat16).startswith("direct launch on torch's current stream of cuda:0: the cta kernel")
    assert "no direct launch, because no kernel for rows of 8 elements" in explain(8, torch.bfloat16)
