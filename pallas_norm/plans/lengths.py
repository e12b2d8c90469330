"""Which row lengths have a kernel."""

from __future__ import annotations

from .. import _validate

SMALLEST_N, LARGEST_N = 32, 131072


def checked(n: int) -> int:
    n = _validate.row_length(n)
    if not SMALLEST_N <= n <= LARGEST_N:
        raise NotImplementedError(
            f"no kernel for rows of {n} elements: the kernels take {SMALLEST_N} <= n <= {LARGEST_N}; "
            'leave implementation at None or pass "xla"'
        )
    return n
