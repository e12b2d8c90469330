"""What `python -m pallas_norm` reports: versions, devices, which path a call takes and why, and whether the bits are
right.

Everything here gives lines; __main__ prints them.
"""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (It takes _dispatch, from which __init__.py imports, for a private name of that file; jax.vjp and jax.config have few
# types.)

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import pallas_norm

from . import _compat, _golden, _selfcheck, _target
from .plans.lengths import LARGEST_N

Device: TypeAlias = Any  # jax.Device is no type to a type checker
REPORT = _selfcheck.REPORT
# The last two have no kernel.
SHOWN_LENGTHS = (128, 4096, 131072, 16, LARGEST_N + 1)
PACKAGES = ("jax", "jaxlib", "ml_dtypes", "numpy", "torch", "transformers")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


class Line(NamedTuple):
    mark: Literal["ok", "WRONG", "note", ""]
    text: str
    next_step: str = ""

    def __str__(self) -> str:
        cure = f"\n       -> {self.next_step}" if self.next_step else ""
        return f"{self.mark:5}  {self.text}{cure}".rstrip()


def attempt(what: str, check: Callable[[], Iterable[Line]], *, next_step: str = REPORT) -> Iterator[Line]:
    """Its lines. An exception is a failed check, and not the end of the report."""
    try:
        yield from check()
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 500 else text[:500] + " ..."  # an error of XLA's may hold the whole program
        yield Line("WRONG", f"{what}: {type(error).__name__}: {text}", next_step)


def verdict(lines: Sequence[Line]) -> tuple[str, int]:
    """The last line, and the exit status."""
    if wrong := [line for line in lines if line.mark == "WRONG"]:
        return f"{len(wrong)} of the lines above say WRONG. Next: {wrong[0].next_step}", 1
    steps = [line.next_step for line in lines if line.next_step]
    return "Everything that was checked is right." + (f" Next: {steps[0]}" if steps else ""), 0


# --- what is installed ------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Line]:
    found = {package: _version(package) for package in (*PACKAGES, *PLUGINS)}
    installed = ", ".join(f"{package} {version}" for package, version in found.items() if version is not None)
    yield Line("", f"pallas-norm {pallas_norm.__version__}, Python {platform.python_version()}, {installed}")
    if (reason := _compat.kernels_unavailable()) is not None:
        low, high = (".".join(map(str, version)) for version in _compat.TESTED_JAX)
        yield Line(
            "note",
            f"{reason}: no kernel runs, and XLA compiles the reference, with the same rounding",
            f"pip install 'jax>={low},<{high}' 'jaxlib>={low},<{high}' absl-py",
        )


class Driver(NamedTuple):
    gpus: int
    cuda: int  # the newest major version of CUDA that it runs


def driver() -> Driver | None:
    """What the NVIDIA driver says when it is asked without JAX. It makes no context, and so takes no memory."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    gpus, cuda = ctypes.c_int(), ctypes.c_int()
    asked = (library.cuInit, 0), (library.cuDeviceGetCount, ctypes.byref(gpus))
    if any(function(argument) for function, argument in asked) or library.cuDriverGetVersion(ctypes.byref(cuda)):
        return None
    return Driver(gpus.value, cuda.value // 1000)


def _platforms() -> str:
    return jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]


def devices() -> Iterator[Line]:
    """What JAX computes on, and why it is no GPU where one is there."""
    kinds = Counter(
        f"{device.platform} ({device.device_kind})"
        + (f", compute capability {device.compute_capability}" if _is_nvidia(device) else "")
        for device in jax.local_devices()
    )
    yield Line("", "JAX sees " + "; ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    if _compat.cuda_capabilities():
        try:
            _target.here()
        except _target.NoKernel as reason:
            yield Line("note", f"{reason}; XLA compiles the reference, with the same rounding")
        return
    found = driver()
    if found is None or not found.gpus:
        return
    seen = f"the NVIDIA driver sees {found.gpus} GPU{'s' if found.gpus > 1 else ''}, JAX none"
    extra = "cuda13" if found.cuda >= 13 else "cuda12"
    plugins = [f"{plugin} {version}" for plugin in PLUGINS if (version := _version(plugin)) is not None]
    chosen = _platforms()
    if not plugins:
        yield Line("note", f"{seen}: no CUDA plugin of JAX is installed", f"pip install 'pallas-norm[{extra}]'")
    elif chosen and not {"cuda", "gpu"} & set(chosen.split(",")):
        yield Line("note", f"{seen}: JAX_PLATFORMS is {chosen}", "unset JAX_PLATFORMS, if the GPU is to be used")
    else:
        step = f"pip install 'jax[{extra}]=={jax.__version__}'; jax.devices('cuda') raises JAX's reason"
        yield Line("WRONG", f"{seen}, although {' and '.join(plugins)} is installed", step)


# --- which path -------------------------------------------------------------------------------------------------------


def paths() -> Iterator[Line]:
    for n in SHOWN_LENGTHS:
        explanation = pallas_norm.explain(jax.ShapeDtypeStruct((1, n), jnp.bfloat16))
        yield Line("", f"pallas_norm, n = {n}: {explanation}")


def _is_nvidia(device: Device) -> bool:
    return device.platform == "gpu" and "nvidia" in device.device_kind.lower()


def path_on(device: Device, n: int, dtype: str) -> str:
    explanation = pallas_norm.explain(jax.ShapeDtypeStruct((1, n), dtype))
    return explanation.cuda if _is_nvidia(device) else explanation.elsewhere


# --- the bits ---------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    function: str
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    cotangents: tuple[str, ...]


FORMS = (
    Form("rms_norm", ("x", "weight"), ("y", "rstd"), ("dy",)),
    Form("add_rms_norm", ("x", "residual", "weight"), ("y", "s", "rstd"), ("dy", "ds")),
)


def results(form: Form, given: _selfcheck.Arrays) -> dict[str, Any]:
    """Of one jitted program, as a training step has it: the norm, its rstd, and its gradients."""
    norm = functools.partial(getattr(pallas_norm, form.function), eps=_golden.EPS, return_rstd=True)

    @jax.jit
    def step(operands: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]) -> dict[str, Any]:
        primals, pullback = jax.vjp(norm, *operands)
        gradients = pullback((*cotangents, jnp.zeros_like(primals[-1])))
        return dict(zip(form.outputs, primals, strict=True)) | {"dx": gradients[0], "dweight": gradients[-1]}

    found = step(*(tuple(given[name] for name in names) for names in (form.operands, form.cotangents)))
    return {name: np.asarray(value) for name, value in found.items()}


def has_specified_bits(device: Device) -> bool:  # elsewhere the root and the quotient are the platform's
    return device.platform == "cpu" or _is_nvidia(device)


def check_case(case: _golden.Case, device: Device) -> list[str]:
    """What is wrong with the norms on this device, in sentences."""
    given = _golden.operands(case)
    wrong: list[str] = []
    with jax.default_device(device):
        for form in FORMS:
            residual = "residual" in form.operands
            bits = _golden.bits(case, residual=residual) if has_specified_bits(device) else {}
            sentences = _selfcheck.check(given, found := results(form, given), bits=bits)
            wrong += [f"{form.function} and its gradients, {case}: {sentence}" for sentence in sentences]
            if not residual:
                # A program of its own, because XLA fuses otherwise, and drops other roundings, where y is all it gives.
                alone = jax.jit(functools.partial(pallas_norm.rms_norm, eps=_golden.EPS))
                y = np.asarray(alone(given["x"], given["weight"]))
                sentences = _selfcheck.check_y(y, given["x"], given["weight"], found["rstd"], bits)
                wrong += [f"rms_norm, {case}: {sentence}" for sentence in sentences]
    return wrong


def check_cases(
    where: str,
    cases: Iterable[_golden.Case],
    check: Callable[[_golden.Case], list[str]],
    what: Callable[[_golden.Case], str],
    next_step: str,
) -> Iterator[Line]:
    """A line for each shape and what computes it; a line for each sentence of `check`, or its exception."""

    def key(case: _golden.Case) -> tuple[int, str, str]:
        return case.n, _selfcheck.shape_of(case), what(case)

    def wrong(case: _golden.Case) -> Iterator[Line]:
        prefix = f"{where}, {what(case)}"
        return (Line("WRONG", f"{prefix}: {sentence}", next_step) for sentence in check(case))

    for (_, shape, kind), members in itertools.groupby(sorted(cases, key=key), key=key):
        right: list[str] = []
        for case in members:
            lines = list(attempt(f"{where}, {kind}: {case}", functools.partial(wrong, case)))
            yield from lines
            if not lines:
                right.append(case.dtype)
        if right:
            yield Line("ok", f"{where}, {shape}, {kind}: bits and gradients in {', '.join(right)}")


def self_check(device: Device) -> Iterator[Line]:
    by_kernel = path_on(device, 4096, "bfloat16") == "mosaic_gpu"

    def what(case: _golden.Case) -> str:
        if path_on(device, case.n, case.dtype) != "mosaic_gpu":
            return "XLA"
        return f"kernel ({_selfcheck.kind_of(case, _target.here().gpu)})"

    cases = _selfcheck.all_cases(_target.here().gpu) if by_kernel else _selfcheck.XLA_CASES
    step = _selfcheck.next_step(by_kernel=by_kernel)
    yield from check_cases(f"JAX on {device.platform}", cases, lambda case: check_case(case, device), what, step)


def checked_devices() -> list[Device]:
    """The first device of the default platform, and a CPU."""
    first = jax.local_devices()[0]
    if first.platform == "cpu":
        return [first]
    try:
        return [first, jax.local_devices(backend="cpu")[0]]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return [first]


def _all_self_checks() -> Iterator[Line]:
    for device in checked_devices():
        yield from self_check(device)


# --- the whole report -------------------------------------------------------------------------------------------------


def _torch_lines(*, preallocates: bool) -> Iterator[Line]:
    for package in ("torch", "pallas_norm_torch"):
        if importlib.util.find_spec(package) is None:
            yield Line("", f"{package} is not installed: the way from PyTorch is not checked")
            return
    part = importlib.import_module("pallas_norm_torch._doctor")
    yield from part.examine(preallocates=preallocates)


def examine(*, preallocates: bool) -> Iterator[Line]:
    """preallocates: whether the user's programs take most of a GPU's memory, as JAX does by default."""
    yield from attempt("versions", versions)
    seen = list(attempt("devices", devices, next_step="unset JAX_PLATFORMS, or install a JAX for these devices"))
    yield from seen
    if seen[0].mark == "WRONG":  # JAX does not start, so nothing else can be asked
        return
    yield from attempt("paths", paths)
    yield from attempt("self-check", _all_self_checks)
    yield from attempt(
        "PyTorch",
        lambda: _torch_lines(preallocates=preallocates),
        next_step="pip install 'pallas-norm[torch]', or uninstall torch",
    )
