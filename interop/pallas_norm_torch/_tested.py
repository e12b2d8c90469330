"""Which torch this package is tested with, for who imports it with another."""

from __future__ import annotations

import re

TORCH = ((2, 11), (2, 14))  # the oldest and the newest that tests ran with


def refusal(error: Exception) -> str | None:
    """What to say where the import failed with `error`; None where the installed torch is a tested one."""
    import torch

    installed = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is not None and TORCH[0] <= (int(numbers[1]), int(numbers[2])) <= TORCH[1]:
        return None
    (major, minor), (last_major, last) = TORCH
    oldest, newest, next_one = f"{major}.{minor}", f"{last_major}.{last}", f"{last_major}.{last + 1}"
    return (
        f"pallas_norm_torch does not import with torch {installed} ({type(error).__name__}: {error}); it is tested "
        f"with torch {oldest} to {newest}: pip install 'torch>={oldest},<{next_one}'"
    )
