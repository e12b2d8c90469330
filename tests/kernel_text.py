"""The kernels of a program that is lowered for CUDA, and their text. Needs no GPU.

Printed without locations, the text is reproducible and does not depend on where a line of source is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir, passmanager

NUMBER = re.compile(r', mosaic_gpu.dump_basename = "kernel_\d+"')  # 0.11's, of the kernels of this process


def modules(function: Callable[..., Any], *operands: Any) -> list[bytes]:
    """Each Mosaic GPU kernel in the program that `function` becomes for CUDA."""
    lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compiler_ir()
    found: list[bytes] = []

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            found.append(operation.attributes["mhlo.backend_config"]["module"].value_bytes)
        return ir.WalkResult.ADVANCE

    with lowered.context:
        lowered.operation.walk(visit)
    return found


def text(module: bytes, *, raw: bool = False) -> str:
    """After the compiler's first steps, in which goes what is never used and what was computed before; or raw, as it is
    given to the compiler."""
    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    with context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        parsed = ir.Module.parse(module)
        if not raw:
            parsed = core._run_serde_pass(parsed, serialize=False)
            passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(parsed.operation)
        return NUMBER.sub("", str(parsed))
