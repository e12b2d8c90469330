"""Every RMSNorm class of the installed transformers is known, and those that are replaced keep their own roundings."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch import _changes, _classes, _forwards, _replacing, huggingface
from pallas_norm_torch._classes import ROWS, Kind
from tests import oracle
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import (
    BF16,
    F32,
    HANDLED,
    MIXED,
    ROWS_OF_X,
    SAME,
    VARIANTS,
    N,
    build,
    classes_of,
    compare,
    found,
    imported,
    inputs,
    llama,
    loaded,
    ulps_needed,
)
from tests.interop.rstd import bits

LLAMA = next(digest for digest, row in ROWS.items() if row.example == "LlamaRMSNorm")
GEMMA = next(digest for digest, row in ROWS.items() if row.example == "GemmaRMSNorm")


# --- every class ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_class_is_known() -> None:
    """Read, not imported: a class of a file that needs an optional package is seen too."""
    unknown = {f"{one.name} of {one.path}, digest {one.digest}" for one in found() if one.digest not in ROWS}
    assert not unknown, f"run scripts/classify-norms: {sorted(unknown)}"
    assert len(found()) > 190  # 200 in 5.17, 223 in 5.23


@pytest.mark.slow
def test_imported_classes_are_recognised_as_their_files_are() -> None:
    """The digest of the class, with its bases and decorators, is that of its source."""
    unread = {one.name for one in found() if imported(one) is None}
    for one in found():
        if (owner := imported(one)) is not None:
            source = _classes.read_source(owner)
            assert source is not None
            assert _classes.digest(source) == one.digest, one.name
            row = ROWS[one.digest]
            assert _classes.recognise(owner) == (row if row.forward is not None else row.note)
    assert not unread  # transformers imports all of these without its optional packages; one that does not is only read


def test_rows_are_sentences_or_reasons() -> None:
    for row in ROWS.values():
        assert (row.kind is Kind.REFUSED) == (row.forward is None)
        assert row.note.endswith(".") == (row.forward is not None)


@pytest.mark.sampled(18)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "random"])
@pytest.mark.parametrize("dtype", SAME, ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize(
    "digest",
    # More than a hundred classes are that of Llama, nearly each in a file of its own.
    [pytest.param(one, marks=pytest.mark.slow) if ROWS[one].example == "LlamaRMSNorm" else one for one in HANDLED],
    ids=[ROWS[one].example for one in HANDLED],
)
def test_replaced_classes_have_their_own_bits(digest: str, dtype: Any, *, exact: bool) -> None:
    for owner in classes_of(digest):
        compare(owner, *dtype, exact=exact)


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's rms_norm says so
@pytest.mark.parametrize("dtypes", MIXED, ids=["bf16-f32", "f32-bf16", "f16-bf16", "f32-f16"])
@pytest.mark.parametrize("digest", HANDLED, ids=[ROWS[digest].example for digest in HANDLED])
def test_another_weight_dtype(digest: str, dtypes: Any) -> None:
    """The result's dtype and bits; one class of each row, because the rest have the same source."""
    compare(classes_of(digest)[0], *dtypes, exact=False)


@pytest.mark.parametrize("digest", HANDLED, ids=[ROWS[digest].example for digest in HANDLED])
def test_gradients(digest: str) -> None:
    """In float32, of x, gate, weight and bias: the two backward passes differ in float32 sums of N and 24 terms."""
    owner = classes_of(digest)[0]
    module = build(owner, F32, **VARIANTS.get(ROWS[digest].kind, ({},))[-1])
    *_, arguments = inputs(owner, ROWS[digest].kind, F32, exact=False)
    wanted = [one.clone().requires_grad_() for one in arguments]
    dy = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(3))

    def gradients(module: nn.Module) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(*wanted), [*wanted, *module.parameters()], dy)

    own = gradients(module)
    with huggingface.patched(module):
        replaced = gradients(module)
    for actual, expected in zip(replaced, own, strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < (N + ROWS_OF_X) * oracle.U


def test_a_class_that_is_not_there_and_one_that_cannot_be_imported_are_told_apart() -> None:
    """Two tests passed without a class to compare."""
    with pytest.raises(pytest.skip.Exception, match="a row of another transformers"):
        loaded([])
    elsewhere = types.SimpleNamespace(path=pathlib.Path("models/nowhere/modeling_nowhere.py"), name="NowhereRMSNorm")
    with pytest.raises(pytest.skip.Exception, match=r"modeling_nowhere\.py needs a package that is not installed"):
        loaded([elsewhere])


def test_power_is_rsqrt() -> None:
    """What Kind.POW rests on: every mantissa, both parities of the exponent."""
    for exponent in (127, 128):
        for part in range(0, 1 << 23, 1 << 20):
            x = (torch.arange(part, part + (1 << 20), dtype=torch.int32) + (exponent << 23)).view(F32)
            assert torch.equal(bits(torch.pow(x, -0.5)), bits(torch.rsqrt(x)))


# --- mutants ----------------------------------------------------------------------------------------------------------


def check_eps_of_zero() -> None:
    """Rows so small that an eps of 1e-12 would show."""
    module, x = llama(eps=0.0), torch.randn(4, N, generator=torch.Generator().manual_seed(4)) * 2.0**-40
    with huggingface.patched(module):
        y = module(x)
    ulps_needed(module, (x,), y, round(2 * oracle.rstd_bound(N)))


def test_eps_of_zero() -> None:
    check_eps_of_zero()


def check_unpatch() -> None:
    module, x = llama(), torch.randn(4, N, generator=torch.Generator().manual_seed(5))
    before = module(x)
    huggingface.patch(module)
    assert type(module).forward.ours is _forwards.llama
    assert huggingface.unpatch(module).restored == {"LlamaRMSNorm": 1}
    assert torch.equal(bits(module(x)), bits(before))
    assert type(module) is LlamaRMSNorm
    assert "forward" not in vars(module)


def check_copies() -> None:
    """A copy normalises with its own weight and eps."""
    module, x = llama(), torch.ones(1, N)
    huggingface.patch(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert type(twin).forward.ours is _forwards.llama
        twin.variance_epsilon = 3.0
        torch.testing.assert_close(twin(x), module(x) / 2, rtol=1e-5, atol=0)
        huggingface.unpatch(twin)
        assert huggingface.patch(module).already == {"LlamaRMSNorm": 1}
        torch.testing.assert_close(twin(x), module(x) / 2, rtol=1e-5, atol=0)


def check_bits_of_llama() -> None:
    compare(LlamaRMSNorm, BF16, BF16, exact=False)


def check_bits_of_gemma() -> None:
    compare(GemmaRMSNorm, BF16, BF16, exact=False)


def test_unpatch_and_copies() -> None:
    check_unpatch()
    check_copies()


def forward_of(digest: str, forward: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(ROWS, digest, dataclasses.replace(ROWS[digest], forward=forward))


def eps_with_or(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _forwards.rms_norm(hidden_states, self.weight, self.variance_epsilon or 1e-6)


def single_rounding(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _forwards.rms_norm(hidden_states, self.weight, self.variance_epsilon, cast_before_scale=False)


def weight_rounded_with_its_offset(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _forwards.rms_norm(x, 1.0 + self.weight, self.eps, cast_before_scale=False)


def offset_after_the_rounding(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _forwards.rms_norm(x, self.weight, self.eps, weight_offset=1.0)


class BoundToTheInstance:
    """patch as others do it."""

    def __init__(self, module: nn.Module, before: type, after: Any) -> None:
        self.module, self.before, self.after = module, before, after

    def apply(self) -> None:
        if self.before is _replacing.original(self.module):
            return
        self.module.forward = types.MethodType(self.after.forward, self.module)


def leaves_a_forward(self: Any) -> None:
    self.module.__class__ = self.after
    self.module.forward = types.MethodType(_forwards.llama, self.module)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "eps read with or": (forward_of(LLAMA, eps_with_or), check_eps_of_zero),
    "one rounding instead of two": (forward_of(LLAMA, single_rounding), check_bits_of_llama),
    "Gemma treated as Llama": (forward_of(GEMMA, _forwards.llama4), check_bits_of_gemma),
    "Gemma rounded twice": (forward_of(GEMMA, offset_after_the_rounding), check_bits_of_gemma),
    "1 + weight rounded": (forward_of(GEMMA, weight_rounded_with_its_offset), check_bits_of_gemma),
    "a stale forward after unpatch": (
        lambda patch: patch.setattr(_changes.Change, "apply", leaves_a_forward),
        check_unpatch,
    ),
    "a method bound to the instance": (
        lambda patch: patch.setattr(huggingface, "Change", BoundToTheInstance),
        check_copies,
    ),
    "a pickle that forgets": (
        lambda patch: patch.setattr(_replacing, "_reduce", nn.Module.__reduce_ex__),
        check_copies,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, check = MUTANTS[name]
    _replacing._norm_class.cache_clear()
    mutate(monkeypatch)
    try:
        with pytest.raises((AssertionError, AttributeError, pickle.PicklingError)):
            check()
    finally:
        monkeypatch.undo()
        _replacing._norm_class.cache_clear()
    check()
