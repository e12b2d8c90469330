"""`python -m demo`, with few rows: it holds, draws its picture, and notices wrong bits."""

from pathlib import Path

import pytest
import torch

import pallas_norm_torch
from demo import batch_size, bridge, compare, norms
from demo.__main__ import main
from demo.activations import CASES, activations

pytestmark = pytest.mark.usefixtures("implicit_promotion_throughout")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "SHAPES", ((16, 1024), (32, 1024)))


@pytest.mark.slow
def test_every_claim_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--rows-divisor", "32"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("Every claim holds.\n")
    for case in CASES:
        assert f"{case.label} " in output
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_the_bridge_notices_other_bits_and_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bridge.bridge(CASES[0], rows=4)
    assert [way.same_bits for way in found.ways] == [True] * 3
    assert found.pointers_kept
    assert found.failures() == []
    assert all(way.call_us > 0 for way in found.ways)
    right = pallas_norm_torch.rms_norm
    monkeypatch.setattr(
        pallas_norm_torch, "rms_norm", lambda x, weight, eps: right(x, weight, eps, cast_before_scale=False)
    )
    shared = pallas_norm_torch.to_jax
    monkeypatch.setattr(pallas_norm_torch, "to_jax", lambda tensor, copy=False: shared(tensor, copy=True))
    assert bridge.bridge(CASES[0], rows=4).failures() == [
        "pallas_norm_torch.rms_norm: other bits than JAX's",
        "to_jax or to_torch copied what they were to share",
    ]


@pytest.mark.slow
def test_single_rounding_in_place_of_ours_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_jax = norms.from_jax

    def wrong(case, x, weight):
        return norms.single_rounding(case, x, weight), from_jax(case, x, weight)[1]

    monkeypatch.setattr(norms, "from_jax", wrong)
    assert main(["--out", str(tmp_path), "--rows-divisor", "32"]) == 1
    output = capsys.readouterr().out
    assert "FAILED  Llama 3 8B bf16: not true that every output equals the replay of our own rstd" in output
    assert "FAILED  Llama 3 8B bf16: not true that torch tensors get the bits of JAX arrays" in output
    assert "FAILED  rms_norm at 16 x 1024" in output
    assert "Every claim holds" not in output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ulps_counts_representable_numbers(dtype: torch.dtype) -> None:
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, 1.0]).to(dtype)
    above = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert compare.ulps(above, values).tolist() == [1, 2, 1, 1, 1]  # from -0.0, 0.0 lies between
    assert compare.ulps(values, above).tolist() == [-1, -2, -1, -1, -1]
    assert compare.ulps(values, values).tolist() == [0] * 5


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_activations_are_finite_and_heavy_tailed(case) -> None:
    x, weight = activations(case)
    wide = x.float()
    assert x.shape == (case.rows, case.n)
    assert wide.isfinite().all()
    assert (wide**4).mean() / wide.square().mean() ** 2 > 100
    assert weight.unique().numel() > 50
