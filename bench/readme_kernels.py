"""The tables of kernels in README.md and docs/: kernel times, host times, a training step, outputs that differ."""

from __future__ import annotations

from typing import Any

from . import record
from .baselines import BASELINES, COPY, OURS
from .suite import README as CASES
from .table import by_case, cell, markdown, measured_on, share_of_copy

MARKS_EXPLAINED = (
    "*h*, *s* and *?* say where a provider rounded in that very program: as Hugging Face, once, or as neither."
)

# Provider -> its name where host times are measured.
PEERS = {
    "pallas-norm": "pallas-norm torch",
    "F.rms_norm": "F.rms_norm",
    "Liger": "Liger",
    "Quack": "Quack",
    "XLA": "XLA, jax.jit",
}
FORWARD, BACKWARD = "forward 16384 x 4096 bfloat16", "backward 16384 x 4096 bfloat16"


def summary(bits: dict[str, Any], run: dict[str, Any], host: dict[str, Any]) -> str:
    """README.md's table: what differs, and what it costs."""
    counted = {row["provider"]: row for row in bits["rows"] if (row["dtype"], row["n"]) == ("bfloat16", 4096)}
    cases = by_case(record.measured(run))
    calls = {row["provider"]: row for row in record.measured(host)}

    def row(label: str, texts: dict[str, str | None]) -> list[str]:
        return [label, *(texts[peer] or "-" for peer in PEERS)]

    def time(case: str, peer: str) -> str | None:
        return f"{cases[case][peer]['median_us']:.1f}" if peer in cases[case] else None

    def differ(peer: str) -> str | None:
        return (
            f"{100 * counted[peer]['differ_from_hf_eager'] / counted[peer]['elements']:.4f}"
            if peer in counted
            else None
        )

    def call(peer: str) -> str | None:
        return f"{calls[PEERS[peer]]['median_us']:.1f}" if PEERS[peer] in calls else None

    rows = [
        row("outputs that differ from HF eager, %, bfloat16, n = 4096", {peer: differ(peer) for peer in PEERS}),
        row(f"{FORWARD}, us", {peer: time(FORWARD, peer) for peer in PEERS}),
        row(f"{BACKWARD}, us", {peer: time(BACKWARD, peer) for peer in PEERS}),
        row(f"host time of a call, {host['options']['case']}, us", {peer: call(peer) for peer in PEERS}),
    ]
    origins = [f"{file['device']}, commit {file['commit'][:9]}, {file['date'][:10]}" for file in (bits, run, host)]
    where = (
        origins[0]
        if len(set(origins)) == 1
        else "first row {}; the two times of kernels {}; last row {}".format(*origins)
    )
    return markdown(["", *PEERS], rows) + f"\n\n-: not measured. Measured on: {where}.\n"


def _reasons(rows: list[dict[str, Any]], found: set[str]) -> str:
    """Who was asked for and measured nowhere, with the reason that the first case has."""
    reasons: dict[str, str] = {}
    for row in rows:
        if row["provider"] not in found:
            reasons.setdefault(row["provider"], row["reason"])
    return f" Not measured: {'; '.join(f'{name} ({reason})' for name, reason in reasons.items())}." if reasons else ""


def _not_asked_for(file: dict[str, Any]) -> list[dict[str, Any]]:
    providers = file["options"]["providers"]
    return [{"provider": name, "reason": "not asked for"} for name in BASELINES if name not in providers]


def performance(file: dict[str, Any]) -> str:
    """The cases of suite.README, and every provider that was measured in any of them."""
    found = by_case(file["rows"])
    cases = {case.label: found[case.label] for case in CASES if case.label in found}
    measured = {name for case in cases.values() for name, row in case.items() if row["status"] == "measured"}
    providers = [name for name in file["options"]["providers"] if name in measured]

    def cells(key: str, case: dict[str, dict[str, Any]]) -> list[str]:
        share = share_of_copy(case)
        return [key, *(cell(case.get(name)) for name in providers), "" if share is None else f"{share:.2f}"]

    return (
        "Kernel times in microseconds, L2 cold, medians of one interleaved run; *copy* is a kernel that moves the same "
        "bytes and does nothing else, and *share* its time over that of pallas-norm. *XLA* is this library's reference "
        f"compiled by XLA, *plain jit* the formula as a JAX program writes it, *F.rms_norm* that of torch "
        f"{file['versions'].get('torch')}. {MARKS_EXPLAINED}\n\n"
        + markdown(["case", *providers, "share"], (cells(key, case) for key, case in cases.items()))
        + "\n\n![Share of the copy kernel's throughput](roofline.svg)\n\n"
        + f"{measured_on(file)} All {len(found)} cases with all samples: `{file['path']}`; "
        + "[speed-up over every provider](speedup.md)."
        + _reasons([*file["rows"], *_not_asked_for(file)], {row["provider"] for row in record.measured(file)})
        + (f" {len(file['left'])} cases of the suite were not reached." if file["left"] else "")
        + "\n"
    )


BEHIND = 1.03  # our time over the fastest peer's, above which a case is named
WAYS = (OURS, "pallas-norm torch")  # to call the kernel


def behind(file: dict[str, Any]) -> str:
    """The cases in which a peer is clearly faster than both ways to call ours."""
    cases, rows = by_case(record.measured(file)), list[list[str]]()
    for key, case in cases.items():
        best = min(case[name]["median_us"] for name in WAYS if name in case)
        peers = (row for name, row in case.items() if name not in (*WAYS, COPY, "XLA"))
        first = min(peers, key=lambda row: row["median_us"])
        if best > BEHIND * first["median_us"]:
            copy = f"{case[COPY]['median_us']:.2f}"
            rows.append([key, copy, f"{best:.2f}", cell(first, digits=2), first["provider"]])
    return (
        f"In {len(rows)} of {len(cases)} cases both ways to call the kernel take over {100 * (BEHIND - 1):.0f} % more "
        f"time than the fastest peer. Microseconds. {MARKS_EXPLAINED}\n\n"
        + markdown(["case", "copy", "pallas-norm", "the fastest", "which"], rows)
        + "\n"
    )


def overhead(file: dict[str, Any]) -> str:
    rows = (
        [
            row["provider"],
            f"{row['median_us']:.1f}",
            f"{row['spread_us']:.1f}",
            row.get("note", row.get("rounding", "")),
        ]
        for row in record.measured(file)
    )
    first = {cache: sorted(times)[len(times) // 2] for cache, times in file["first_call_of_a_process_ms"].items()}
    return (
        f"Host time of one call, {file['options']['case']}, in microseconds: medians and spreads of interleaved "
        "batches.\n\n"
        + markdown(["provider", "median", "spread", "rounding, or what the call is"], rows)
        + "\n\n![Host time of one call](overhead.svg)\n\n"
        + f"The first call of a process takes {first['empty']:.0f} ms, and {first['filled']:.0f} ms with the kernel in "
        f"the disk cache (medians of {len(file['first_call_of_a_process_ms']['empty'])}). "
        + f"{measured_on(file)} All samples: `{file['path']}`.\n"
    )


def training(file: dict[str, Any]) -> str:
    rows = [[row["provider"], f"{row['median_ms']:.2f}"] for row in file["rows"]]
    return (
        markdown(["a training step in JAX", "median, ms"], rows)
        + f"\n\n{measured_on(file)} All samples: `{file['path']}`.\n"
    )


def accuracy(file: dict[str, Any]) -> str:
    def percent(row: dict[str, Any], key: str) -> str:
        return f"{100 * row[key] / row['elements']:.4f}"

    header = [
        "dtype",
        "n",
        "provider",
        "from exact, %",
        "from HF eager, %",
        "max ULP",
        "mean signed ULP",
        "from replay",
    ]
    rows = (
        [
            row["dtype"],
            str(row["n"]),
            row["provider"],
            percent(row, "differ_from_exact"),
            percent(row, "differ_from_hf_eager"),
            str(row["max_ulp_from_exact"]),
            f"{row['mean_signed_ulp_from_exact']:+.1e}",
            str(row.get("differ_from_replay", "")),
        ]
        for row in file["rows"]
        if row["dtype"] != "float32" and row["n"] in (128, 4096, 16384)
    )
    return (
        "Share of outputs that differ from Hugging Face's rounding with exact (float64) statistics, and from Hugging "
        "Face eager on the same GPU. *Replay* counts outputs that differ from Hugging Face's steps applied to the "
        "provider's own rstd.\n\n"
        + markdown(header, rows)
        + "\n\n![Outputs that differ from Hugging Face's rounding](accuracy.svg)\n\n"
        + f"{measured_on(file)} Every width and float32: `{file['path']}`."
        + _reasons(file.get("absent", []), {row["provider"] for row in file["rows"]})
        + "\n"
    )
