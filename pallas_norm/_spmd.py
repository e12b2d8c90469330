"""JAX's partitioner, which has no public names: custom calls with a rule of their own, local programs, HLO shardings.

Kept for `_partitioning`, tested with JAX 0.10.2, 0.11.2 and 0.12.0.1. Where a newer one has a name no longer, the
partitioner is not asked, and XLA divides the specification's program as any other.
"""

# pyright: reportMissingTypeStubs=false, reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._compat import ir


@functools.cache
def unavailable() -> str | None:
    """Why the partitioner cannot be asked; None where it can."""
    try:
        from jax._src import core, xla_bridge
        from jax._src import custom_partitioning_sharding_rule as rules
        from jax._src.interpreters import mlir
        from jax._src.lib import xla_client
        from jax.interpreters.mlir import SPMDAxisContext

        needed = {
            core: ("extend_axis_env_nd",),
            xla_bridge: ("register_plugin_callbacks",),
            rules: ("sdy_sharding_rule_to_mlir", "str_to_sdy_sharding_rule"),
            mlir: ("build_mlir_module_helper", "module_to_bytecode", "aval_to_ir_type", "i32_attr"),
            xla_client: ("register_custom_call_partitioner", "HloSharding", "OpSharding"),
        }
        del SPMDAxisContext
    except ImportError as error:
        return f"jax {jax.__version__} has no partitioner that this package knows ({error})"
    for module, names in needed.items():
        for name in names:
            if not hasattr(module, name):
                return f"jax {jax.__version__} has no partitioner that this package knows ({module.__name__}.{name})"
    return None


def _as_used(sharding: Any, shape: Any, config: Any) -> Any:
    del shape, config
    return sharding


def register_partitioner(name: str, partition: Callable[..., Any], infer: Callable[..., Any]) -> None:
    """`partition` for custom calls to `name`, in this process's compiler and in those of plugins."""
    from jax._src import xla_bridge
    from jax._src.lib import xla_client

    register = functools.partial(
        xla_client.register_custom_call_partitioner,
        name=name,
        prop_user_sharding=_as_used,
        partition=partition,
        infer_sharding_from_operands=infer,
        can_side_effecting_have_replicated_sharding=True,
    )
    register()
    xla_bridge.register_plugin_callbacks(register)


def partitioned_call(
    context: Any, values: Sequence[Any], *, target: str, config: str, rule: str, replicated: tuple[str, ...]
) -> Any:
    """A custom call for the partitioner of that name, with Shardy's rule for how shardings spread."""
    from jax._src.custom_partitioning_sharding_rule import sdy_sharding_rule_to_mlir, str_to_sdy_sharding_rule
    from jax.interpreters import mlir
    from jaxlib.mlir.dialects import stablehlo

    def types(avals: Sequence[Any]) -> list[Any]:
        return [mlir.aval_to_ir_type(context.module_context, aval) for aval in avals]

    results = types(context.avals_out)
    call = stablehlo.CustomCallOp(
        results,
        list(values),
        call_target_name=ir.StringAttr.get(target),
        has_side_effect=ir.BoolAttr.get(False),
        api_version=mlir.i32_attr(2),
        called_computations=ir.ArrayAttr.get([]),
        backend_config=ir.StringAttr.get(config),
        operand_layouts=None,
        result_layouts=None,
    )
    parsed = str_to_sdy_sharding_rule(rule, need_replication_factors=replicated)
    call.attributes["sdy.sharding_rule"] = sdy_sharding_rule_to_mlir(parsed, types(context.avals_in), results)
    return call.results


def local_program(
    function: Callable[..., Any], structs: Sequence[jax.ShapeDtypeStruct], shards: tuple[str, int], platform: str
) -> bytes:
    """`function` of the local operands as the partitioner takes it; `shards` names the axis of all devices."""
    from jax._src import core
    from jax._src.interpreters import mlir
    from jax.interpreters.mlir import SPMDAxisContext

    axis, size = shards
    mesh: Any = jax.sharding.AbstractMesh((size,), (axis,))  # where the devices are, nobody asks
    # The compiler asks while the mesh of jax.set_mesh is in context, which means nothing to one device.
    nothing = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with nothing, core.extend_axis_env_nd([shards]):
        closed = jax.make_jaxpr(function, axis_env=[shards])(*structs)
        module = mlir.build_mlir_module_helper(
            closed,
            name="pallas_norm",
            platforms=[platform],
            backend=None,
            axis_context=SPMDAxisContext(mesh, frozenset([axis])),
        )
    return mlir.module_to_bytecode(module)


def tiling(sharding: Any, rank: int, devices: int) -> Any:
    """The devices of an HloSharding as an array: `rank` axes of tiles, one of replicas, one of manual axes."""
    import numpy as np

    if sharding is None or sharding.is_replicated():
        return np.arange(devices).reshape([1] * rank + [devices, 1])
    if sharding.is_manual():
        return np.arange(devices).reshape([1] * rank + [1, devices])
    found = np.array(sharding.tile_assignment_devices()).reshape(sharding.tile_assignment_dimensions())
    kinds = [str(kind).rpartition(".")[2] for kind in sharding.subgroup_types()]
    if sharding.replicate_on_last_tile_dim() and not kinds:
        kinds = ["REPLICATED"]
    rest = range(rank, found.ndim)
    manual = [axis for axis, kind in zip(rest, kinds, strict=True) if kind == "MANUAL"]
    others = [axis for axis in rest if axis not in manual]
    sizes = [math.prod(found.shape[axis] for axis in axes) for axes in (others, manual)]
    return found.transpose([*range(rank), *others, *manual]).reshape([*found.shape[:rank], *sizes])


def from_tiling(devices: Any) -> Any:
    """The HloSharding of what `tiling` gives."""
    from jax._src.lib import xla_client

    if math.prod(devices.shape[:-2]) == 1 and devices.shape[-1] == 1:
        return xla_client.HloSharding.replicate()
    proto = xla_client.OpSharding()
    proto.type = xla_client.OpSharding.Type.OTHER
    proto.tile_assignment_dimensions = list(devices.shape)
    proto.tile_assignment_devices = [int(device) for device in devices.reshape(-1)]
    proto.last_tile_dims = [xla_client.OpSharding.Type.REPLICATED, xla_client.OpSharding.Type.MANUAL]
    return xla_client.HloSharding.from_proto(proto)


def tuple_of_shardings(shape: Any, shardings: Sequence[Any]) -> Any:
    from jax._src.lib import xla_client

    return xla_client.HloSharding.tuple_sharding(shape, list(shardings)) if shape.is_tuple() else shardings[0]
