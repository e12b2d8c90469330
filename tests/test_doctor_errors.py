"""A norm that is wrong is found by the doctor, and its report names the form, the case and the result."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import pytest

from pallas_norm import _doctor, _golden, _selfcheck, reference
from tests import rewrites
from tests.doctor_report import CASES, quick, report  # noqa: F401  a fixture


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("quick", "fresh_programs")
def test_a_norm_that_rounds_once_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a, **o: right(*a, **o | {"cast_before_scale": False}))
    status, text = report(capsys)
    assert status == 1
    for dtype in ("bfloat16", "float16"):
        pattern = rf"^WRONG  JAX on cpu, XLA: rms_norm, 69 x 128 {dtype}: y: \d+ of 8832 elements have .* missing$"
        assert re.search(pattern, text, re.MULTILINE)
        assert f"add_rms_norm and its gradients, 69 x 128 {dtype}: y: " in text
    assert "ok     JAX on cpu, n = 128, XLA: bits and gradients in float32\n" in text  # of which there is one rounding
    assert text.splitlines()[-1].endswith(
        f"say WRONG. Next: install a jax that docs/compatibility.md calls tested, and {_doctor.REPORT}"
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--xla_cpu_enable_fast_math=true", True),
        ("--xla_dump_to=x --xla_cpu_enable_fast_math", True),
        ("--xla_cpu_enable_fast_math=true --xla_cpu_enable_fast_math=false", False),
        ("--xla_cpu_enable_fast_min_max=true", False),
    ],
)
def test_a_flag_under_which_no_bits_are_right_is_the_next_step(
    flags: str,
    named: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    step = _selfcheck.next_step(by_kernel=False)
    assert step.startswith("take --xla_cpu_enable_fast_math" if named else "install a jax that ")
    assert _selfcheck.next_step(by_kernel=True).startswith("pass implementation=")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_programs")
def test_a_rounding_that_is_dropped_is_found() -> None:
    """As XLA's CPU code drops g's in the large program where the sums have no order and the roundings are casts."""
    with rewrites.rewritten(rewrites.REFERENCE["xla: g not rounded"]):
        found = _doctor.check_case(_golden.LARGE, jax.local_devices(backend="cpu")[0])
    assert any(sentence.startswith("rms_norm and its gradients, 4096 x 1024 bfloat16: dx: ") for sentence in found)


ORDERS = ("columns not added as neighbours", "the last block added to others", "products fused with sums")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize("planted", ORDERS)
def test_another_order_of_additions_is_found(planted: str) -> None:
    """Which no bound finds: each is as near to float64 as the specified one."""
    case, cpu = _golden.case(1000, "float32"), jax.local_devices(backend="cpu")[0]
    given, residual_form = _golden.operands(case), _doctor.FORMS[1]
    with rewrites.rewritten(rewrites.REFERENCE[f"xla: {planted}"]):
        wrong = _doctor.check_case(case, cpu)
        with jax.default_device(cpu):
            found = _doctor.results(residual_form, given)
    for name in ("rstd", "dx"):
        assert f"add_rms_norm and its gradients, {case}: {name}: {_selfcheck.OTHER_BITS}" in wrong
    assert _selfcheck.check(given, found, bits={}) == []
    assert _doctor.check_case(case, cpu) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick", "fresh_programs")
def test_the_report_says_what_another_order_is(capsys: pytest.CaptureFixture[str]) -> None:
    with rewrites.rewritten(rewrites.REFERENCE["xla: columns not added as neighbours"]):
        status, text = report(capsys)
    assert status == 1
    line = (
        "WRONG  JAX on cpu, XLA: rms_norm and its gradients, 69 x 128 float32: rstd: within the bounds of any order of "
        "additions, but with other bits than this version has: another order, or another rounding of a product, a root "
        "or a quotient (docs/order.md)\n"
    )
    assert line in text


def test_a_platform_with_a_root_of_its_own_is_held_to_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tpu:
        platform, device_kind = "tpu", "TPU v5"

    class Nvidia:
        platform, device_kind = "gpu", "NVIDIA H200"

    cpu = jax.local_devices(backend="cpu")[0]
    assert [_doctor.has_specified_bits(device) for device in (cpu, Nvidia(), Tpu())] == [True, True, False]
    case = CASES[2]
    monkeypatch.setattr(_doctor, "has_specified_bits", lambda _: False)
    with rewrites.rewritten(rewrites.REFERENCE["xla: columns not added as neighbours"]):
        assert _doctor.check_case(case, cpu) == []


@pytest.mark.usefixtures("quick")
def test_a_check_that_raises_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no\n  memory " + "x" * 600)

    monkeypatch.setattr(_doctor, "results", out_of_memory)
    status, text = report(capsys)
    assert status == 1
    assert f"WRONG  JAX on cpu, XLA: 69 x 128 bfloat16: RuntimeError: no memory {'x' * 490} ...\n" in text
    assert f"       -> {_doctor.REPORT}\n" in text
    assert text.count("WRONG") == len(CASES) + 1  # and the last line
