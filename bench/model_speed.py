"""python -m bench model: tokens per second of a whole model, by what computes its norms.

Decoding against a static cache, launched step by step and as a CUDA graph of one step; prefill of one prompt; a
training step, forward and backward. Providers take turns, many times over, because the host is noisy. A file of the
same machine, tree and options is continued, another one refused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import model_shapes, parity_model, parity_report, record, results, timing
from .calls import AbsentError
from .model_shapes import ROTATED, Case
from .parity_model import Model, Provider
from .parity_report import COMPILED

CONTEXT = 512  # tokens in the static cache; attention reads all of it at every step


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Prefill:
    """One prompt, into a new cache; the logits of its last token."""

    def __init__(self, model: torch.nn.Module, case: Case) -> None:
        self.device = next(model.parameters()).device
        self.ids = torch.randint(model.config.vocab_size, (case.batch, case.tokens), device=self.device)

    def prepare(self) -> None:
        pass

    def step(self, call: Model) -> Any:
        return call(self.ids, use_cache=True, logits_to_keep=1).logits


class Training:
    """The loss of a batch of sequences and the gradients of all weights, which nothing uses."""

    def __init__(self, model: torch.nn.Module, case: Case) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.ids = torch.randint(model.config.vocab_size, (case.batch, case.tokens), device=self.device)

    def prepare(self) -> None:
        self.model.requires_grad_(requires_grad=True)

    def step(self, call: Model) -> Any:
        with torch.enable_grad():
            loss = call(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()


class Decode:
    """One token for each sequence, at the last places of a full static cache."""

    def __init__(self, model: torch.nn.Module, case: Case) -> None:
        from transformers import StaticCache

        self.device = next(model.parameters()).device
        self.start = CONTEXT - case.tokens
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        self.ids = torch.randint(model.config.vocab_size, (case.batch, 1), device=self.device)
        self.places = torch.full((case.batch, 1), CONTEXT - 1, device=self.device)
        # Made here: transformers' own mask is a step's work too, but one that no norm changes.
        self.mask = torch.ones((case.batch, 1, 1, CONTEXT), dtype=torch.bool, device=self.device)
        # past_key_values until transformers 5.23; later ones warn of that name.
        named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.cached = {named: self.cache, "use_cache": True}
        model(self.ids, **self.cached)  # allocates the cache

    def prepare(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def step(self, call: Model) -> Any:
        return call(self.ids, attention_mask=self.mask, position_ids=self.places, **self.cached).logits


Work = Decode | Prefill | Training
KINDS: dict[str, Callable[[torch.nn.Module, Case], Work]] = {"decode": Decode, "prefill": Prefill, "train": Training}


def _captured(work: Work, call: Model) -> Callable[[], Any]:
    """A CUDA graph of one step; replaying needs neither the provider nor Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work.prepare()
            work.step(call)
    torch.cuda.current_stream().wait_stream(stream)
    work.prepare()
    graph = torch.cuda.CUDAGraph()
    # Of this thread: else a call of another thread may end the capture. Without, one of fifteen failed.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work.step(call)
    return graph.replay


@dataclasses.dataclass
class Runner:
    """What a provider needs for one case: `enter` around a sample, outside the time, and a step."""

    enter: Callable[[], contextlib.AbstractContextManager[Any]]
    step: Callable[[], Any] | None  # None: the model as `enter` gives it


def runner(model: torch.nn.Module, way: Provider, case: Case, work: Work) -> Runner:
    """Warmed up, compiled and where asked captured."""
    if case.graph and work.device.type != "cuda":
        raise AbsentError("CUDA graphs need a CUDA device")
    with way(model) as call:
        for _ in range(3):
            work.prepare()
            work.step(call)
        if case.graph:
            return Runner(contextlib.nullcontext, _captured(work, call))
    return Runner(lambda: way(model), None)


def sample(found: Runner, case: Case, work: Work) -> float:
    """Tokens per second, of `tokens` steps of decoding, one prompt or one training step."""
    steps = case.tokens if case.kind == "decode" else 1
    with found.enter() as call:
        work.prepare()
        step = found.step or (lambda: work.step(call))
        _synchronise(work.device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _synchronise(work.device)
        return case.batch * case.tokens / (time.perf_counter() - start)


def measure(model: torch.nn.Module, case: Case, ways: dict[str, Provider], *, repetitions: int) -> list[dict[str, Any]]:
    work = KINDS[case.kind](model, case)
    rows, running = [], dict[str, Runner]()
    for name, way in ways.items():
        try:
            running[name] = runner(model, way, case, work)
        except AbsentError as error:
            rows.append({"key": case.label, "provider": name, "status": "absent", "reason": str(error)})
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            rows.append({"key": case.label, "provider": name, "status": "failed", "reason": reason})
    samples: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repetitions):
        for name, found in running.items():
            samples[name].append(sample(found, case, work))
    for name, own in samples.items():
        row = {"key": case.label, "provider": name, "status": "measured", "tokens": case.batch * case.tokens}
        row |= {"tokens_per_s": round(statistics.median(own), 3), "spread": round(timing.spread(own), 3)}
        rows.append(row | {"samples": [round(value, 3) for value in own]})
    order = list(ways)
    return sorted(rows, key=lambda row: order.index(row["provider"]))


def run(arguments: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = arguments.shape or ("llama-3-8b" if device == "cuda" else "tiny")
    shape = parity_model.entry(model_shapes.SHAPES, name, "shape")
    cases = [case for case in shape.cases if arguments.only is None or arguments.only in case.label]
    if not cases:
        labels = ", ".join(case.label for case in shape.cases)
        raise ValueError(f"no case has {arguments.only!r} in its label; known are {labels}")
    model = model_shapes.build(shape, device=device, seed=arguments.seed)

    def chosen() -> dict[str, Provider]:
        known = parity_model.providers(model, compile_model=arguments.compile, dynamic=False)
        known[ROTATED] = lambda model: parity_model.ours(model, fuse_residual=True, fuse_qk_rope=True)
        known = {provider: way for provider, way in known.items() if provider in (*shape.providers, COMPILED)}
        return {provider: known[provider] for provider in parity_model.named(arguments.providers, known)}

    options = {"shape": name, "family": shape.family, **shape.config, "cache": CONTEXT, "seed": arguments.seed}
    options |= {"providers": list(chosen()), "repetitions": arguments.repetitions, "torch_device": device}
    out = arguments.out or results.default_path("model")
    file = parity_report.begin("model", options, arguments.commit)
    if out.exists():
        record.require_same(out, known := parity_report.read(out), file)
        file = known
    measured = {row["key"] for row in file["rows"]}
    for case in (case for case in cases if case.label not in measured):
        with torch.no_grad():  # compiled anew for each case, else dynamo stops compiling after a few shapes
            file["rows"] += measure(model, case, chosen(), repetitions=arguments.repetitions)
        parity_report.write(out, file)  # whole after every case
        print(f"measured {case.label}", flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    print(parity_report.table(file))
    print(f"wrote {out}")
    return int(any(row["status"] == "failed" for row in file["rows"]))
