"""python -m bench compare A B: what changed from A to B by more than both spreads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import record
from .baselines import COPY
from .table import columns
from .timing import geometric_mean


def _by_row(file: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["key"], row["provider"]): row for row in file["rows"]}


def beyond_spread(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """The medians differ by more than the two half quartile distances together."""
    return abs(after["median_us"] - before["median_us"]) > before["spread_us"] + after["spread_us"]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Of the two machines and trees."""
    names = ("device", "nvidia_smi", "versions", "commit")
    return [f"{name}: {a[name]} -> {b[name]}" for name in names if a[name] != b[name]]


def compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    for name in ("command", "measures"):
        if a[name] != b[name]:
            raise ValueError(f"A has {name} {a[name]!r}, B has {b[name]!r}; needed two records of the same kind")
    before, after = _by_row(a), _by_row(b)
    both = [key for key in before if key in after]
    pairs = {k: (before[k], after[k]) for k in both if before[k]["status"] == after[k]["status"] == "measured"}
    changed = {key: pair for key, pair in pairs.items() if beyond_spread(*pair)}
    lines = [["case", "provider", "A", "B", "B / A"]]
    for (key, provider), (old, new) in sorted(changed.items(), key=lambda item: -_ratio(*item[1])):
        lines.append([key, provider, f"{old['median_us']:.2f}", f"{new['median_us']:.2f}", f"{_ratio(old, new):.3f}"])
    text = differences(a, b)
    text.append(columns(lines) if changed else "no change beyond the spread")
    text.append(f"{len(changed)} of {len(pairs)} medians changed by more than the two spreads together")
    for provider in dict.fromkeys(provider for _, provider in pairs):
        ratios = [_ratio(*pair) for (_, name), pair in pairs.items() if name == provider]
        remark = " (no change of ours: it shows how the machines differ)" if provider == COPY else ""
        text.append(f"{provider}: B / A, geometric mean of {len(ratios)}: {geometric_mean(ratios):.3f}{remark}")
    for key in both:
        old, new = before[key], after[key]
        for name in ("status", "rounding", "wrong_outputs"):
            if old.get(name) != new.get(name) and (name == "status" or key in pairs):
                reason = f" ({new['reason']})" if name == "status" and "reason" in new else ""
                text.append(f"{name} of {key[1]}, {key[0]}: {old.get(name)} -> {new.get(name)}{reason}")
    for name, own, other in (("A", before, after), ("B", after, before)):
        if only := [key for key in own if key not in other]:
            text.append(f"only in {name}: {len(only)} rows, such as {only[0][0]} of {only[0][1]}")
    return "\n".join(text)


def _ratio(old: dict[str, Any], new: dict[str, Any]) -> float:
    return new["median_us"] / old["median_us"]


def run(a: Path, b: Path) -> None:
    print(compare(record.read(a), record.read(b)))
