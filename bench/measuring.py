"""One case: every provider built, checked and timed; one row for each, measured or not."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import rounding, timing
from .baselines import BASELINES, COPY, IN_JAX
from .calls import AbsentError, Call, failure
from .operands import Operands
from .suite import Case

HOST_BYTES = 16 << 20  # host time is measured where the kernels are short: it does not depend on the size


def _run_once(provider: str, operands: Operands) -> Call:
    call = BASELINES[provider](operands)
    timing.wait(call())
    return call


def _checked(provider: str, call: Call, operands: Operands) -> dict[str, Any]:
    """Runs the call on poisoned memory, and judges what it gives."""
    if provider == COPY:
        return {"rounding": "none"}
    rounding.poison(operands, torch=provider not in IN_JAX)
    outputs = rounding.outputs_of(operands, call())
    wrong = rounding.wrong_outputs(operands, outputs)
    return {"wrong_outputs": wrong, **rounding.judge(operands, outputs)}


def built(
    operands: Operands, providers: Sequence[str], workers: int = 1
) -> tuple[dict[str, dict[str, Any]], dict[str, Call]]:
    """(a row for each provider, the calls of those that run), each compiled, run once and checked.

    workers: threads that compile what runs in JAX, beside the main thread, which builds what runs in torch.
    """
    case = operands.case
    operands.arrays  # noqa: B018  drawn here, before the threads ask for it
    common = {"key": case.label, **dataclasses.asdict(case), "bytes": case.bytes}
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        builds: dict[str, Callable[[], Call]] = {
            provider: pool.submit(_run_once, provider, operands).result
            if provider in IN_JAX
            else functools.partial(_run_once, provider, operands)
            for provider in providers
        }
        for provider in sorted(providers, key=lambda name: name in IN_JAX):
            row = rows[provider] = {**common, "provider": provider, "status": "measured"}
            try:
                call = builds[provider]()
                if call.note:
                    row["note"] = call.note
                calls[provider] = call
            except AbsentError as absent:
                row |= {"status": "absent", "reason": str(absent)}
            except Exception as error:
                row |= {"status": "failed", "reason": failure(error)}
    for provider in list(calls):
        try:
            rows[provider] |= _checked(provider, calls[provider], operands)
        except Exception as error:
            del calls[provider]
            rows[provider] |= {"status": "failed", "reason": failure(error)}
    return rows, {provider: calls[provider] for provider in providers if provider in calls}


def measure_case(
    case: Case, providers: Sequence[str], *, repetitions: int, flush: timing.Flush | None, workers: int = 1
) -> list[dict[str, Any]]:
    """Device times after `flush`; without one, wall times. Host times in both, of cases up to HOST_BYTES.

    Nothing is timed before all are built.
    """
    rows, calls = built(Operands(case), providers, workers)
    if calls:
        try:
            _timed(case, calls, rows, repetitions=repetitions, flush=flush)
        except timing.LostKernelsError as error:
            for provider in calls:
                rows[provider] |= {"status": "failed", "reason": failure(error)}
    return [rows[provider] for provider in providers]


def _timed(
    case: Case,
    calls: Mapping[str, Call],
    rows: Mapping[str, dict[str, Any]],
    *,
    repetitions: int,
    flush: timing.Flush | None,
) -> None:
    if flush is None:
        timings = timing.measure_wall(calls, repetitions=repetitions)
    else:
        timings = timing.measure(calls, repetitions=repetitions, flush=flush)
    for provider, found in timings.items():
        rows[provider].update(found.row())
        if flush is None:
            del rows[provider]["kernels"]
    if case.bytes <= HOST_BYTES:
        hosted = {provider: call for provider, call in calls.items() if provider != COPY}
        for provider, found in timing.host_times(hosted).items():
            samples = [round(sample, 2) for sample in found.samples_us]
            rows[provider].update(host_us=round(found.median_us, 2), host_samples_us=samples)
