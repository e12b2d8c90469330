"""rms_norm_gated of torch has the bits of Hugging Face's bodies, and a patched module computes by it what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from pallas_norm_torch import patched, rms_norm_gated
from tests.interop.cases import DTYPES, assert_same, draw
from tests.interop.gated_cases import operands
from tests.interop.launched import as_if_launched

Tensor = torch.Tensor
# Hugging Face's modules of rows of 256 elements, and the arguments that are theirs.
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba2": (lambda: MambaRMSNormGated(256, 64), {"norm_before_gate": False, "group_size": 64}),
    "falcon-h1": (lambda: FalconH1RMSNormGated(256, n_groups=2), {"cast_before_scale": False, "group_size": 128}),
    "falcon-h1, gate first": (
        lambda: FalconH1RMSNormGated(256, n_groups=2, norm_before_gate=False),
        {"norm_before_gate": False, "cast_before_scale": False, "group_size": 128},
    ),
    "qwen3-next": (lambda: Qwen3NextRMSNormGated(256), {}),
    "kimi": (lambda: KimiLinearRMSNormGated(256), {"activation": "sigmoid", "cast_before_scale": False}),
}


@pytest.mark.parametrize("of_weight", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_the_bits_are_those_of_hugging_faces_body(name: str, dtype: torch.dtype, of_weight: str) -> None:
    make, options = BODIES[name]
    module, (x, gate, weight) = make(), operands(dtype, 256)
    module.weight.data = weight if of_weight == "same" else weight.float()
    if name != "mamba2":
        options = options | {"out_dtype": dtype}
    leaves = x.requires_grad_(), gate.requires_grad_(), module.weight
    expected = module(x, gate)
    found = rms_norm_gated(x, gate, module.weight, module.variance_epsilon, **options)
    assert_same(found, expected)
    dy = draw(*expected.shape, dtype=expected.dtype, seed=3)
    gradients = [torch.autograd.grad(y, leaves, dy) for y in (found, expected)]
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-20}[dtype]
    for i, (one, other) in enumerate(zip(*gradients, strict=True)):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= rounding * other.abs().max()
        if dtype != torch.float32 and i < 2:  # of dweight's products each is rounded there
            assert (one != other).float().mean() <= 0.002


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_a_patched_module_computes_by_it_what_its_own_forward_does(name: str, dtype: torch.dtype) -> None:
    module, (x, gate, weight) = BODIES[name][0](), operands(dtype, 256)
    module.weight.data = weight
    with torch.no_grad():
        expected, alone = module(x, gate), None if name in ("qwen3-next", "kimi") else module(x)
        with patched(module), as_if_launched():
            calls: list[Any] = []
            function = rms_norm_gated

            def counted(*given: Any, **options: Any) -> Tensor:
                calls.append(options)
                return function(*given, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("pallas_norm_torch._forwards.rms_norm_gated", counted)
                assert_same(module(x, gate), expected)
                assert len(calls) == 1
                assert_same(module(x, gate.double()), module.__class__.__mro__[1].forward(module, x, gate.double()))
                assert_same(module(x, gate[..., :1]), module.__class__.__mro__[1].forward(module, x, gate[..., :1]))
                assert len(calls) == 1  # another dtype, or a gate to broadcast, is the class's own
                if alone is not None:
                    assert_same(module(x), alone)
                elif name == "qwen3-next":
                    module.activation = "gelu"
                    assert_same(module(x, gate), type(module).__mro__[1].forward(module, x, gate))
                    assert len(calls) == 1
