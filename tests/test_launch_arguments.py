"""The numbers of a launch: named once, and found again among a kernel's references."""

from __future__ import annotations

from pallas_norm.kernels.launch_arguments import BYTES, COUNT, COUNTS, LaunchArguments, StridedRows


def test_counts_come_first_and_then_the_strides_of_each_operand() -> None:
    assert LaunchArguments.units() == dict.fromkeys(COUNTS, COUNT)
    names = [*COUNTS, "group", "x_offset", "x_outer", "x_inner", "y_offset", "y_outer", "y_inner"]
    assert list(LaunchArguments.units(["x", "y"])) == names
    assert LaunchArguments.units(["x"])["group"] == COUNT
    assert LaunchArguments.units(["x"])["x_inner"] == BYTES


def test_a_kernel_without_them_has_its_references_as_they_are() -> None:
    refs = {"x": "x", "weight": "weight", "y": "y"}
    assert LaunchArguments.taken_from(refs) == (None, refs)


def test_only_operands_with_strides_are_rows_at_strides() -> None:
    refs = {
        "x": "x",
        "weight": "w",
        **{name: name for name in LaunchArguments.units(["x", "y"])},
        "y": "y",
        "rstd": "r",
    }
    numbers, others = LaunchArguments.taken_from(refs)
    assert numbers is not None
    assert (numbers.blocks, numbers.first_left, numbers.programs, numbers.group) == (*COUNTS, "group")
    assert others == {
        "x": StridedRows("x", "group", "x_offset", "x_outer", "x_inner"),
        "weight": "w",
        "y": StridedRows("y", "group", "y_offset", "y_outer", "y_inner"),
        "rstd": "r",
    }


def test_counts_alone_leave_the_rows_where_they_are() -> None:
    refs = {"x": "x", **{name: name for name in COUNTS}}
    numbers, others = LaunchArguments.taken_from(refs)
    assert numbers is not None
    assert (numbers.group, numbers.strides, others) == (None, {}, {"x": "x"})
