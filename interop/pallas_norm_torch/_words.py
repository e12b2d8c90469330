"""Names of torch that tell or change more than the result of an operator: a forward that uses one is not proved.

A proof looks at values, shapes, dtypes, devices and autocast. What else a tensor or the process is, such as
requires_grad, strides or inference mode, may decide a branch that no input of the proof takes.
"""

from __future__ import annotations

import types
from typing import Any

import torch

# What the proof varies, or what follows from a dtype.
LOOKED_AT = {
    *("shape", "dtype", "ndim", "device", "is_cuda", "is_cpu", "get_device", "itemsize", "nbytes", "name"),
    *("T", "mT", "H", "mH", "real", "imag", "is_floating_point", "is_complex", "is_signed", "is_tensor"),
}
PROPERTIES = {
    name
    for name in dir(torch.Tensor)
    if isinstance(getattr(torch.Tensor, name, None), (types.GetSetDescriptorType, property))
} - {"__dict__"}
QUESTIONS = ("is_", "are_", "get_", "has_", "set_", "use_", "_is_", "_get_")
REFUSED = {
    *("manual_seed", "seed", "initial_seed", "synchronize", "save", "load", "register_buffer", "register_parameter"),
    *("register_forward_hook", "register_forward_pre_hook", "register_hook", "register_module", "add_module"),
    *("is_compiling", "is_dynamo_compiling", "is_scripting", "is_tracing", "is_exporting"),
    *("rand", "randn", "rand_like", "randn_like", "bernoulli", "dropout", "requires_grad_", "retain_grad", "setattr"),
    *("__dict__", "__class__", "_parameters", "_buffers", "_modules", "__setattr__", "__delattr__", "__setitem__"),
    *("__delitem__", "__setstate__", "__getattribute__", "__defaults__", "__globals__", "__closure__", "__code__"),
    *("stride", "storage_offset", "data_ptr", "untyped_storage", "storage", "dim_order", "names", "numpy"),
    *("device_count", "current_device", "current_stream", "memory_allocated", "mem_get_info"),
    *("distributed", "backends", "_C", "_dynamo", "overrides", "random", "share_memory_"),
}
MODULES = {"torch", "torch.nn", "torch.nn.functional", "torch.functional", "torch.amp", "torch.special", "math"}
ELSEWHERE = ("torch.distributed", "torch.backends", "torch.random", "torch.overrides", "torch._dynamo")


def refused(name: Any) -> bool:
    """Whether an attribute or a function of that name is one of these."""
    if not isinstance(name, str) or name in LOOKED_AT:
        return False
    if name in REFUSED or name in PROPERTIES:
        return True
    return name.startswith(QUESTIONS) and any(hasattr(one, name) for one in (torch, torch.Tensor, torch.cuda))


def refused_value(value: Any) -> bool:
    """Whether what a global of a forward means is: by what it is called itself, whatever the global is called."""
    if isinstance(value, types.ModuleType):
        return value.__name__ not in MODULES
    return str(getattr(value, "__module__", "")).startswith(ELSEWHERE) or refused(getattr(value, "__name__", None))
