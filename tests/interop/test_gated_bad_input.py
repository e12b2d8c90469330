"""What rms_norm_gated and its operators refuse, and how they say it."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

from pallas_norm_torch import rms_norm_gated

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no gate": ({"gate": None}, TypeError, "gate is None; needed a tensor: call rms_norm where there is no gate"),
    "a gate of another shape": (
        {"gate": torch.ones(2, 1)},
        ValueError,
        "gate is float32[2,1] on cpu but x is float32[2,192] on cpu; needed the same shape: expand it first",
    ),
    "a gate elsewhere": (
        {"gate": torch.ones(2, 192, device="meta")},
        ValueError,
        "gate is on meta but x is on cpu; move one of them with .to",
    ),
    "a gate of another dtype": (
        {"gate": torch.ones(2, 192, dtype=torch.float64)},
        TypeError,
        "gate is float64[2,192] on cpu; needed bfloat16, float16 or float32: cast it with gate.to",
    ),
    "activation": ({"activation": "relu"}, ValueError, 'activation is \'relu\'; needed "silu" or "sigmoid"'),
    "no activation": ({"activation": None}, TypeError, 'activation is NoneType; needed "silu" or "sigmoid"'),
    "norm_before_gate": ({"norm_before_gate": 1}, TypeError, "norm_before_gate is int; needed True or False"),
    "group": (
        {"group_size": 128},
        ValueError,
        "group_size is 128 but the last axis of x has length 192; needed a number that divides it: pass "
        "group_size=None to normalise whole rows",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told(name: str) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        rms_norm_gated(torch.ones(2, 192), **{"gate": torch.ones(2, 192)} | options)
    assert str(raised.value) == message


GROUP_OF_128 = (
    "group_size is 128 but the last axis of x has length 192; needed a number that divides it: pass group_size=None to "
    "normalise whole rows"
)
NO_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "gelu"}, 'activation is \'gelu\'; needed "silu" or "sigmoid"'),
    "group": ({"group": 128}, GROUP_OF_128),
    "a negative group": ({"group": -64}, GROUP_OF_128.replace("128", "-64")),
    "eps": ({"eps": -5.0}, "eps is -5.0; needed eps >= 0: it is added to a mean of squares"),
    "weight_offset": (
        {"weight_offset": 1.0},
        "weight_offset is 1.0 but weight is None: there is nothing to add it to; pass a weight",
    ),
    "out_dtype": (
        {"out_dtype": torch.float64},
        "out_dtype is float64; needed torch.bfloat16, torch.float16, torch.float32 or None",
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NO_OPTIONS)
def test_options_that_an_operator_does_not_take_are_told(name: str, device: str) -> None:
    """Also by what says how a result looks, without computing it."""
    given, message = NO_OPTIONS[name]
    x, error = torch.ones(2, 192, device=device), TypeError if name == "out_dtype" else ValueError
    usual = {"activation": "silu", "norm_before_gate": True, "group": 64, "eps": 1e-6, "cast_before_scale": True}
    options = usual | {"weight_offset": 0.0, "out_dtype": None} | given
    with pytest.raises(error) as raised:
        torch.ops.pallas_norm.rms_norm_gated(x, x, None, *options.values())
    assert str(raised.value) == message
    if name != "out_dtype":  # which the gradient has none of
        *options, _ = options.values()
        rstd = torch.ones(2, 3, device=device)
        with pytest.raises(ValueError, match=name.split()[-1]) as raised:
            torch.ops.pallas_norm.rms_norm_gated_backward(x, x, None, rstd, x, *options, False)  # noqa: FBT003
        assert str(raised.value) == message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NO_OPTIONS)
def test_options_are_told_when_a_program_is_compiled(name: str) -> None:
    given, message = NO_OPTIONS[name]
    torch._dynamo.reset()
    named = {"group_size" if name == "group" else name: value for name, value in given.items()}
    compiled = torch.compile(functools.partial(rms_norm_gated, **named), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=re.escape(message).replace("'", r"\\?'")):  # it quotes its repr
        compiled(torch.ones(2, 192), torch.ones(2, 192))


@pytest.mark.parametrize(
    ("name", "shape", "needed"), [("rstd", (1,), (2, 3)), ("rstd", (2,), (2, 3)), ("dy", (1, 192), (2, 192))]
)
def test_gradients_of_what_does_not_belong_to_x_are_told(
    name: str, shape: tuple[int, ...], needed: tuple[int, ...]
) -> None:
    """A kernel would read past their end."""
    x, gate, weight = torch.ones(2, 192), torch.ones(2, 192), torch.ones(192)
    given = {"rstd": torch.ones(2, 3), "dy": torch.ones(2, 192)} | {name: torch.ones(shape)}
    options = "silu", True, 64, 1e-6, True, 0.0, True
    with pytest.raises(ValueError, match="shape") as raised:
        torch.ops.pallas_norm.rms_norm_gated_backward(x, gate, weight, *given.values(), *options)
    assert str(raised.value) == f"{name} has shape {shape}; needed {needed}, which belongs to x"
