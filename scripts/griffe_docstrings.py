"""The docstrings of this project as griffe, which mkdocstrings asks, reads them.

A section whose text begins beside its name (Raises: TypeError for ...) is a paragraph here, and an entry of Arguments
may name several parameters. griffe would make the first line a title, and several names one unknown parameter.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = (
    *("Arguments", "Returns", "Raises", "Attributes", "Source", "Rounding", "Special values", "Memory", "Streams"),
    *("Lifetimes", "Differentiation", "Sharding", "Where it runs", "For programs that leave this process"),
)
PARAGRAPH = re.compile(rf"^({'|'.join(NAMES)}): (\S.*(?:\n[ ]+\S.*)*)$", re.MULTILINE)
SEVERAL = re.compile(r"^    ((?:\w+, )+\w+): (.*(?:\n {8,}.*)*)$", re.MULTILINE)


def rewritten(text: str) -> str:
    def paragraph(found: re.Match[str]) -> str:
        return f"**{found[1]}**: " + re.sub(r"\n\s+", "\n", found[2]) + "\n"

    def one_by_one(found: re.Match[str]) -> str:
        return "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", "))

    return SEVERAL.sub(one_by_one, PARAGRAPH.sub(paragraph, text))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
