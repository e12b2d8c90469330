"""What a record says, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import record
from .baselines import BASELINES, COPY, OURS
from .timing import geometric_mean

MARKS = {"HF": "h", "single": "s", "other": "?", "float32": "", "none": ""}
LEGEND = (
    "Medians in us. h: Hugging Face's rounding, s: a single one, ?: neither (float32 has one only). "
    "!: outputs that are wrong. share: the copy kernel's time over pallas-norm's."
)


def by_case(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows by case, then provider."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["key"], {})[row["provider"]] = row
    return cases


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """As columns of a page."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_on(file: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items() if version)
    return f"{file['device']}, {versions}, commit {file['commit'][:9]}, {file['date'][:10]}."


def columns(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def cell(row: dict[str, Any] | None, *, digits: int = 1) -> str:
    if row is None or row["status"] == "absent":
        return "-"
    if row["status"] == "failed":
        return "failed"
    wrong = "!" if row.get("wrong_outputs") else ""
    return f"{row['median_us']:.{digits}f}{MARKS[row['rounding']]}{wrong}"


def share_of_copy(case: dict[str, dict[str, Any]], provider: str = OURS) -> float | None:
    times = [case.get(name, {}).get("median_us") for name in (COPY, provider)]
    return times[0] / times[1] if all(times) else None


def one_line(rows: Sequence[dict[str, Any]]) -> str:
    return f"{rows[0]['key']}: " + " ".join(f"{row['provider']} {cell(row)}" for row in rows if cell(row) != "-")


def not_measured(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each reason: nothing is left out silently."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            reasons.setdefault((row["status"], row["provider"], row["reason"]), []).append(row["key"])
    return [
        f"{status}: {provider}, {len(keys)} {'case' if len(keys) == 1 else 'cases'} (such as {keys[0]}): {reason}"
        for (status, provider, reason), keys in reasons.items()
    ]


def _wrong(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [
        f"wrong: {row['provider']}, {row['key']}: {row['wrong_outputs']} outputs are NaN or far from the reference"
        for row in rows
        if row.get("wrong_outputs")
    ]


def gains(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each operation and peer the geometric mean of its time over ours."""
    cases, lines = by_case(rows), []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        found = []
        for peer in BASELINES:
            ratios = [
                case[peer]["median_us"] / case[OURS]["median_us"]
                for case in cases.values()
                if OURS in case and peer in case and case[OURS]["operation"] == operation
            ]
            if ratios and peer != OURS:
                found.append(f"{peer} {geometric_mean(ratios):.2f} ({len(ratios)})")
        if found:
            lines.append(f"{operation}: time over that of {OURS}, geometric mean (cases): {', '.join(found)}")
    return lines


def of_run(file: dict[str, Any]) -> str:
    rows = file["rows"]
    providers = [
        name for name in file["options"]["providers"] if any(r["provider"] == name for r in record.measured(file))
    ]
    lines = [["case", "MB", *providers, "share"]]
    for key, case in by_case(rows).items():
        share = share_of_copy(case)
        size = f"{next(iter(case.values()))['bytes'] / 1e6:.2f}"
        lines.append(
            [key, size, *(cell(case.get(name)) for name in providers), "" if share is None else f"{share:.3f}"]
        )
    head = f"{file['device']}, commit {str(file['commit'])[:9]}; {file['measures']}"
    text = [head, columns(lines), LEGEND, *gains(record.measured(file)), *_wrong(rows), *not_measured(rows)]
    return "\n".join(text)


def of_overhead(file: dict[str, Any]) -> str:
    lines = [["call", "us", "spread", "first call, ms"]]
    for row in record.measured(file):
        first = f"{row['first_call_ms']:.1f}"
        lines.append([row["provider"], f"{row['median_us']:.2f}", f"{row['spread_us']:.2f}", first])
    return "\n".join([f"{file['device']}; {file['measures']}", columns(lines), *not_measured(file["rows"])])
