"""What `patch` and `unpatch` say that they did."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Left:
    """A module that looks like an RMSNorm and was not replaced, or not restored, and why."""

    name: str
    class_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `patch` or `unpatch` did, as numbers of modules by class. str() gives it in words."""

    replaced: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that compute with `rms_norm` now."""
    fused: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Decoder layers that compute with `add_rms_norm` now."""
    restored: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Modules that have their own class back."""
    already: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that an earlier call had replaced."""
    left: tuple[Left, ...] = ()
    """Modules that look like an RMSNorm and stayed as they are: each with its name, class_name and reason."""
    known: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """How each replaced class was recognised: by its source, by its computation, or by `known`."""
    runs: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Where the replaced norms run eagerly, as they lie now, and why, with their number."""
    rotated: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Attention modules that compute with `rms_norm_rope` now."""

    def __str__(self) -> str:
        parts = [
            ("replaced", self.replaced),
            ("fused", self.fused),
            ("rotated", self.rotated),
            ("restored", self.restored),
        ]
        lines = [_counts(verb, counts) for verb, counts in (*parts, ("replaced before", self.already)) if counts]
        ways: dict[str, list[str]] = {}
        for class_name, way in sorted(self.known.items()):
            ways.setdefault(way, []).append(class_name)
        lines += [f"recognised by {way}: {', '.join(names)}" for way, names in ways.items()]
        lines += [f"{count} of them {'run' if count > 1 else 'runs'} {how}" for how, count in self.runs.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            reasons.setdefault((left.class_name, left.reason), []).append(left.name or "the module itself")
        for (class_name, reason), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left {len(names)} {class_name} ({names[0]}{more}): {reason}")
        return "\n".join(lines) or "found no RMSNorm"


class Draft:
    """A report being made."""

    def __init__(self) -> None:
        self.replaced, self.fused, self.restored, self.already = (Counter[str]() for _ in range(4))
        self.left: list[Left] = []
        self.known: dict[str, str] = {}
        self.runs, self.rotated = Counter[str](), Counter[str]()

    def report(self) -> Report:
        counts = (dict(one) for one in (self.replaced, self.fused, self.restored, self.already))
        return Report(
            *counts, left=tuple(self.left), known=self.known, runs=dict(self.runs), rotated=dict(self.rotated)
        )


def _counts(verb: str, counts: Mapping[str, int]) -> str:
    return f"{verb} {sum(counts.values())}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
