"""What rms_norm_rope and its operators refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm_torch import _rope_library, rms_norm_rope
from tests.interop.fake_kernels import made as made
from tests.interop.rope_cases import operands

Tensor = torch.Tensor
Q, K, ANGLES = torch.ones(2, 4, 3, 64), torch.ones(2, 4, 1, 64), torch.ones(4, 64)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no tensor": (
        (Q, [1.0], ANGLES, ANGLES),
        {},
        TypeError,
        "k is a list; needed a torch.Tensor: wrap it with torch.as_tensor (a JAX or NumPy array: use "
        "pallas_norm.rms_norm)",
    ),
    "device": (
        (Q, K.to("meta"), ANGLES, ANGLES),
        {},
        ValueError,
        "k is on meta but q is on cpu; move one of them with .to",
    ),
    "k": (
        (Q, K[:, :3], ANGLES, ANGLES),
        {},
        ValueError,
        "k is float32[2,3,1,64] on cpu but q is float32[2,4,3,64] on cpu; needed the same shape but for the heads",
    ),
    "angles": (
        (Q, K, ANGLES[..., :32], ANGLES[..., :32]),
        {},
        ValueError,
        "cos is float32[4,32] on cpu but q is float32[2,4,3,64] on cpu; needed [2,4,64] or the last axes of it, from "
        "the positions on: a row of n angles for each token (rotate part of a head in steps of your own)",
    ),
    "dtype": (
        (Q.bfloat16(), K.bfloat16(), ANGLES, ANGLES),
        {},
        TypeError,
        "cos is float32[4,64] on cpu; needed bfloat16, the dtype of what is rotated: cast it first",
    ),
    "one weight": (
        (Q, K, ANGLES, ANGLES, ANGLES[0]),
        {},
        ValueError,
        "k_weight is None but q_weight is not; needed both, or none: pass ones for one of them",
    ),
    "eps": ((Q, K, ANGLES, ANGLES), {"eps": -1.0}, ValueError, "eps is -1.0; needed eps >= 0: it is added to a mean of squares"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told(name: str) -> None:
    given, options, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        rms_norm_rope(*given, **options)
    assert str(raised.value) == message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["operator", "meta", "gradient", "gradient of meta", "compiled", "exported"])
def test_options_are_checked_wherever_they_come_from(how: str) -> None:
    given = [torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 8), torch.ones(3, 8)]
    if how.endswith("meta"):
        given = [one.to("meta") for one in given]

    class Rotating(torch.nn.Module):
        def __init__(self, options: dict[str, Any]) -> None:
            super().__init__()
            self.options = options

        def forward(self, *operands: Tensor) -> Any:
            return rms_norm_rope(*operands, **self.options)

    def call(options: dict[str, Any]) -> Any:
        ours, all_of_them = torch.ops.pallas_norm, {"eps": 1e-6, "cast_before_scale": True, "weight_offset": 0.0}
        in_order = tuple((all_of_them | options).values())
        if how == "compiled":
            return torch.compile(Rotating(options), backend="eager", fullgraph=True)(*given)
        if how == "exported":
            return torch.export.export(Rotating(options), tuple(given))
        if how.startswith("gradient"):
            return ours.rms_norm_rope_backward(*given, None, None, *given[:2], *in_order)
        return ours.rms_norm_rope(*given, None, None, *in_order)

    wrong: dict[str, Any] = {"eps is -5.0; needed eps >= 0": {"eps": -5.0}}
    wrong["weight_offset is 1.0 but weight is None"] = {"weight_offset": 1.0}
    if how in ("compiled", "exported"):  # the dispatcher knows a bool by itself
        wrong["cast_before_scale is int; needed True or False"] = {"cast_before_scale": 7}
    call({})
    for message, options in wrong.items():
        with pytest.raises(Exception, match=message):
            call(options)


@pytest.mark.usefixtures("made")
def test_gradients_that_are_not_of_q_and_k_reach_no_kernel() -> None:
    q, k, cos, sin, *weights = operands(16, torch.bfloat16, tokens=(3,))
    dq, dk = torch.ones_like(q), torch.ones_like(k)
    backward, options = torch.ops.pallas_norm.rms_norm_rope_backward, (1e-6, True, 0.0)
    for gradients, error, message in (
        ((dq[:, :1], dk), ValueError, "dq_out has shape (3, 1, 16); needed (3, 5, 16), which belongs to q"),
        ((dq, dk[1:]), ValueError, "dk_out has shape (2, 3, 16); needed (3, 3, 16), which belongs to k"),
        ((dq, dk.to("meta")), ValueError, "dk_out is on meta but k is on cpu; move one of them with .to"),
        ((dq.half(), dk), TypeError, "dq_out is float16[3,5,16] on cpu; needed bfloat16: cast it first"),
    ):
        with pytest.raises(error) as raised:
            _rope_library._backward(q, k, cos, sin, *weights, *gradients, *options)
        assert str(raised.value) == message
    with pytest.raises(ValueError, match="sin is bfloat16"):
        backward(q, k, cos, sin[:2], *weights, dq, dk, *options)
