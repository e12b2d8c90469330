"""Which calls of a patched norm launch a kernel, of what they are given; and the report, which asks the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pallas_norm_torch import _launches, direct
from pallas_norm_torch.huggingface import patch, patched
from tests.interop.launched import as_if_launched
from tests.interop.norm_classes import BF16, F16, F32, N, llama
from tests.interop.tiny_models import one_thread  # noqa: F401 (a fixture of every test here)


def plain(dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(4, N, dtype=dtype), torch.ones(N, dtype=dtype)


def test_nothing_is_launched_on_a_cpu() -> None:
    assert not _launches.launched(*plain())


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_plain_operands_are_launched_where_there_is_a_kernel(dtype: torch.dtype) -> None:
    with as_if_launched():
        x, weight = plain(dtype)
        assert _launches.launched(x, weight)
        assert _launches.launched(x, nn.Parameter(weight))
        assert _launches.launched(x)
        assert _launches.launched(x, weight, x)


class Subclass(torch.Tensor):
    pass


UNUSUAL = {
    "float64 x": lambda x, w: (x.double(), w),
    "float64 weight": lambda x, w: (x, w.double()),
    "integers": lambda x, w: (x.int(), w),
    "float8": lambda x, w: (x.to(torch.float8_e4m3fn), w),
    "a lazily negated x": lambda x, w: (torch._neg_view(x), w),
    "a lazily negated weight": lambda x, w: (x, torch._neg_view(w)),
    "a subclass": lambda x, w: (x.as_subclass(Subclass), w),
    "a subclass as the weight": lambda x, w: (x, w.as_subclass(Subclass)),
    "meta": lambda x, w: (x.to("meta"), w.to("meta")),
    "a weight elsewhere": lambda x, w: (x, w.to("meta")),
    "a weight that is broadcast": lambda x, w: (x, w[:1]),
    "a weight of two axes": lambda x, w: (x, w[None]),
    "no axis": lambda x, w: (x[0, 0], None),
    "empty rows": lambda x, w: (x[:, :0], None),
    "sparse": lambda x, w: (x.to_sparse(), w),
    "a zero tensor": lambda x, w: (torch._efficientzerotensor(x.shape, dtype=x.dtype), w),
    "no tensor": lambda x, w: (None, w),
    "a proxy": lambda x, w: (torch.fx.Proxy(torch.fx.Graph().placeholder("x")), w),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_operands_are_not(name: str) -> None:
    with as_if_launched():
        assert not _launches.launched(*UNUSUAL[name](*plain()))


def test_tensors_of_inference_mode_train_in_its_own_forward() -> None:
    """Autograd cannot save them, but what it computes from them."""
    with as_if_launched():
        with torch.inference_mode():
            x = torch.randn(4, N)
            assert _launches.launched(x, torch.ones(N))
        assert not _launches.launched(x, torch.ones(N))
        with torch.no_grad():
            assert _launches.launched(x, torch.ones(N))
        module = llama()
        patch(module)
        module(x).sum().backward()
        assert module.weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, for its formulas
def test_forward_mode_is_its_own_forward_s() -> None:
    module, x = llama(), torch.randn(4, N)
    expected = torch.func.jvp(module, (x,), (x,))
    with as_if_launched(), patched(module):
        actual = torch.func.jvp(module, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, x))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert tangent is not None
    assert torch.equal(tangent, expected[1])


def test_the_report_says_where_the_norms_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([llama(), llama(), llama()])
    assert patch(model).runs == {"in their own forward: they are on cpu, and the kernels take CUDA tensors": 3}
    model.double()
    assert patch(model).runs == {
        "in their own forward: they are in float64, and the kernels take bfloat16, float16 and float32": 3
    }
    assert patch(llama().to("meta")).runs == {
        "in their own forward: they are on meta, and the kernels take CUDA tensors": 1
    }


def test_the_report_asks_what_a_launch_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    old = "cuda:0 has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"
    reasons = iter([None, old])
    monkeypatch.setattr(direct, "unavailable", lambda n, device, dtype: next(reasons))
    module = nn.Module()
    module.weight = torch.empty(0)
    monkeypatch.setattr(nn.Module, "parameters", lambda self, recurse=True: iter([OnCuda()]))
    assert _launches.place(module, None) == "with kernels on cuda:0"
    assert _launches.place(module, None) == f"in their own forward: {old}"


class OnCuda:
    dtype, shape, device = BF16, (N,), torch.device("cuda:0")
