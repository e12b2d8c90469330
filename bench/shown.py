"""Which result files README.md and docs/ show.

Of each kind the newest that `make evidence` wrote, bench/results/KIND_DEVICE_DATE.json: they are of one commit and one
device.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import parity_report, record, results

KINDS = ("run", "overhead", "accuracy", "parity", "model", "model-qwen3", "model-mamba2", "training")
EVIDENCE = re.compile(r"(?P<kind>[a-z0-9-]+)_(?P<device>[a-z0-9]+)_(?P<date>\d{4}-\d\d-\d\d)\.json")


def evidence(folder: Path = results.FOLDER) -> dict[str, Path]:
    """The newest file of each kind that has the name of evidence; of one day the device that sorts last."""
    found: dict[str, tuple[tuple[str, str], Path]] = {}
    for path in folder.iterdir():
        match = EVIDENCE.fullmatch(path.name)
        if match and match["kind"] in KINDS:
            place = (match["date"], match["device"])
            if place > found.get(match["kind"], (("", ""), path))[0]:
                found[match["kind"]] = place, path
    return {kind: path for kind, (_, path) in found.items()}


def read(kind: str) -> dict[str, Any]:
    """The file, checked, and its path from the root of the checkout as `path`."""
    path = evidence()[kind]
    if kind in ("run", "overhead"):
        file = record.read(path)
    elif kind == "parity" or kind.startswith("model"):
        file = parity_report.read(path)
    else:
        file = json.loads(path.read_text())
    return file | {"path": f"bench/results/{path.name}"}
