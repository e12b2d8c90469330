"""Fills the marked sections of README.md, and draws the figure, from the committed result files.

The times are those of bench/results/run.json, which `python -m bench run --out` wrote, or where there is no such file
of times.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import record, results
from .suite import README as CASES
from .table import by_case, cell, share_of_copy

README = Path(__file__).parent.parent / "README.md"
FIGURE = Path(__file__).parent.parent / "docs" / "accuracy.svg"
PEERS = ("XLA", "F.rms_norm", "HF eager")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured_on(file: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items() if version)
    return f"{file['device']}, {versions}, commit {file['commit'][:9]}, {file['date'][:10]}."


def performance(file: dict[str, Any]) -> str:
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in file["rows"]:
        case = row["operation"], f"{row['rows']} x {row['n']}", row["dtype"]
        cases.setdefault(case, {})[row["provider"]] = row["median_us"]

    def cells(case: tuple[str, ...], times: dict[str, float]) -> list[str]:
        ours = times["pallas-norm"]
        shown = [f"{times[peer]:.1f}" if peer in times else "" for peer in PEERS]
        return [case[0], *case[1:], f"{times['copy']:.1f}", f"{ours:.1f}", f"{times['copy'] / ours:.2f}", *shown]

    header = ["pass", "rows x n", "dtype", "copy", "pallas-norm", "share of copy", *PEERS]
    return (
        "Kernel times in microseconds, L2 cold, medians of one interleaved run; *copy* is a kernel that moves the same "
        "bytes and does nothing else, *XLA* this library's reference compiled by XLA, with the same rounding. The "
        "backward pass counts both its kernels.\n\n"
        + _table(header, (cells(case, times) for case, times in cases.items()))
        + f"\n\n{_measured_on(file)} All samples: `bench/results/times.json`.\n"
    )


RUN = "run"  # bench/results/run.json
MARKS_EXPLAINED = (
    "*h*, *s* and *?* say where a provider rounded in that very program: as Hugging Face, once, or as neither."
)


def performance_of_run(file: dict[str, Any]) -> str:
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
        f"compiled by XLA, *plain jit* the formula as a JAX program writes it. {MARKS_EXPLAINED}\n\n"
        + _table(["case", *providers, "share"], (cells(key, case) for key, case in cases.items()))
        + "\n\n![Share of the copy kernel's throughput](docs/roofline.svg)\n\n"
        + f"{_measured_on(file)} All {len(found)} cases with all samples: `bench/results/{RUN}.json`; "
        + "[speed-up over every provider](docs/speedup.svg).\n"
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
        + _table(["provider", "median", "spread", "rounding, or what the call is"], rows)
        + "\n\n![Host time of one call](docs/overhead.svg)\n\n"
        + f"The first call of a process takes {first['empty']:.0f} ms, and {first['filled']:.0f} ms with the kernel in "
        f"the disk cache (medians of {len(file['first_call_of_a_process_ms']['empty'])}). "
        + f"{_measured_on(file)} All samples: `bench/results/overhead_h200.json`.\n"
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
        + _table(header, rows)
        + "\n\n![Outputs that differ from Hugging Face's rounding](docs/accuracy.svg)\n\n"
        + f"{_measured_on(file)} Every width and float32: `bench/results/accuracy.json`.\n"
    )


def draw(file: dict[str, Any], path: Path = FIGURE) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "pallas-norm"  # the same file from the same figures
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    styles = {
        "HF eager": ("#000000", "o"),
        "pallas-norm": ("#0072B2", "s"),
        "XLA": ("#009E73", "^"),
        "F.rms_norm": ("#D55E00", "D"),
    }
    for panel, dtype in zip(panels, ("bfloat16", "float16"), strict=True):
        for provider, (colour, marker) in styles.items():
            rows = [row for row in file["rows"] if row["dtype"] == dtype and row["provider"] == provider]
            shares = [100 * row["differ_from_exact"] / row["elements"] for row in rows]
            panel.plot(
                [row["n"] for row in rows], shares, marker, ls="-", color=colour, label=provider, ms=5, lw=1, alpha=0.8
            )
        panel.set(xscale="log", title=dtype, xlabel="row length n")
        panel.set_yscale("symlog", linthresh=1e-4)  # zero is a result too
        panel.set_ylim(-2e-5, 100)
        panel.set_xticks([64, 256, 1024, 4096, 16384], ["64", "256", "1024", "4096", "16384"])
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("outputs that differ from HF's rounding\nwith exact statistics, %")
    panels[1].legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def fill(text: str, section: str, content: str) -> str:
    opening, closing = f"<!-- generated:{section} -->", f"<!-- /generated:{section} -->"
    before, rest = text.split(opening)
    _, after = rest.split(closing)
    return f"{before}{opening}\n{content}{closing}{after}"


def rendered(text: str) -> str:
    path = results.FOLDER / f"{RUN}.json"
    times = performance_of_run(record.read(path)) if path.exists() else performance(results.read("times"))
    text = fill(text, "performance", times)
    text = fill(text, "overhead", overhead(results.read("overhead_h200")))
    return fill(text, "accuracy", accuracy(results.read("accuracy")))


def run() -> None:
    draw(results.read("accuracy"))
    fill_readme()


def fill_readme() -> None:
    README.write_text(rendered(README.read_text()))
