"""python -m bench.torch_order: what the specified order of additions would cost torch's own statements on a CPU.

Prints the time of the statements, and of the same with the sum of a row by slices and adds, in one thread, in turn; of
each the second percentile, which other processes do not move. What was found is in docs/order.md.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import torch

from pallas_norm._row_sum import inverse
from pallas_norm._spec import Spec
from pallas_norm.plans.forward import forward_order
from pallas_norm.plans.order import Order
from pallas_norm_torch import statements

from .table import columns

Tensor = torch.Tensor
SHAPES = ((1, 4096), (16, 4096), (512, 4096), (512, 128))
EPS = 1e-6


def of_columns(values: Tensor, order: Order) -> Tensor:
    """Each column's sum, from the first block to the last."""
    total = values[..., : order.width].clone()
    for begin in range(order.width, order.n, order.width):
        block = values[..., begin : begin + order.width]
        total[..., order.width - block.shape[-1] :] += block
    return total


def strided(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        values = values[..., ::2] + values[..., 1::2]
    return values


def unbound(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        left, right = values.unflatten(-1, (-1, 2)).unbind(-1)
        values = left + right
    return values


def transposed(values: Tensor) -> Tensor:
    values = values.t().contiguous()
    while len(values) > 1:
        values = values[::2] + values[1::2]
    return values.t()


def in_order(neighbours: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """As statements.forward, of bfloat16."""
    wide, order = x.float(), forward_order(x.shape[-1], "bfloat16")
    mean = neighbours(of_columns(wide * wide, order)) * float(inverse(order.n))
    rstd = 1 / torch.sqrt(mean + EPS)
    return weight * torch.mul(wide, rstd, out=wide).to(x.dtype)


def ways() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    now = lambda x, weight: statements.forward(x, None, weight, Spec(eps=EPS), with_rstd=False)[0]  # noqa: E731
    by = {function.__name__: function for function in (strided, unbound, transposed)}
    return {"now": now} | {name: lambda x, w, f=function: in_order(f, x, w) for name, function in by.items()}


def rows_of_table() -> Iterator[list[str]]:
    yield ["rows x n", *(f"{name}, us" for name in ways()), "fastest / now"]
    for rows, n in SHAPES:
        x, weight = torch.randn(rows, n).to(torch.bfloat16), torch.randn(n).to(torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in ways()}
        for _ in range(1500 if rows < 100 else 200):
            for name, way in random.sample([*ways().items()], len(times)):
                begun = time.perf_counter()
                way(x, weight)
                times[name].append(time.perf_counter() - begun)
        now, *others = (sorted(samples)[len(samples) // 50] * 1e6 for samples in times.values())
        yield [f"{rows} x {n}", *(f"{us:.1f}" for us in (now, *others)), f"{min(others) / now:.2f}"]


def main() -> None:
    torch.set_num_threads(1)
    print(columns(list(rows_of_table())))
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")


if __name__ == "__main__":
    main()
