"""python -m bench parity: how far each way to compute a causal LM's norms is from Hugging Face's rounding.

Two runs of one rounding never agree bit for bit through many layers: float32 sums in another order change last bits.
So everything is measured against Hugging Face's rounding with exact (float64) statistics, and the noise floor is the
distance of HF eager to that. In bfloat16, and with linears quantised to int4 in groups of 128 inputs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import parity_data, parity_model, parity_report, results
from .calls import AbsentError
from .parity_data import Question, Tokenizer
from .parity_model import Model, Provider
from .parity_report import EAGER, EXACT

WEIGHTS = ("bf16", "int4")
CHUNK = 512  # positions whose float64 logits are held at once
# Size, positions, length of a window, questions.
DEFAULTS = {
    "cuda": ("full", 65536, 512, 4000),
    "cpu": ("reduced", 2048, 128, 100),
}  # size, positions, length, questions
MARGINS = (1, 4)  # in floors


class Distance:
    """Of one provider to the exact-statistics model and to HF eager, over batches."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.top: list[torch.Tensor] = []
        self.windows: dict[str, list[torch.Tensor]] = {}  # squared distances of the logits

    def _add(self, name: str, values: Sequence[torch.Tensor]) -> None:
        new = torch.stack([value.double() for value in values]).cpu()
        self.sums[name] = self.sums.get(name, 0) + new

    def add(self, name: str, hidden: Sequence[torch.Tensor], logits: torch.Tensor, other: Any) -> None:
        """`other` is what this is compared with, called `name`."""
        for kind, own, reference in (("layers", hidden, other[0]), ("logits", [logits], [other[1]])):
            if not own:
                continue
            pairs = list(zip(own, reference, strict=True))
            self._add(f"{kind} {name}", [(a.float() - b.float()).square().sum() for a, b in pairs])
            self._add(f"{kind} {name} size", [b.float().square().sum() for _, b in pairs])
        difference = (logits.float() - other[1].float()).square().sum((1, 2)).double()
        self.windows.setdefault(name, []).append(difference.cpu())
        pieces = zip(logits.flatten(0, 1).split(CHUNK), other[1].flatten(0, 1).split(CHUNK), strict=True)
        kl = [_kl(reference.double(), own.double()) for own, reference in pieces]
        self._add(f"kl {name}", [torch.stack(kl).sum()])
        self._add(f"equal {name}", [(logits == other[1]).all(-1).sum()])

    def add_own(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        flat, nll = logits.flatten(0, 1), torch.zeros((), dtype=torch.float64, device=logits.device)
        for piece, target in zip(flat.split(CHUNK), targets.flatten().split(CHUNK), strict=True):
            nll += torch.nn.functional.cross_entropy(piece.double(), target, reduction="sum")
        self._add("nll", [nll])
        self._add("count", [torch.tensor(float(flat.numel())), torch.tensor(float(len(flat)))])
        self.top.append(flat.argmax(-1).cpu())

    def relative(self, kind: str, name: str) -> list[float]:
        own, size = self.sums[f"{kind} {name}"], self.sums[f"{kind} {name} size"]
        return (own / size).sqrt().tolist()

    def error(self, name: str) -> float:
        """The standard error of the logits' relative distance, from its scatter between windows."""
        own = torch.cat(self.windows[name])
        if len(own) < 2 or not own.any():
            return 0.0
        share = (own.std() / len(own) ** 0.5 / own.mean()).item()
        return self.relative("logits", name)[0] * share / 2

    @property
    def positions(self) -> int:
        return int(self.sums["count"][1])

    def row(self, reference: Distance, eager: Distance, margin: torch.Tensor) -> dict[str, Any]:
        floor = (eager.sums["logits exact"][0] / eager.sums["count"][0]).sqrt().item()
        own, exact, usual = (torch.cat(distance.top) for distance in (self, reference, eager))
        flipped, perplexity = own != exact, math.exp(self.sums["nll"][0] / self.positions)
        row: dict[str, Any] = {"positions": self.positions, "floor_logit": floor}
        for name in ("exact", "eager"):
            row[f"layers_to_{name}"] = self.relative("layers", name)
            row[f"logits_to_{name}"] = self.relative("logits", name)[0]
            row[f"logits_to_{name}_error"] = self.error(name)
            row[f"equal_positions_to_{name}"] = int(self.sums[f"equal {name}"][0])
            row[f"kl_to_{name}"] = self.sums[f"kl {name}"][0].item() / self.positions
        row |= {"flips": int(flipped.sum()), "flips_to_eager": int((own != usual).sum())}
        for times in MARGINS:
            wide = margin > times * floor
            row[f"positions_beyond_{times}"] = int(wide.sum())
            row[f"flips_beyond_{times}"] = int((flipped & wide).sum())
        difference = perplexity - math.exp(eager.sums["nll"][0] / eager.positions)
        return row | {"perplexity": perplexity, "perplexity_less_eager": difference}


def _kl(reference: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    log_p, log_q = reference.log_softmax(-1), own.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def _outputs(model: Model, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    found = model(tokens, use_cache=False, output_hidden_states=True)
    return list(found.hidden_states), found.logits


def distances(
    model: torch.nn.Module, ways: dict[str, Provider], windows: torch.Tensor, *, batch: int
) -> tuple[dict[str, Distance], torch.Tensor]:
    """Of every provider over the windows, and the exact model's top-2 margin at each position."""
    found, margins = {name: Distance() for name in ways}, []
    for tokens in windows.split(batch):
        known: dict[str, Any] = {}
        for name, way in ways.items():
            with way(model) as call:
                hidden, logits = _outputs(call, tokens[:, :-1])
            found[name].add_own(logits, tokens[:, 1:])
            if name in (EXACT, EAGER):
                known[name] = (hidden, logits)
            if EAGER in known:
                for other, title in ((EXACT, "exact"), (EAGER, "eager")):
                    found[name].add(title, hidden, logits, known[other])
        for other, title in ((EXACT, "exact"), (EAGER, "eager")):  # the exact model ran before HF eager
            found[EXACT].add(title, *known[EXACT], known[other])
        top = known[EXACT][1].flatten(0, 1).float().topk(2, -1).values
        margins.append((top[:, 0] - top[:, 1]).cpu())
    return found, torch.cat(margins)


def encode(questions: Sequence[Question], tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """Of every choice of every question: the tokens, and how many of them are the context's."""
    found = []
    for question in questions:
        prefix = len(tokenizer.encode(question.context))
        for choice in question.choices:
            tokens = tokenizer.encode(question.context + choice)
            found.append((tokens, min(prefix, len(tokens) - 1)))
    return found


def scores(model: Model, encoded: Sequence[tuple[list[int], int]], *, batch: int, device: str) -> list[float]:
    """Log-likelihood of each choice after its context, in nats. Padding follows, so causal attention ignores it."""
    found = []
    for start in range(0, len(encoded), batch):
        some = encoded[start : start + batch]
        length = max(len(tokens) for tokens, _ in some)
        padded = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in some], device=device)
        logits = model(padded[:, :-1], use_cache=False).logits
        place = torch.arange(1, length, device=device)
        low = torch.tensor([prefix for _, prefix in some], device=device)[:, None]
        high = torch.tensor([len(tokens) for tokens, _ in some], device=device)[:, None]
        asked = (place >= low) & (place < high)
        chosen = logits[asked].double().log_softmax(-1).gather(1, padded[:, 1:][asked][:, None])[:, 0]
        each = torch.zeros(len(some), dtype=torch.float64, device=device)
        found += each.index_add(0, asked.nonzero()[:, 0], chosen).tolist()
    return found


def answers(questions: Sequence[Question], found: Sequence[float]) -> list[int]:
    """The likeliest choice of each question; the first of equals."""
    chosen, start = [], 0
    for question in questions:
        own = found[start : start + len(question.choices)]
        chosen.append(max(range(len(own)), key=own.__getitem__))
        start += len(own)
    return chosen


def graded(questions: Sequence[Question], own: list[int], exact: list[int], eager: list[int]) -> dict[str, Any]:
    right = sum(answer == question.answer for answer, question in zip(own, questions, strict=True))
    changed = [sum(a != b for a, b in zip(own, other, strict=True)) for other in (exact, eager)]
    row = {"questions": len(questions), "right": right, "accuracy": right / len(questions)}
    row["interval"] = parity_data.interval(right, len(questions))
    return row | {"answers_not_exact": changed[0], "answers_not_eager": changed[1]}


def _available(model: torch.nn.Module, ways: dict[str, Provider], sample: torch.Tensor) -> dict[str, str]:
    """Why each provider that cannot run cannot; one that fails fails here, before anything is measured."""
    reasons = {}
    for name, way in ways.items():
        try:
            with way(model) as call:
                _outputs(call, sample)
        except AbsentError as error:
            reasons[name] = f"absent: {error}"
        except Exception as error:
            if name in (EXACT, EAGER):
                raise
            reasons[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return reasons


def measure(
    model: torch.nn.Module,
    windows: torch.Tensor,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    names: str | None = None,
    *,
    compile_model: bool = False,
    batch: int = 8,
) -> list[dict[str, Any]]:
    """One row for each provider, HF exact and HF eager among them."""
    known = parity_model.providers(model, compile_model=compile_model)
    chosen = parity_model.named(names, known)
    ways = {name: way for name, way in known.items() if name in (EXACT, EAGER, *chosen)}
    with torch.no_grad():
        reasons = _available(model, ways, windows[:batch, :-1])
        running = {name: way for name, way in ways.items() if name not in reasons}
        found, margin = distances(model, running, windows, batch=batch)
        encoded, picked = encode(questions, tokenizer), {}
        sequences = max(1, 4 * windows[:batch, 1:].numel() // max(len(tokens) for tokens, _ in encoded))
        for name, way in running.items():
            with way(model) as call:
                likelihoods = scores(call, encoded, batch=sequences, device=str(windows.device))
            picked[name] = answers(questions, likelihoods)
    rows = []
    for name in ways:
        if name in reasons:
            status, reason = reasons[name].split(": ", 1)
            rows.append({"provider": name, "status": status, "reason": reason})
            continue
        row = {"provider": name, "status": "measured", **found[name].row(found[EXACT], found[EAGER], margin)}
        rows.append(row | graded(questions, picked[name], picked[EXACT], picked[EAGER]))
    return rows


def _model(arguments: argparse.Namespace, size: str, text: parity_data.Text, device: str) -> tuple[Any, Tokenizer]:
    if arguments.model is None:
        model = parity_model.train(
            parity_model.entry(parity_model.SIZES, size, "size"), text.training, device=device, seed=arguments.seed
        )
        if arguments.keep:
            model.save_pretrained(arguments.keep)
        return model, parity_data.Bytes()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device).eval()
    return model, parity_data.tokenizer_of(arguments.model, model.config)


def run(arguments: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, positions, length, count = DEFAULTS[device]
    size, length = arguments.size or size, arguments.length or length
    positions, count = arguments.positions or positions, arguments.count or count
    wanted = [name.strip() for name in arguments.weights.split(",")]
    if unknown := set(wanted) - set(WEIGHTS):
        raise ValueError(f"unknown weights: {', '.join(sorted(unknown))}; known are {', '.join(WEIGHTS)}")
    text = parity_data.read_text()
    model, tokenizer = _model(arguments, size, text, device)
    made = {"count": count, "seed": arguments.seed}
    if arguments.questions:
        questions = parity_data.read_questions(arguments.questions, count=count)
    else:
        questions = parity_data.continuations(text.held_out, **made)
    shape = {"count": -(-positions // length), "length": length, "seed": arguments.seed}
    windows = torch.tensor(parity_data.windows(text.held_out, tokenizer, **shape), device=device)
    options = {"model": Path(arguments.model).name if arguments.model else f"trained here, {size}"}
    options |= {"questions": arguments.questions.name if arguments.questions else "continuations of the held-out text"}
    options |= {"seed": arguments.seed, "length": length, "batch": arguments.batch, "providers": arguments.providers}
    options |= {"compile": arguments.compile, "weights": wanted, "text": text.digest, "torch_device": device}
    options |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    file = parity_report.begin("parity", options, arguments.commit)
    for name in (name for name in WEIGHTS if name in wanted):  # int4 last: it changes the model
        if name == "int4":
            options["int4_linears"] = parity_model.quantise(model)
        rows = measure(
            *(model, windows, questions, tokenizer, arguments.providers),
            compile_model=arguments.compile,
            batch=arguments.batch,
        )
        file["rows"] += [{"key": name, **row} for row in rows]
    out = arguments.out or results.default_path("parity")
    parity_report.write(out, file)
    print(parity_report.table(file))
    print(f"wrote {out}")
    print(f"drew {parity_report.draw(file, arguments.picture or out.with_suffix('.svg'))}")
    return int(any(row["status"] == "failed" for row in file["rows"]))
