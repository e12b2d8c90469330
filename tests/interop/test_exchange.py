"""to_jax and to_torch: the same memory, the same bits, and what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pallas_norm
import pallas_norm_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).parents[2]


def every_16_bits(dtype: torch.dtype) -> torch.Tensor:
    """Each of the 65,536 bit patterns of a 16-bit dtype, NaNs and subnormals too; for float32, as its upper half."""
    patterns = torch.arange(65536, dtype=torch.int32)
    if dtype is torch.float32:
        return (patterns << 16).view(torch.float32)
    return patterns.to(torch.int16).view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_directions_share_memory_and_keep_every_bit(dtype: torch.dtype) -> None:
    tensor = every_16_bits(dtype).reshape(256, 256)
    array = pallas_norm_torch.to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.shape == (256, 256)
    assert str(array.dtype) == str(dtype).removeprefix("torch.")
    integer = jnp.int16 if tensor.element_size() == 2 else jnp.int32
    np.testing.assert_array_equal(np.asarray(array).view(integer), bits(tensor).numpy())

    back = pallas_norm_torch.to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype
    assert torch.equal(bits(back), bits(tensor))


def test_the_memory_outlives_the_object_it_came_from() -> None:
    tensor = torch.arange(4096, dtype=torch.float32)
    array = pallas_norm_torch.to_jax(tensor)
    del tensor
    back = pallas_norm_torch.to_torch(array)
    del array
    assert torch.equal(back, torch.arange(4096, dtype=torch.float32))


def test_no_rows() -> None:
    assert pallas_norm_torch.to_jax(torch.zeros(0, 64)).shape == (0, 64)
    assert pallas_norm_torch.to_torch(jnp.zeros((0, 64))).shape == (0, 64)


def test_what_cannot_be_shared_is_copied_only_on_request() -> None:
    tensor = torch.arange(4097, dtype=torch.float32)[1:]
    assert tensor.data_ptr() % 64 == 4
    with pytest.raises(ValueError, match="begins 4 bytes past a multiple of 64"):
        pallas_norm_torch.to_jax(tensor)
    array = pallas_norm_torch.to_jax(tensor, copy=True)
    tensor.zero_()
    np.testing.assert_array_equal(np.asarray(array), np.arange(1, 4097, dtype=np.float32))
    strided = torch.arange(128.0).reshape(2, 64)[:, :32]
    np.testing.assert_array_equal(np.asarray(pallas_norm_torch.to_jax(strided, copy=True)), strided.numpy())


def test_jax_would_copy_what_is_not_aligned_to_64_bytes() -> None:
    """The reason for the rule. If this fails, JAX has changed and to_jax is stricter than it must be."""
    tensor = torch.arange(4097, dtype=torch.float32)[1:]
    assert jnp.from_dlpack(tensor).unsafe_buffer_pointer() != tensor.data_ptr()


def test_call_jax_takes_trees_and_gives_tensors_back() -> None:
    x, y = torch.arange(8.0), torch.arange(16.0)[1::2]
    results = pallas_norm_torch.call_jax(lambda x, other, k: {"sum": (x + other["y"]) * k}, x, {"y": y}, 2)
    assert torch.equal(results["sum"], (x + y) * 2)
    assert isinstance(results["sum"], torch.Tensor)


def test_call_jax_detaches_and_refuses_two_devices() -> None:
    x = torch.arange(8.0, requires_grad=True)
    assert not pallas_norm_torch.call_jax(lambda x: x * 2, x).requires_grad
    with pytest.raises(ValueError, match=r"tensor is on the device meta; needed one of cpu, cuda"):
        pallas_norm_torch.call_jax(lambda x, y: x, torch.zeros(8), torch.zeros(8, device="meta"))


def test_an_error_inside_call_jax_leaves_the_next_call_right() -> None:
    def fails(x: jax.Array) -> jax.Array:
        raise LookupError("of the caller's own")

    for _ in range(3):
        with pytest.raises(LookupError, match="of the caller's own"):
            pallas_norm_torch.call_jax(fails, torch.ones(64))
        assert torch.equal(pallas_norm_torch.call_jax(lambda x: x + 1, torch.ones(64)), torch.full((64,), 2.0))


@pytest.mark.gpu
def test_an_operand_of_call_jax_may_be_dropped_at_once() -> None:
    """JAX's GPU client frees an imported tensor with its array, while the kernel still reads: the results of many calls
    whose operands are temporaries must not see the memory's next use."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, x: x * 1.0001 / 1.0001, x) * 0 + x)
    results = [pallas_norm_torch.call_jax(slow, torch.full((1 << 22,), float(i), device="cuda")) for i in range(40)]
    for i, result in enumerate(results):
        assert bool((result == i).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_torch_tensor_gets_the_same_bits_as_a_jax_array(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(20)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 896), (896,)))
    y = pallas_norm_torch.to_torch(pallas_norm.rms_norm(pallas_norm_torch.to_jax(x), pallas_norm_torch.to_jax(weight)))
    name = str(dtype).removeprefix("torch.")
    host = [jnp.asarray(tensor.float().numpy()).astype(name) for tensor in (x, weight)]
    expected = pallas_norm.rms_norm(*host)
    assert torch.equal(bits(y), bits(torch.from_dlpack(expected)))


def test_a_parameter_without_grad_is_a_tensor() -> None:
    parameter = torch.nn.Parameter(torch.ones(64), requires_grad=False)
    assert pallas_norm_torch.to_jax(parameter).unsafe_buffer_pointer() == parameter.data_ptr()


REFUSED = {
    "float64": (
        lambda: torch.zeros(2, 64, dtype=torch.float64),
        TypeError,
        "tensor is float64[2,64], which JAX would narrow to float32; needed a dtype that JAX keeps: cast it with "
        'tensor.to, or call jax.config.update("jax_enable_x64", True) before anything else',
    ),
    "int64": (
        lambda: torch.zeros(64, dtype=torch.int64),
        TypeError,
        "tensor is int64[64], which JAX would narrow to int32; needed a dtype that JAX keeps: cast it with "
        'tensor.to, or call jax.config.update("jax_enable_x64", True) before anything else',
    ),
    "requires grad": (
        lambda: torch.zeros(2, 64, requires_grad=True),
        ValueError,
        "tensor is float32[2,64] and requires grad, but autograd cannot see what JAX computes; "
        "needed a tensor that does not: pass tensor.detach()",
    ),
    "transposed": (
        lambda: torch.zeros(2, 64).T,
        ValueError,
        "tensor is float32[64,2] and has strides (1, 64), which is not contiguous, so JAX would copy it; needed memory "
        "that can be shared: pass copy=True, or tensor.clone(memory_format=torch.contiguous_format)",
    ),
    "sliced": (
        lambda: torch.zeros(2, 64)[:, :32],
        ValueError,
        "tensor is float32[2,32] and has strides (64, 1), which is not contiguous, so JAX would copy it; needed memory "
        "that can be shared: pass copy=True, or tensor.clone(memory_format=torch.contiguous_format)",
    ),
    "negated lazily": (
        lambda: torch.complex(torch.zeros(64), torch.ones(64)).conj().imag,
        TypeError,
        "tensor is float32[64] and conjugated or negated lazily, so its memory holds other values; "
        "needed the values themselves: pass tensor.resolve_conj().resolve_neg()",
    ),
    "sparse": (
        lambda: torch.eye(4).to_sparse(),
        TypeError,
        "tensor has the layout torch.sparse_coo; needed torch.strided: pass tensor.to_dense()",
    ),
    "meta": (
        lambda: torch.zeros(2, 64, device="meta"),
        ValueError,
        "tensor is on the device meta; needed one of cpu, cuda: move it with tensor.to first",
    ),
    "fake": (
        lambda: FakeTensorMode().from_tensor(torch.zeros(2, 64)),
        TypeError,
        "tensor is a FakeTensor; needed a torch.Tensor or torch.nn.Parameter itself: convert it first",
    ),
    "numpy": (
        lambda: np.zeros(64, np.float32),
        TypeError,
        "tensor is a ndarray; needed a torch.Tensor or torch.nn.Parameter itself: convert it first",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_to_jax_refuses(make, error, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        pallas_norm_torch.to_jax(make())


def test_to_torch_refuses_what_is_no_array() -> None:
    message = "array is a ndarray; needed a jax.Array: wrap it with jnp.asarray"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        pallas_norm_torch.to_torch(np.zeros(64))  # pyright: ignore[reportArgumentType]


def test_to_torch_refuses_a_traced_array() -> None:
    message = (
        "array is float32[64] being traced, so it has no elements yet; needed a computed jax.Array: "
        "call to_torch outside jit, grad and vmap"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}\n"):  # JAX adds a note on its frames
        jax.jit(pallas_norm_torch.to_torch)(jnp.zeros(64))


TWO_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pallas_norm_torch
mesh = jax.make_mesh((2,), ("rows",))
try:
    pallas_norm_torch.to_torch(jax.device_put(jnp.zeros((2, 64)), NamedSharding(mesh, PartitionSpec("rows"))))
except ValueError as error:
    print(error)
"""
NO_TORCH = """
import sys
sys.modules["torch"] = None  # what `import torch` does where there is none
try:
    import pallas_norm_torch
except ImportError as error:
    print(error)
"""


def output_of(program: str, **environment: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


@pytest.mark.slow
def test_to_torch_refuses_an_array_on_two_devices() -> None:
    two = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert output_of(TWO_DEVICES, **two) == (
        "array lies on 2 devices; needed one: gather it with jax.device_put(array, jax.devices()[0])"
    )


def test_importing_without_torch_tells_how_to_install_it() -> None:
    assert output_of(NO_TORCH) == (
        "pallas_norm_torch needs PyTorch, which is not installed: pip install 'pallas-norm[torch]'"
    )


def imported_with(folder: Path, version: str) -> str:
    """The last line of what a process says that imports pallas_norm_torch with a torch of which a name is gone."""
    (folder / "torch.py").write_text(f"__version__ = {version!r}\n__path__ = []\n")
    (folder / "sitecustomize.py").write_text(GONE)
    command = [sys.executable, "-c", "import pallas_norm_torch"]
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


# Whatever is imported first of torch's insides, it is not there.
GONE = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch."):
            raise ImportError("a name is gone")

sys.meta_path.insert(0, Gone())
"""


def test_a_torch_that_is_not_tested_and_does_not_do_is_named_with_those_that_are(tmp_path: Path) -> None:
    assert imported_with(tmp_path, "1.9.0") == (
        "ImportError: pallas_norm_torch does not import with torch 1.9.0 (ImportError: a name is gone); it is tested "
        "with torch 2.11 to 2.14: pip install 'torch>=2.11,<2.15'"
    )


def test_what_is_wrong_with_a_tested_torch_is_not_said_to_be_its_version(tmp_path: Path) -> None:
    assert imported_with(tmp_path, "2.13.0+cpu") == "ImportError: a name is gone"
