"""A progress bar in plain text, on standard error: one line that moves on a terminal, a line for each step
elsewhere."""

from __future__ import annotations

import sys
import time

WIDTH = 24


def bar(done: int, total: int, elapsed_s: float, label: str) -> str:
    filled = WIDTH * done // total if total else WIDTH
    left = f", about {elapsed_s / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} {elapsed_s:.0f} s{left}  {label}"


class Progress:
    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def starts(self, label: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K" + bar(self._done, self._total, self.elapsed_s, label)[:160])
            sys.stderr.flush()

    def step(self, label: str) -> None:
        self._done += 1
        line = bar(self._done, self._total, self.elapsed_s, label)
        sys.stderr.write(f"\r\033[K{line[:160]}" if sys.stderr.isatty() else line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\n")
