"""What the pictures have in common: colours and markers, matplotlib set up, and where a file is from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .baselines import OURS

# Colours that colour-blind readers can tell apart; no two providers of one hue share a marker.
STYLES = {
    OURS: ("#0072B2", "s", "-"),
    "pallas-norm torch": ("#56B4E9", "P", "-"),
    "XLA": ("#009E73", "^", "-"),
    "plain jit": ("#009E73", "v", "--"),
    "HF eager": ("#000000", "o", "-"),
    "torch.compile": ("#7F7F7F", "X", "--"),
    "F.rms_norm": ("#D55E00", "D", "-"),
    "Liger": ("#CC79A7", "h", "-"),
    "Liger functional": ("#CC79A7", "H", "--"),
    "Quack": ("#E69F00", "*", "-"),
    "tokamax": ("#B8A800", "<", "--"),
    "SGLang": ("#7E2F8E", ">", "--"),
    "FlashInfer": ("#A65628", "p", "--"),
}


def pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "pictures need matplotlib, which is not installed: pip install 'pallas-norm[bench]'"
        ) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pallas-norm"  # the same file from the same figures
    from matplotlib import pyplot as chosen

    return chosen


def origin(file: dict[str, Any]) -> str:
    """The device, commit and date of a result file, as the picture says in its metadata."""
    return f"{file['device']}, commit {str(file['commit'])[:9]}, {file['date'][:10]}"


def save(figure: Any, paths: Sequence[Path], file: dict[str, Any]) -> list[Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Source": origin(file)} if path.suffix == ".svg" else {"Source": origin(file)}
        figure.savefig(path, metadata=metadata, dpi=100)
    pyplot().close(figure)
    return list(paths)
