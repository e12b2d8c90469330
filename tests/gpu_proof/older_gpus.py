"""Are the kernels of GPUs before Hopper right? On a Hopper GPU, bit by bit against its own.

    python -m tests.gpu_proof.older_gpus [FOLDER [--seconds 280]]

A decoding step of patched Llamas as a CUDA graph, with kernels that are PTX for sm_80 of an A100's plans (`ampere.py`):
the same logits, and no more time. Then every family by the direct launch: y, s, rstd, dx and dweight of ordinary
numbers have the bits of this GPU's own kernels. What is not reached in that time counts as wrong. FOLDER gets the log.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.model_speed import Case as Step
from bench.model_speed import Decode, Shape, build
from pallas_norm._spec import Spec
from pallas_norm.plans.fitting import Misfit
from pallas_norm_torch import _kernels, _library, huggingface
from tests.gpu_proof.ampere import A100, Assembler, as_ampere, assembler
from tests.gpu_proof.every_launch import RAW, TORCH, require_launch

ROWS = 1003  # blocks of up to 16 rows, some left over, and more than the programs of long rows
SPEC, LLAMA = Spec(eps=1e-6), Spec(eps=1e-5)
PROCESSES = 12
REPLAYS = 40  # of a sample, each of which takes a place of the static cache
WIDTHS = {
    "f32": (64, 128, 576, 1000, 1024, 4096, 8192, 16384),
    "f16": (128, 896, 4096),
    "bf16": (
        *(64, 127, 128, 200, 576, 640, 768, 896, 1000, 1024, 2048, 2880, 4096, 5120, 7168, 8191, 8192, 12288, 16384),
        32768,
    ),
}
MODELS = {  # hidden sizes as of Llama 3 8B, 70B and 405B, with few layers
    4096: Shape(4096, 14336, 8, 32, 8, 32000),
    8192: Shape(8192, 28672, 2, 64, 8, 32000),
    16384: Shape(16384, 53248, 1, 128, 8, 32000),
}
# (rows, n) whose plans are others without bulk copies.
FORWARDS, BACKWARDS = ((1024, 32768),), ((65536, 896), (16384, 2048), (16384, 4096), (8192, 8192), (4096, 16384))
SLOWER = 1.03  # a decoding step, at most

Results = dict[str, torch.Tensor]


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def cases() -> Iterator[tuple[str, str, int, bool]]:
    """(forward or backward, dtype, n, with a residual), where an A100 has a kernel."""
    for dtype, widths in WIDTHS.items():
        for n in widths:
            for residual in (False, True):
                for operation in ("forward", "backward"):
                    try:
                        assert program_of(operation, dtype, n, residual=residual).plan is not None
                    except Misfit:
                        continue
                    yield operation, dtype, n, residual


def program_of(operation: str, dtype: str, n: int, *, residual: bool) -> Any:
    x = TORCH[dtype]
    if operation == "forward":
        kernel: Any = _kernels.Forward(n, x, x, SPEC, x if residual else None, with_rstd=True)
    else:
        kernel = _kernels.Backward(n, x, x, x, Spec(eps=0.0), residual, with_dweight=True)
    return _kernels.program_of(kernel, A100)


def results(operation: str, dtype: str, n: int, *, residual: bool) -> Results:
    own = TORCH[dtype]
    x, other, weight = (draw(*shape, dtype=own, seed=seed) for seed, shape in enumerate(((ROWS, n), (ROWS, n), (n,))))
    require_launch(x)
    if operation == "forward":
        y, s, rstd = _library.forward(x, other if residual else None, weight, SPEC, with_rstd=True)
        found = {"y": y, "s": s, "rstd": rstd}
    else:
        rstd = torch.rsqrt(x.float().square().mean(-1) + SPEC.eps)
        dy = draw(ROWS, n, dtype=own, seed=7)
        dx, dweight = _library.backward(x, weight, rstd, dy, other if residual else None, SPEC, with_dweight=True)
        found = {"dx": dx, "dweight": dweight}
    require_launch(x)  # still: a kernel that failed its trial is refused
    return {name: value for name, value in found.items() if value is not None}


def differing(ours: Results, theirs: Results) -> dict[str, int]:
    def bits(values: torch.Tensor) -> torch.Tensor:
        return values.view(RAW[values.element_size()][1])

    assert ours.keys() == theirs.keys()
    counts = {name: int((bits(ours[name]) != bits(theirs[name])).sum()) for name in ours}
    return {name: count for name, count in counts.items() if count}


# --- a decoding step --------------------------------------------------------------------------------------------------


def captured(model: torch.nn.Module, work: Decode) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work.prepare()
            work.step(model)
    torch.cuda.current_stream().wait_stream(stream)
    work.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = work.step(model)
    return graph, logits


def microseconds(replay: Callable[[], Any], times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / times


def decode(shape: Shape, assembled: Assembler) -> tuple[int, float, float, int]:
    """(logits that differ, us of a step with this GPU's kernels, with an A100's, how many of those were loaded)."""
    model = build(shape, device="cuda", seed=0)
    huggingface.patch(model, fuse_residual=True)
    with torch.no_grad():
        work = Decode(model, Step("decode", 1, REPLAYS))
        own, expected = captured(model, work)
        loaded: list[Any] = []
        with as_ampere(assembled, loaded):
            older, found = captured(model, work)
        for graph in (own, older):
            work.prepare()
            graph.replay()
        differ = int((found.view(torch.int16) != expected.view(torch.int16)).sum())
        times: dict[Any, list[float]] = {own: [], older: []}
        for _ in range(15):
            for graph, samples in times.items():
                work.prepare()
                samples.append(microseconds(graph.replay, REPLAYS))
    return differ, statistics.median(times[own]), statistics.median(times[older]), len(loaded)


# --- everything -------------------------------------------------------------------------------------------------------


def speeds(assembled: Assembler, say: Callable[[str], None]) -> None:
    """For the record: what the plans without bulk copies cost on this GPU, whose memory is faster than any A100's."""
    for operation, shapes in (("forward", FORWARDS), ("backward", BACKWARDS)):
        for rows, n in shapes:
            x, dy, weight = (draw(*shape, dtype=torch.bfloat16, seed=1) for shape in ((rows, n), (rows, n), (n,)))
            rstd = torch.rsqrt(x.float().square().mean(-1) + SPEC.eps)

            def call(operation: str = operation, operands: Any = (x, weight, rstd, dy)) -> None:
                if operation == "forward":
                    _library.forward(operands[0], None, operands[1], SPEC, with_rstd=True)
                else:
                    _library.backward(*operands, None, SPEC, with_dweight=True)

            times: dict[bool, list[float]] = {False: [], True: []}
            for older in (False, True) * 2:
                with as_ampere(assembled, []) if older else contextlib.nullcontext():
                    call()
                    times[older].append(microseconds(call, 20))
            own, as_older = min(times[False]), min(times[True])
            say(
                f"{operation} {rows} x {n} bf16, L2 as it comes: {own:.1f} us, as on an A100 {as_older:.1f}, "
                f"{as_older / own:.2f} times"
            )


def run(log: TextIO | None, seconds: float) -> int:
    """How many things were wrong, or not reached."""

    def say(line: str) -> None:
        print(line, flush=True)
        if log is not None:
            print(line, file=log, flush=True)

    begun = time.monotonic()
    say(f"kernels of an A100, as PTX for sm_80, on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    every, wrong, reached, loaded = list(cases()), 0, 0, list[Any]()
    with assembler(PROCESSES) as assembled:
        for n in MODELS:
            for residual in (False, True):
                added = torch.bfloat16 if residual else None
                kernel = _kernels.Forward(n, torch.bfloat16, torch.bfloat16, LLAMA, added, with_rstd=False)
                assembled.ptx(_kernels.program_of(kernel, A100))
        for operation, dtype, n, residual in every:
            assembled.ptx(program_of(operation, dtype, n, residual=residual))
        for n, shape in MODELS.items():
            differ, own, older, count = decode(shape, assembled)
            bad = differ > 0 or older > SLOWER * own or not count
            wrong += bad
            say(
                f"decode step, n = {n}, {shape.layers} layers: {differ} logits differ; {own:.1f} us, as on an A100 "
                f"{older:.1f}, {older / own:.3f} times; {count} kernels of sm_80{' WRONG' * bad}"
            )
            gc.collect()
            torch.cuda.empty_cache()
        speeds(assembled, say)
        for operation, dtype, n, residual in every:
            if time.monotonic() - begun > seconds:
                break
            expected = results(operation, dtype, n, residual=residual)
            with as_ampere(assembled, loaded):
                differ = differing(results(operation, dtype, n, residual=residual), expected)
            reached += 1
            wrong += bool(differ)
            say(f"{operation}{' residual' * residual} {n} {dtype}: bits that differ: {differ or 0}")
        say(f"{len(loaded)} kernels of sm_80; {len(every) - reached} of {len(every)} cases not reached")
        wrong += len(every) - reached
    say(f"older GPUs: {wrong} wrong or not reached, {time.monotonic() - begun:.0f} s")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=280)
    given = parser.parse_args()
    with (given.folder / "older_gpus.txt").open("w") if given.folder else contextlib.nullcontext() as file:
        sys.exit(bool(run(file, given.seconds)))
