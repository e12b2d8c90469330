"""This library's norms as layers for Hugging Face's `kernels` package, in process: nothing is downloaded.

`kernels` knows layers by a name that transformers gives them, and one name covers several roundings: the norms of
Llama, Olmo2 and Helium are all "RMSNorm". So each layer here asks the class of the module it is bound to, recognised by
its source as `patch` does, and computes with the module's own forward where that is not known.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any, cast

import torch
from torch import nn

from ._classes import Row, recognise
from ._forwards import Forward
from ._replacing import ORIGINAL, guarded

# kernels takes the smallest interval that holds the device's capability, and the hub's entries hold all of them.
CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

_forwards: dict[type[Any], Forward] = {}


@torch.compiler.assume_constant_result  # torch.compile runs it, as source cannot be read in a compiled program
def _learn(owner: type[Any]) -> bool:
    if owner not in _forwards:
        row = recognise(owner)
        own = inspect.getattr_static(owner, "forward")
        _forwards[owner] = guarded(owner, own, row) if isinstance(row, Row) else own
    return True


def _forward_of(owner: type[Any]) -> Forward:
    _learn(owner)
    return _forwards[owner]


# kernels refuses layers with a constructor or with members of other names than these.


class RMSNorm(nn.Module):
    """y of `hidden_states`, `[..., n]`, with the rounding of the class that this is bound to."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _forward_of(type(self))(self, hidden_states)


class RMSNormZeroCentered(nn.Module):
    """y of `x`, `[..., n]`, with the rounding of the class that this is bound to."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _forward_of(type(self))(self, x)


class RMSNormGated(nn.Module):
    """y of `hidden_states` and `gate`, `[..., n]`, with the rounding of the class that this is bound to."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return _forward_of(type(self))(self, hidden_states, gate)


LAYERS: tuple[type[nn.Module], ...] = (RMSNorm, RMSNormZeroCentered, RMSNormGated)


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of `kernels` that holds one layer of this module."""

    layer: type[nn.Module]

    @property
    def layer_name(self) -> str:
        return self.layer.__name__

    def load(self) -> type[nn.Module]:
        return self.layer

    def __str__(self) -> str:
        return f"`{__name__}` (in this process), layer `{self.layer_name}`"


def _kernels() -> Any:
    try:
        import kernels  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "kernels":
            raise
        raise ImportError(
            "kernels is not installed; needed the version that your transformers accepts (for 5.17: "
            "pip install 'kernels>=0.16,<0.17'; for 5.24: 'kernels>=0.18.2,<0.19'), or use pallas_norm_torch.patch, "
            "which needs none",
            name="kernels",
        ) from error
    return cast(Any, kernels)


def kernel_mapping() -> dict[str, dict[Any, Repository]]:
    """This module's layers by name and device, for `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`.

    Registered globally, it is what `model.set_use_kernels(True)` then binds:

        kernels.register_kernel_mapping(kernel_mapping())

    transformers registers the hub's kernels at that moment, but for every capability, and `kernels` prefers the entry
    for one. On a GPU older than compute capability 8.0 the hub's are left.

    Raises:
        ImportError: kernels is not installed.
    """
    kernels = _kernels()
    properties = [kernels.CUDAProperties(min_capability=number, max_capability=number) for number in CAPABILITIES]
    devices: list[Any] = ["cpu", *(kernels.Device(type="cuda", properties=one) for one in properties)]
    return {layer.__name__: dict.fromkeys(devices, Repository(layer)) for layer in LAYERS}


def kernelize(model: nn.Module, *, mode: Any = None, device: str | torch.device | None = None) -> nn.Module:
    """`kernels.kernelize` with the layers of this module and no others, so nothing is taken from the hub.

    Binds a forward to each instance whose class transformers has named for `kernels`: fewer norms than `patch`
    replaces, and pickles of the model are not kernelized. Norms that `patch` has replaced are left alone.

    Arguments:
        model: a model of transformers, or any module.
        mode: a kernels.Mode. None: inference or training, as the model is.
        device: None: that of the first parameter.

    Returns: the model.

    Raises:
        ImportError: kernels is not installed.
        ValueError: no module has a name for kernels.

    Source: `kernels.kernelize`; the forwards are those of `_forwards.py`.
    """
    kernels = _kernels()
    if mode is None:
        mode = kernels.Mode.TRAINING if model.training else kernels.Mode.INFERENCE
    named = {type(module) for module in model.modules() if hasattr(type(module), "kernel_layer_name")}
    if not named and not any(hasattr(type(module), ORIGINAL) for module in model.modules()):
        raise ValueError(
            f"no module of {type(model).__name__} has a name for kernels, so there is nothing to bind; transformers "
            f"gives names only with a version of kernels that it accepts (installed: {kernels.__version__}): install "
            "that version, or use pallas_norm_torch.patch, which needs none"
        )
    with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\nNo kernel mapping found")  # for the other layers, which stay as they are
        return kernels.kernelize(model, mode=mode, device=device)
