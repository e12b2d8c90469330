"""Which kernel covers a row of n elements, and with which numbers: pure functions of (n, dtypes).

Never of the row count: that is what makes a row's bits independent of its batch. The tables, and what decided each of
their rows, are in pallas_norm/plans; `python -m pallas_norm plans` prints what they give.
"""

from .plans.backward import backward_plan_for as backward_plan_for
from .plans.forward import plan_for as plan_for
from .plans.plan import BackwardPlan as BackwardPlan
from .plans.plan import Plan as Plan
from .plans.plan import Regime as Regime
from .plans.plan import Source as Source
