"""The file that run, overhead and tune write: one JSON object, one line for each row, whole after every step.

format, command     1; "run", "overhead" or "tune"
device, nvidia_smi, versions, commit, date      of the machine, see results.machine
measures            what samples_us are
options             what was asked for; a file is continued only with the same
sessions            date and clocks of every time the file was continued
left                what was not measured yet, by its key
rows                each with status "measured", "absent" or "failed"; a row that is not measured has its reason
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import results

FORMAT = 1
DEVICE_TIME = "device time of the kernels of a call (CUPTI), L2 cold"
WALL_TIME = "wall time of a call on a CPU, caches as they are"
HOST_TIME = "host time of a call"
COMMANDS = ("run", "overhead", "tune")
STATUSES = ("measured", "absent", "failed")
SAME = ("format", "command", "device", "versions", "commit", "measures", "options")

FILE_FIELDS: dict[str, Any] = {
    "format": int,
    "command": str,
    "device": str,
    "nvidia_smi": (str, type(None)),
    "versions": dict,
    "commit": (str, type(None)),
    "date": str,
    "measures": str,
    "options": dict,
    "sessions": list,
    "left": list,
    "rows": list,
}
ROW_FIELDS: dict[str, Any] = {"key": str, "provider": str, "status": str}
MEASURED_FIELDS: dict[str, Any] = {"median_us": (int, float), "spread_us": (int, float), "samples_us": list}
CASE_FIELDS: dict[str, Any] = {"operation": str, "rows": int, "n": int, "dtype": str, "heads": int, "bytes": int}


def _missing(value: dict[str, Any], fields: dict[str, Any], where: str) -> list[str]:
    found = []
    for name, kinds in fields.items():
        if name not in value:
            found.append(f"{where} has no {name}")
        elif not isinstance(value[name], kinds) or (isinstance(value[name], bool) and kinds is not bool):
            found.append(f"{where} has {name} = {value[name]!r}")
    return found


def problems(file: dict[str, Any]) -> list[str]:
    """What keeps `file` from being a record of format 1; empty for a good one."""
    found = _missing(file, FILE_FIELDS, "the file")
    if found:
        return found
    if file["format"] != FORMAT:
        found.append(f"the file has format {file['format']}; this reads {FORMAT}")
    if file["command"] not in COMMANDS:
        found.append(f"the file has command {file['command']!r}; known are {', '.join(COMMANDS)}")
    seen = set()
    for number, row in enumerate(file["rows"]):
        where = f"row {number}"
        wrong = _missing(row, ROW_FIELDS, where)
        if file["command"] != "overhead":
            wrong += _missing(row, CASE_FIELDS, where)
        if not wrong and row["status"] not in STATUSES:
            wrong.append(f"{where} has status {row['status']!r}")
        elif not wrong and row["status"] == "measured":
            wrong += _missing(row, MEASURED_FIELDS, where)
            if not wrong and not (row["samples_us"] and all(sample >= 0 for sample in row["samples_us"])):
                wrong.append(f"{where} has samples_us = {row['samples_us']!r}")
        elif not wrong and not row.get("reason"):
            wrong.append(f"{where} is {row['status']} and gives no reason")
        if not wrong and (row["key"], row["provider"]) in seen:
            wrong.append(f"{where} repeats {row['key']} of {row['provider']}")
        seen.add((row.get("key"), row.get("provider")))
        found += wrong
    return found


def read(path: Path) -> dict[str, Any]:
    try:
        file = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; python -m bench run --out {path} makes it") from None
    if wrong := problems(file):
        raise ValueError(f"{path} is no record of format {FORMAT}: {'; '.join(wrong[:5])}")
    return file


def begin(path: Path, command: str, measures: str, options: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """A new record, or the one at `path`, to be continued: then the machine, the tree and the options must be those."""
    machine = results.machine(commit)
    new = {"format": FORMAT, "command": command, **machine, "measures": measures, "options": options}
    session = {"date": machine["date"], "nvidia_smi": machine["nvidia_smi"]}
    if not path.exists():
        return {**new, "sessions": [session], "left": [], "rows": []}
    file = read(path)
    require_same(path, file, new)
    file["sessions"].append(session)
    return file


def require_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """That the record at `path` may be continued: ValueError where the machine, the tree or the options are others."""
    for name in (name for name in SAME if name in new):
        if old[name] != new[name]:
            raise ValueError(
                f"{path} has {name} {old[name]!r}, this run has {new[name]!r}; needed the same to continue it: "
                "pass another --out"
            )


def write(path: Path, file: dict[str, Any]) -> None:
    if wrong := problems(file):
        raise ValueError(f"not written, this is no record of format {FORMAT}: {'; '.join(wrong[:5])}")
    replace_file(path, file)


def replace_file(path: Path, file: dict[str, Any]) -> None:
    """At once, so that an interruption leaves the old one."""
    head = json.dumps({name: value for name, value in file.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in file["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]\n}}\n')
    os.replace(new, path)


def replace_rows(file: dict[str, Any], key: str, rows: list[dict[str, Any]]) -> None:
    file["rows"] = [row for row in file["rows"] if row["key"] != key] + rows


def done(file: dict[str, Any], *, retry: bool = False) -> set[str]:
    """Keys that have their rows; with `retry`, less those where a provider failed."""
    failed = {row["key"] for row in file["rows"] if row["status"] == "failed"}
    return {row["key"] for row in file["rows"]} - (failed if retry else set())


def end_session(file: dict[str, Any]) -> None:
    file["sessions"][-1]["nvidia_smi_after"] = results.clocks()


def measured(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in file["rows"] if row["status"] == "measured"]
