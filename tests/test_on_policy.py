"""On-policy training (docs/on-policy.md): a rollout computes a token alone or with a few others, the trainer in a batch
of sequences, padded or packed, jitted or not. The specification in NumPy says what each token's row has to be.

With kernels and torch: tests/interop/test_on_policy.py, on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from tests import computed, oracle, specified
from tests.oracle import BF16, F32, Array

EPS = 1e-6
N, TOKENS = 80, 4096
ROWS = (1, 2, 3, 17, 64, 1000, 4096)
ROW_WISE = ("x", "residual", "dy", "ds")


@functools.cache
def tokens(n: int = N, count: int = TOKENS, dtype: Any = BF16) -> dict[str, Array]:
    rng = np.random.default_rng(n)
    sizes = 2.0 ** rng.integers(-4, 5, (count, 1))
    given = {name: (sizes * rng.standard_normal((count, n))).astype(dtype) for name in ROW_WISE}
    return given | {"weight": (1 + 0.3 * rng.standard_normal(n)).astype(dtype)}


@functools.cache
def expected(n: int = N, count: int = TOKENS, dtype: Any = BF16) -> dict[str, Array]:
    return specified.results(tokens(n, count, dtype), EPS, residual=True)


def assert_tokens(found: dict[str, Array], at: Any) -> None:
    """The rows of `found` are those of the tokens `at`."""
    for name, value in expected().items():
        oracle.assert_same(found[name], value[at])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("rows", ROWS)
def test_a_token_has_its_bits_in_a_batch_of_any_size(rows: int) -> None:
    """And its gradient; each size is another program of XLA's."""
    given = {name: value[-rows:] if name in ROW_WISE else value for name, value in tokens().items()}
    assert_tokens(computed.results(given, EPS, residual=True, implementation="xla"), slice(TOKENS - rows, None))


def padded(values: Array, lengths: Array, length: int, filler: float) -> Array:
    """(sequences, length, n): a sequence ends where its tokens do."""
    batch = np.full((len(lengths), length, values.shape[-1]), filler, values.dtype)
    batch[np.arange(length) < lengths[:, None]] = values
    return batch


@pytest.mark.parametrize("filler", [0.0, 1e30, np.nan], ids=str)
def test_a_token_has_its_bits_in_padded_sequences(filler: float) -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 40)
    count = int(lengths.sum())
    own = np.arange(64) < lengths[:, None]
    given = {
        name: padded(value[:count], lengths, 64, filler) if name in ROW_WISE else value
        for name, value in tokens().items()
    }
    found = computed.results(given, EPS, residual=True, implementation="xla")
    assert_tokens({name: value[own] for name, value in found.items()}, slice(count))


def test_a_token_has_its_bits_in_packed_sequences_and_in_another_place() -> None:
    """One row of many tokens, as trainers pack them, in the order of another batch."""
    at = np.random.default_rng(1).permutation(TOKENS)[:1500]
    given = {name: value[at][None] if name in ROW_WISE else value for name, value in tokens().items()}
    found = computed.results(given, EPS, residual=True, implementation="xla")
    assert_tokens({name: value[0] for name, value in found.items()}, at)


def test_a_step_of_decoding_has_the_bits_of_the_prefill() -> None:
    """(sequences, 1, n), operation by operation and in a program, beside (sequences, length, n)."""
    given, wanted = tokens(), expected()
    x, residual = (given[name][:96].reshape(8, 12, N) for name in ("x", "residual"))
    norm = functools.partial(pallas_norm.add_rms_norm, eps=EPS, implementation="xla", return_rstd=True)
    for call in (norm, jax.jit(norm)):
        prefill = call(x, residual, given["weight"])
        for step in (0, 5, 11):
            decoded = call(x[:, step : step + 1], residual[:, step : step + 1], given["weight"])
            for one, whole, name in zip(decoded, prefill, ("y", "s", "rstd"), strict=True):
                oracle.assert_same(one, np.asarray(whole)[:, step : step + 1])
                oracle.assert_same(np.asarray(whole).reshape(wanted[name][:96].shape), wanted[name][:96])


def test_the_sum_and_the_norm_are_one_call_or_two() -> None:
    given, wanted = tokens(), expected()
    s = pallas_norm.reference.add(jnp.asarray(given["x"][:50]), jnp.asarray(given["residual"][:50]))
    oracle.assert_same(s, wanted["s"][:50])
    oracle.assert_same(pallas_norm.rms_norm(s, given["weight"], eps=EPS, implementation="xla"), wanted["y"][:50])


def test_a_trainer_s_float32_weight_that_is_rounded_has_the_bits_of_the_rollout_s_copy() -> None:
    given = tokens()
    x, master = given["x"][:33], given["weight"].astype(F32) + F32.type(2.0**-12)
    trained = pallas_norm.rms_norm(x, master, eps=EPS, round_weight=True, implementation="xla")
    rolled_out = pallas_norm.rms_norm(x, master.astype(BF16), eps=EPS, implementation="xla")
    oracle.assert_same(trained, rolled_out)
    assert pallas_norm.rms_norm(x, master, eps=EPS, implementation="xla").dtype == F32  # what a page has to warn of


@pytest.mark.parametrize("changed", ["eps", "weight_offset", "cast_before_scale"])
def test_what_has_to_be_the_same_shows_in_bits(changed: str) -> None:
    given = tokens()
    options = {"eps": 1e-5, "weight_offset": 1.0, "cast_before_scale": False}
    call = functools.partial(pallas_norm.rms_norm, given["x"][:400], given["weight"], implementation="xla")
    assert np.asarray(call(**{"eps": EPS, changed: options[changed]})).tobytes() != np.asarray(call(eps=EPS)).tobytes()
