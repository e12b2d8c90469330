"""One case: every norm, every comparison, and what has to hold."""

from __future__ import annotations

import dataclasses

import jax
import torch

import pallas_norm
from demo import norms
from demo.activations import Case, activations

ULPS = 4  # by which a float32 rstd may be off: sum, division and square root each round
SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11}


@dataclasses.dataclass(frozen=True)
class Result:
    case: Case
    path: str
    explanation: str
    # Maps of [rows, n]: by how many representable numbers the first is above the second.
    from_replay: torch.Tensor
    torch_from_jax: torch.Tensor
    from_exact: torch.Tensor
    from_hugging_face: torch.Tensor
    single_from_hugging_face: torch.Tensor
    plain_from_hugging_face: torch.Tensor

    def failures(self) -> list[str]:
        """Claims that do not hold here."""
        # An rstd k ULP off moves x * rstd by at most k * 2^-23 of itself. Of the space between two 16-bit numbers that
        # is at most the limit, and so is the share of the outputs that it moves across a rounding boundary.
        limit = ULPS * 2.0**-23 * 2 ** SIGNIFICAND_BITS[self.case.dtype]
        exact, theirs, single = map(share, (self.from_exact, self.from_hugging_face, self.single_from_hugging_face))
        claims = {
            "every output equals the replay of our own rstd": not self.from_replay.any(),
            "torch tensors get the bits of JAX arrays": not self.torch_from_jax.any(),
            f"at most {limit:.4%} of the outputs differ from exact statistics": exact <= limit,
            f"at most {2 * limit:.4%} of the outputs differ from Hugging Face": theirs <= 2 * limit,
            # Otherwise the comparison cannot tell the two roundings apart, and the rest means nothing.
            "single rounding is told from Hugging Face's": self.case.gemma or single > 0.1,
        }
        return [f"{self.case.label}: not true that {claim}" for claim, holds in claims.items() if not holds]


def share(difference: torch.Tensor) -> float:
    return torch.count_nonzero(difference).item() / difference.numel()


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By how many representable 16-bit numbers a is above b; -0.0 is one below 0.0."""

    def position(value: torch.Tensor) -> torch.Tensor:
        bits = value.cpu().view(torch.int16).int()
        return torch.where(bits < 0, -32769 - bits, bits)

    assert a.dtype == b.dtype
    return position(a) - position(b)


def device() -> str:
    """A GPU if torch and JAX both have one."""
    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


@torch.no_grad()
def compare(case: Case) -> Result:
    x, weight = (tensor.to(device()) for tensor in activations(case))
    ours, rstd = norms.from_jax(case, x, weight)
    theirs = norms.hugging_face(case, x, weight)
    explanation = pallas_norm.explain(jax.ShapeDtypeStruct((case.rows, case.n), case.dtype_name))
    return Result(
        case,
        path=explanation.cuda if device() == "cuda" else explanation.elsewhere,
        explanation=str(explanation),
        from_replay=ulps(ours, norms.replay(case, x, rstd, weight)),
        torch_from_jax=ulps(norms.from_torch(case, x, weight), ours),
        from_exact=ulps(ours, norms.replay(case, x, norms.exact_rstd(case, x), weight)),
        from_hugging_face=ulps(ours, theirs),
        single_from_hugging_face=ulps(norms.single_rounding(case, x, weight), theirs),
        plain_from_hugging_face=ulps(norms.plain_jax(case, x, weight), theirs),
    )
