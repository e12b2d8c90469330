"""Objects of every kind that may be passed where something else was meant, for the fuzz tests to draw from."""

from __future__ import annotations

import decimal
import types

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.oracle import BF16, F32


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((-400, 400, 5000)).map(lambda digits: (1 if digits > 0 else -1) * 10 ** abs(digits)),
    st.sampled_from((2**63, 32, 33, 131072)),
    st.floats(),
    st.sampled_from((1e39, 3.4028235e38, -1e-6, 1e-400)),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.fractions(),
    st.decimals(),
    hnp.scalar_dtypes().flatmap(lambda dtype: hnp.from_dtype(dtype)),
    st.sampled_from((np.timedelta64(3, "s"), np.timedelta64("NaT", "s"), decimal.Decimal("NaN"), np.float32("nan"))),
)
ARRAYS = st.one_of(
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    hnp.arrays(hnp.floating_dtypes(endianness=">", sizes=(16, 32)), st.just((3, 8)), elements=st.just(1.0)),
    st.sampled_from(
        (
            np.array([None, 1.0]),
            np.zeros(3, [("a", "f4")]),
            np.ma.array(np.ones((3, 8), np.float32), mask=True),
            np.ones((3, 8), F32).view(np.recarray),
        )
    ),
    st.sampled_from(("int4", "float8_e5m2", "bool", "complex64", "int32", "float16")).map(
        lambda dtype: jnp.ones((3, 8), dtype)
    ),
    st.just(jax.random.key(0)),
)
LOOKALIKES = st.builds(
    types.SimpleNamespace,
    shape=st.one_of(st.sampled_from(((3, 8), (3, -8), (8, None), [3, 8], None, 3, "ab", {1: 2}, (2, True))), SCALARS),
    dtype=st.one_of(st.sampled_from(("float32", "f4,(", np.float32, BF16, None, 3)), SCALARS),
)
OBJECTS = st.one_of(
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from((object(), np.ndarray, np, len, jax.ShapeDtypeStruct((3, 8), jnp.float32), set())),
    st.builds(Unprintable),
)
ANYTHING = st.one_of(SCALARS, ARRAYS, LOOKALIKES, OBJECTS)
