"""How far a patched model may be from the unpatched one: a bound from the unpatched model's own roundings.

Both round to bfloat16 at the same places, so each is about as far from the float32 model of the same weights and data
as the other, and by the triangle inequality no further from one another than twice that. What is compared is a norm
over a whole tensor, of which single roundings are a small part. To a distance that happens to vanish, one rounding of
bfloat16 (2**-8) of the value's own size is added; where all is float32, its square root's (2**-12).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

ONE_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-12}


@dataclasses.dataclass(frozen=True)
class Training:
    losses: list[float]  # of each step
    gradients: Mapping[str, torch.Tensor]  # of the first step, float32, whole


def size(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


def assert_near(
    what: str, ours: torch.Tensor, own: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> float:
    """`own` is the unpatched model's, `exact` that of float32. Returns the share of the bound that was needed."""
    assert ours.shape == own.shape == exact.shape, f"{what}: {ours.shape}, {own.shape}, {exact.shape}"
    found = size(ours.double() - own.double())
    bound = 2 * size(own.double() - exact.double()) + ONE_ROUNDING[dtype] * size(exact)
    assert found <= bound, f"{what} is {found:.3g} from the unpatched model's; at most {bound:.3g} is right"
    return found / bound if bound else 0.0


def assert_training_near(ours: Training, own: Training, exact: Training, dtype: torch.dtype = torch.bfloat16) -> str:
    found, theirs, known = (torch.tensor(one.losses, dtype=torch.float64) for one in (ours, own, exact))
    assert_near("the losses", found, theirs, known, dtype)
    assert ours.gradients.keys() == own.gradients.keys() == exact.gradients.keys()
    assert ours.gradients
    shares = [
        assert_near(f"the gradient of {name}", value, own.gradients[name], exact.gradients[name], dtype)
        for name, value in ours.gradients.items()
    ]
    words, those = (" ".join(f"{loss:.4f}" for loss in one.losses) for one in (ours, own))
    return f"losses {words} (unpatched {those}), gradients {max(shares):.2f} of the bound"
