"""The cases of tests/data/golden_bits.txt: every width of the suite, with operands of the package's own golden bits."""

from __future__ import annotations

from pallas_norm import _golden

Array = _golden.Array

EPS = 1e-6
DTYPES, RESULTS, RESIDUAL_RESULTS = _golden.DTYPES, _golden.RESULTS, _golden.RESIDUAL_RESULTS
Case, case, operands, digest = _golden.Case, _golden.case, _golden.operands, _golden.digest
