"""Which attention forwards have the norms of q and k and the rotation in one kernel, and why others keep steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from pallas_norm_torch import patch, patched
from pallas_norm_torch._qk_rope import UNKNOWN, rotary_forward
from pallas_norm_torch._replacing import is_attention, is_layer
from pallas_norm_torch._sources import definition_of
from pallas_norm_torch.huggingface import ADDS
from tests.interop.fused_calls import calls_of
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = (modeling_qwen3.Qwen3RMSNorm(16) for _ in range(2))
        self.heads, self.cache = 4, torch.zeros(1)

    def double(self, x: Any) -> Any:
        return x.mul_(2)

    def store(self, x: Any) -> Any:
        self.cache.zero_()
        return x

    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        raise NotImplementedError


def turn(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q + cos.unsqueeze(1), k + sin.unsqueeze(1)


Q, K = "a = self.q_norm(q).transpose(1, 2)", "b = self.k_norm(k).transpose(1, 2)"
TURN, SUMS = "a, b = apply_rotary_pos_emb(a, b, cos, sin)", "return a.sum() + b.sum()"
# The statements of forward(self, q, k, cos, sin).
FORWARDS: dict[str, tuple[str, ...]] = {
    "between": (
        "a = self.q_norm(q + 1).transpose(1, 2)",
        "v = k + 1",
        K,
        "v = v + cos.unsqueeze(1)",
        TURN,
        f"{SUMS} + v.sum()",
    ),
    "used between": (Q, K, "b = b + a[:, :1]", TURN, SUMS),
    "used by the other": (Q, "b = self.k_norm(k + a.sum()).transpose(1, 2)", TURN, SUMS),
    "angles of the normalised q": (Q, K, "a, b = apply_rotary_pos_emb(a, b, cos * a.std(), sin)", SUMS),
    "the normalised q as angles": (Q, K, "a, b = apply_rotary_pos_emb(a, b, a, sin)", SUMS),
    # q is written to between its norm and the rotation
    "in place": (Q, K, "q.mul_(2)", TURN, SUMS),
    "augmented": (Q, K, "q += 1", TURN, SUMS),
    "stored": (Q, K, "q[0] = 0", TURN, SUMS),
    "another name": ("other = q", Q, "c = other.mul_(3)", K, TURN, f"{SUMS} + c.sum()"),
    "by a function": (Q, K, "c = torch.nn.functional.relu(q, inplace=True)", TURN, f"{SUMS} + c.sum()"),
    "by out": (Q, K, "c = torch.add(q, 1, out=q)", TURN, f"{SUMS} + c.sum()"),
    "by a module": (Q, "b = self.k_norm(self.double(q)[:, :, :1] + k).transpose(1, 2)", TURN, SUMS),
    "memory of self": (
        "self.cache = q * 1",
        "a = self.q_norm(self.cache.view(2, 3, 4, 16)).transpose(1, 2)",
        K,
        "c = self.store(cos)",
        TURN,
        f"{SUMS} + c.sum()",
    ),
    "sizes of self": (
        "a = self.q_norm((q + 1).view(2, 3, self.heads, 16)).transpose(1, 2)",
        "b = self.k_norm(self.double(k + 1)).transpose(1, 2)",
        TURN,
        SUMS,
    ),
    # other axes, results, options and functions
    "other axes": (Q, "b = self.k_norm(k).transpose(2, 1)", TURN, SUMS),
    "swapped": (Q, K, "b, a = apply_rotary_pos_emb(a, b, cos, sin)", "return a.sum() - b.sum()"),
    "with an option": (Q, K, "a, b = apply_rotary_pos_emb(a, b, cos, sin, unsqueeze_dim=2)", SUMS),
    "turned otherwise": (Q, K, "a, b = turn(a, b, cos, sin)", SUMS),
}
OTHERWISE = "its turn is not the function of transformers that rotates whole heads, so the norms stay outside of it"
REASONS = dict.fromkeys(FORWARDS, UNKNOWN) | {"between": None, "sizes of self": None, "turned otherwise": OTHERWISE}


def attention(name: str, folder: Path) -> type[Attention]:
    """With that forward, whose source can be read, as that of a class in any file."""
    file = folder / "forward.py"
    lines = "".join(f"    {statement}\n" for statement in FORWARDS[name])
    file.write_text(f"def forward(self, q, k, cos, sin):\n{lines}")
    members: dict[str, Any] = {}
    names = {"torch": torch, "apply_rotary_pos_emb": apply_rotary_pos_emb, "turn": turn}
    exec(compile(file.read_text(), file, "exec", dont_inherit=True), names, members)
    assert definition_of(members["forward"]) is not None
    return type("Written", (Attention,), members)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FORWARDS)
def test_which_forwards_are_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, reason = attention(name, tmp_path), REASONS[name]
    found: Any = rotary_forward(owner)
    assert (("q_norm", "k_norm") if reason is None else reason) == getattr(found, "norms", found)
    calls, module = calls_of(monkeypatch), owner()
    torch.manual_seed(0)
    given = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 1, 16), torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    with patched(module):
        expected = module(*(one.clone() for one in given)) if name != "with an option" else None
    with patched(module, fuse_qk_rope=True) as report:
        assert [one.reason for one in report.left] == ([] if reason is None else [reason])
        assert expected is None or torch.equal(module(*(one.clone() for one in given)), expected)
    assert len(calls) == (reason is None)


def test_a_norm_that_rounds_otherwise_stays_outside(tmp_path: Path) -> None:
    between = attention("between", tmp_path)
    module = between()
    module.k_norm = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(16)
    report = patch(module, fuse_qk_rope=True)
    assert not report.rotated
    assert [one.reason for one in report.left] == [
        "its GemmaRMSNorm rounds as rms_norm_rope does not, so the norms and the rotation stay steps"
    ]
    module = between()
    module.k_norm = nn.Identity()
    assert [one.reason for one in patch(module, fuse_qk_rope=True).left] == [
        "its k_norm was not replaced, so the norms and the rotation stay steps"
    ]
    module = between()
    module.forward = lambda *given: None  # bound by something else
    (left,) = patch(module, fuse_qk_rope=True).left
    assert "bound to the instance" in left.reason


class WithAResidual(Attention):
    """A layer and an attention in one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = modeling_qwen3.Qwen3RMSNorm(16)

    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        residual = q
        q = torch.sin(q)
        q = residual + q
        residual = q
        q = self.norm(q)
        a = self.q_norm(q).transpose(1, 2)
        b = self.k_norm(k).transpose(1, 2)
        a, b = apply_rotary_pos_emb(a, b, cos, sin)
        return a.sum() + b.sum() + residual.sum()


def test_a_forward_that_is_replaced_as_a_layer_is_not_replaced_as_an_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, module = calls_of(monkeypatch), WithAResidual()
    given = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 1, 16), torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    for options in ({"fuse_residual": True}, {"fuse_qk_rope": True}, {"fuse_residual": True, "fuse_qk_rope": True}):
        calls.clear()
        with patched(module, **options) as report:
            module(*given)
            assert is_layer(module) == (sum(report.fused.values()) == 1) == ("fuse_residual" in options)
            assert is_attention(module) == (sum(report.rotated.values()) == 1) == (len(calls) == 1)
        assert len(calls) == (options == {"fuse_qk_rope": True})
        assert [one.reason for one in report.left] == ([ADDS] if len(options) == 2 else [])
