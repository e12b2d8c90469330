"""Text that every Python ships, and what parity asks of a model about it: windows of tokens and questions.

The sources of the standard library and pydoc's topics, ASCII files only, so that a byte is a character. A tenth of the
files, chosen by a hash of their names, is held out: windows and questions are made from those alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
HELD_OUT = 10  # one file in so many
CONTEXT, CONTINUATION, CHOICES = 160, 24, 4  # of the questions made here; characters
LETTERS = "ABCDEFGHIJ"


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Bytes:
    """One token for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Subwords:
    """A tokenizer of transformers, without the tokens that it adds."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)


def tokenizer_of(name: str, config: Any) -> Tokenizer:
    """Of a folder or hub id; one that was trained here has none."""
    if getattr(config, "byte_level", False):
        return Bytes()
    from transformers import AutoTokenizer

    return Subwords(AutoTokenizer.from_pretrained(name))


@dataclasses.dataclass(frozen=True)
class Text:
    training: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of all files in order: the text differs between Pythons."""
        joined = hashlib.sha256()
        for document in (*self.training, *self.held_out):
            joined.update(document.encode() + b"\0")
        return joined.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Question:
    context: str
    choices: tuple[str, ...]
    answer: int


def read_text() -> Text:
    from pydoc_data import topics

    root = Path(sysconfig.get_path("stdlib"))
    named = {f"topic {name}": text for name, text in topics.topics.items() if text.isascii()}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not any(part in LEFT_OUT for part in name.parts) and (source := path.read_bytes()).isascii():
            named[name.as_posix()] = source.decode()
    split: tuple[list[str], list[str]] = ([], [])
    for name, text in sorted(named.items()):
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
        split[held_out].append(text)
    return Text(tuple(split[0]), tuple(split[1]))


def windows(documents: Sequence[str], tokenizer: Tokenizer, *, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` windows of length + 1 tokens, no two overlapping: `length` positions and what follows each."""
    tokens = tokenizer.encode("\n".join(documents))
    starts = range(0, len(tokens) - length, length + 1)
    if len(starts) < count:
        raise ValueError(
            f"the held-out text has {len(tokens)} tokens; needed {count * (length + 1)}, for {count} windows of "
            f"{length} positions: pass a smaller --positions or --length"
        )
    return [tokens[start : start + length + 1] for start in random.Random(seed).sample(starts, count)]


def continuations(documents: Sequence[str], *, count: int, seed: int) -> list[Question]:
    """Which of four passages of one file continues the context? All have the same length; the three wrong ones come
    from elsewhere in the file."""
    source = random.Random(seed)
    span = CONTEXT + CONTINUATION
    long = [document for document in documents if len(document) >= 4 * CHOICES * span]
    sizes = [len(document) for document in long]
    questions: list[Question] = []
    seen: set[tuple[str, str]] = set()
    for _ in range(20 * count):
        if len(questions) == count:
            break
        document = source.choices(long, sizes)[0]
        first = source.randrange(len(document) - span)
        context, right = document[first : first + CONTEXT], document[first + CONTEXT : first + span]
        places = [source.randrange(len(document) - CONTINUATION) for _ in range(CHOICES - 1)]
        wrong = [document[place : place + CONTINUATION] for place in places]
        apart = all(abs(place - first - CONTEXT) >= CONTINUATION for place in places)
        if apart and len({right, *wrong}) == CHOICES and right.strip() and (context, right) not in seen:
            seen.add((context, right))
            answer = source.randrange(CHOICES)
            wrong.insert(answer, right)
            questions.append(Question(context, tuple(wrong), answer))
    if len(questions) < count:
        raise ValueError(f"the held-out text gives {len(questions)} questions; needed {count}: pass a smaller number")
    return questions


def _question(row: dict[str, Any]) -> Question:
    """MMLU's letters where there is a `question`, likelihood of the choices themselves where there is a `context`."""
    answer, choices = row["answer"], tuple(row["choices"])
    answer = LETTERS.index(answer) if isinstance(answer, str) else answer
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    if "context" in row:
        return Question(row["context"], choices, answer)
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    context = "\n".join((row["question"], *lines, "Answer:"))
    return Question(context, tuple(f" {letter}" for letter in LETTERS[: len(choices)]), answer)


def read_questions(path: Path, *, count: int) -> list[Question]:
    """The first `count` lines of a JSONL file of {question or context, choices, answer}."""
    questions = []
    for number, line in enumerate(path.read_text().splitlines()[:count], 1):
        try:
            questions.append(_question(json.loads(line)))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}; needed an object with question (or context), choices and answer"
            ) from error
    if not questions:
        raise ValueError(f"{path} has no questions; needed one JSON object a line")
    return questions


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.959964, right / count
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
