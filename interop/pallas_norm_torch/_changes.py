"""A module's class changed and changed back, below what accelerate has put around its forward.

accelerate hooks a module by binding to the instance a forward of its own, which calls `_old_forward`: the method that
it found. Where that is the class's own, it becomes the new class's; the hooks stay where they are, and run.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Any

from torch import nn

OLD_FORWARD, HOOK = "_old_forward", "_hf_hook"  # accelerate's names, as in its add_hook_to_module


def is_hooked(module: nn.Module) -> bool:
    """Whether the forward bound to the instance is that of accelerate's hooks."""
    members = vars(module)
    bound = members.get("forward")
    return (
        isinstance(bound, functools.partial)
        and getattr(bound.func, "__module__", None) == "accelerate.hooks"
        and OLD_FORWARD in members
        and HOOK in members
    )


def is_rebound(module: nn.Module) -> bool:
    """Whether something else has bound another forward to the instance. The class's own, which kernelize leaves where
    it has no kernel and accelerate below its hooks and where it has removed them, is no other."""
    bound = vars(module).get(OLD_FORWARD if is_hooked(module) else "forward")
    own = inspect.getattr_static(type(module), "forward", None)
    return bound is not None and getattr(bound, "__func__", None) is not own


@dataclasses.dataclass(frozen=True)
class Change:
    module: nn.Module
    before: type[Any]
    after: type[Any]

    def apply(self) -> None:
        members, hooked = vars(self.module), is_hooked(self.module)
        self.module.__class__ = self.after
        if hooked:
            members[OLD_FORWARD] = types.MethodType(inspect.getattr_static(self.after, "forward"), self.module)
        else:
            members.pop("forward", None)  # the class's own, which would now be the wrong one

    def undo(self) -> None:
        if type(self.module) is self.after and not is_rebound(self.module):
            Change(self.module, self.after, self.before).apply()


def apply_all(changes: list[Change]) -> None:
    """All of them, or none."""
    try:
        for change in changes:
            change.apply()
    except BaseException:
        for change in changes:
            change.undo()
        raise
