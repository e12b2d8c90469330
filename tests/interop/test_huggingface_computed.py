"""Norms known by what they compute: the zoo is replaced with its own bits or left with the right reason."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from pallas_norm_torch import RMSNorm, _computation, _launches
from pallas_norm_torch.huggingface import patch, unpatch
from tests import oracle
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import BF16, F16, F32, MIXED, N, llama
from tests.interop.rstd import bits
from tests.interop.zoo import LABELS, WRONG, ZOO
from tests.interop.zoo_entries import Base
from tests.interop.zoo_of_two_roundings import OtherNamesRMSNorm, VllmStyle

MOST = round(2 * oracle.rstd_bound(N))  # units of rstd, by which two sums of N terms and a rsqrt differ


def build(name: str, dtype: torch.dtype) -> nn.Module:
    module = ZOO[name][0](N)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(N, generator=generator) * 2 + 0.7
    return module.to(dtype)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    x = 3 * torch.randn(24, N, generator=torch.Generator().manual_seed(2))
    x[::4] *= 1e-3  # eps shows
    return x.to(dtype)


def eps_of(module: Any) -> float:
    config = getattr(module, "config", None) or getattr(module, "cfg", None)
    for owner, name in ((module, "eps"), (module, "epsilon"), (config, "norm_eps"), (config, "rms_norm_eps")):
        if hasattr(owner, name):
            return getattr(owner, name)
    return 1e-6


def ulps_needed(module: Any, label: str, x: torch.Tensor, y: torch.Tensor) -> int:
    """By how much rstd has to be moved from the exact one for what the label says to give y."""
    exact = (x.double().square().mean(-1, keepdim=True) + eps_of(module)).rsqrt()
    _, exponent = torch.frexp(exact)
    parameters = [*module.parameters(), None, None]
    unexplained = torch.ones(len(x), dtype=torch.bool)
    for ulps in range(MOST + 1):
        for signed in (ulps, -ulps):
            rstd = exact.float() + torch.ldexp(torch.full_like(exact, signed), exponent - 24).float()
            expected = LABELS[label](x.float() * rstd, x.dtype, *parameters[:2])
            assert y.dtype == expected.dtype
            unexplained &= (bits(y) != bits(expected)).any(-1)
        if not unexplained.any():
            return ulps
    raise AssertionError(f"{unexplained.sum()} of {len(x)} rows do not compute {label}")


@pytest.mark.sampled(23)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_keeps_its_bits(name: str) -> None:
    """The module's own and the replaced one are what its label says; in every pair of dtypes that is replaced."""
    owner, label = ZOO[name]
    module = build(name, BF16)
    assert patch(module).replaced == {name: 1}
    for x_dtype, weight_dtype in ((BF16, BF16), (F16, F16), (F32, F32), MIXED[0]):
        module.to(weight_dtype)
        x = inputs(x_dtype)[None]
        with torch.no_grad():
            for y in (owner.forward(module, x), module(x)):  # type: ignore[attr-defined]
                ulps_needed(module, label, x[0], y[0])


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_by_a_step_is_left(name: str) -> None:
    make, reason = WRONG[name]
    module = make(N)
    found = _computation.compute(module)
    assert isinstance(found, str)
    assert reason in found
    report = patch(module)
    assert not report.replaced
    for left in report.left:  # one that does not look like an RMSNorm is left without a word
        assert left.reason == (
            f"its forward {found}; if it computes what rms_norm does all the same, say so with "
            f"patch(model, known={{{name}: dict(eps=..., cast_before_scale=...)}}), or make it a "
            "pallas_norm_torch.RMSNorm or a call of rms_norm"
        )


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 40
    assert len(WRONG) >= 25


def test_the_report_says_how_each_was_recognised() -> None:
    model = nn.ModuleList([build("OtherNamesRMSNorm", BF16), llama()])
    report = patch(model)
    assert report.known == {"OtherNamesRMSNorm": "computation", "LlamaRMSNorm": "source"}
    assert "recognised by computation: OtherNamesRMSNorm\n" in str(report)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "name", ["OtherNamesRMSNorm", "FromDataclass", "NoWeightRMSNorm", "PropertyEps", "BiasedRMSNorm"]
)
def test_copies_and_pickles(name: str) -> None:
    module, x = build(name, BF16), inputs(BF16)
    patch(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))
        assert unpatch(twin).restored == {name: 1}
    assert type(module) is not ZOO[name][0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "path"), [("OtherNamesRMSNorm", "eps"), ("FromDataclass", "config.norm_eps")])
def test_eps_is_read_at_each_call(name: str, path: str) -> None:
    module: Any = build(name, F32)
    patch(module)
    x = inputs(F32)
    owner, attribute = (module, path) if "." not in path else (module.config, path.split(".")[1])
    setattr(owner, attribute, 3.0)
    ulps_needed(module, "llama", x, module(x))


def test_an_attribute_that_changes_what_it_computes() -> None:
    """The forward that was recognised read it: with another value the class's own runs."""
    module: Any = build("LitGptLike", F32)
    patch(module)
    module.add_unit_offset = True
    x = inputs(F32)
    ulps_needed(module, "centered", x, module(x))
    module: Any = build("FromDataclass", F32)
    patch(module)
    module.config.use_scale = False
    ulps_needed(module, "weightless", x, module(x))


def test_a_rank_that_was_not_proved_is_its_own_forward_s() -> None:
    module = build("ThreeAxes", BF16)
    patch(module)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        module(inputs(BF16))


def test_other_arguments_go_to_its_own_forward() -> None:
    module, x = build("VllmStyle", BF16), inputs(BF16)
    patch(module)
    y, s = module(x, x)
    assert torch.equal(s, x + x)
    assert torch.equal(y, VllmStyle.forward(module, x, x)[0])
    assert torch.equal(module(x=x), module(x))


def test_a_class_changed_after_the_patch_computes_what_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build("OtherNamesRMSNorm", BF16), inputs(BF16)
    patch(module)
    monkeypatch.setattr(OtherNamesRMSNorm, "forward", lambda self, tokens: tokens + 1)
    assert torch.equal(module(x), x + 1)


def test_a_fused_layer_of_unknown_norms() -> None:
    """Recognised norms have a residual form, too."""
    module, x = build("GemmaLike", BF16), inputs(BF16)
    patch(module)
    forward: Any = type(module).forward
    y, s = forward.residual.add(module, x, x)
    assert torch.equal(s, x + x)
    assert torch.equal(y, module(s))


def test_this_library_s_own_norm_is_no_unknown_one() -> None:
    assert str(patch(nn.Sequential(RMSNorm(N)))) == "found no RMSNorm"


def test_nothing_is_launched_where_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel its own forward runs, to the bit."""
    module, x = build("GemmaLike", BF16), inputs(BF16)
    own = module(x)
    patch(module)
    monkeypatch.setattr(_launches, "has_kernel", lambda x: False)
    assert torch.equal(module(x), own)


# --- known ------------------------------------------------------------------------------------------------------------


class Odd(Base):
    """One that nobody can recognise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = 1
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def test_known_is_taken_at_its_word() -> None:
    module, x = Odd(N).to(BF16), inputs(BF16)
    report = patch(module, known={Odd: {"eps": "eps", "cast_before_scale": False}})
    assert report.replaced == {"Odd": 1}
    assert report.known == {"Odd": "known="}
    ulps_needed(module, "olmo2", x, module(x))
    assert "calls" not in vars(module)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    patch(other := Odd(N).to(BF16), known={Odd: {"eps": 1e-5, "weight": None}})
    ulps_needed(other, "weightless", x, other(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scale": 1},
            TypeError,
            "known[Odd] has the option 'scale'; needed some of weight, eps, cast_before_scale, weight_offset: eps and "
            "weight are the names of attributes, or a number and None",
        ),
        ({}, ValueError, "known[Odd] says no eps; needed the name of the attribute that holds it"),
        (
            {"eps": 1e-5, "weight": 1},
            TypeError,
            "known[Odd] has the weight 1; needed an attribute's name or None",
        ),
    ],
)
def test_known_that_says_nothing(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        patch(Odd(N), known={Odd: options})
    assert str(caught.value) == message


def test_known_of_an_attribute_that_is_not_there() -> None:
    (left,) = patch(Odd(N), known={Odd: {"eps": "epsilon"}}).left
    assert left.reason == "it does not have what known says: 'Odd' object has no attribute 'epsilon'"


# --- mutants: a proof that proves nothing -----------------------------------------------------------------------------


def test_the_proof_finds_a_wrong_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the terms matched wrongly, the bits would tell."""
    match = _computation.match

    def wrong(term: Any, dtype: torch.dtype) -> Any:
        found = match(term, dtype)
        form = dataclasses.replace(found.form, cast_before_scale=not found.form.cast_before_scale)
        return found._replace(form=form)

    monkeypatch.setattr(_computation, "match", wrong)
    for name in ("OtherNamesRMSNorm", "OneRoundingRMSNorm"):
        assert str(_computation.compute(build(name, F32))).startswith("differs from Form(")


def test_the_proof_finds_another_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    match = _computation.match
    monkeypatch.setattr(_computation, "match", lambda *given: match(*given)._replace(eps=1e-4))
    assert _computation.compute(build("OtherNamesRMSNorm", F32)) == "has another rstd than 1 / sqrt(mean(x^2) + eps)"
