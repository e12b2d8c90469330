"""Wrong torch functions: one replacement in the source of a module each, and the test that must fail on it.

    python -m tests.interop.mutants

forks once for each, with torch and JAX imported and nothing of theirs started, runs the test against a changed copy of
the package, and prints which mutants lived.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "interop" / "pallas_norm_torch"


class Mutant(NamedTuple):
    module: str
    old: str
    new: str
    killer: str  # file::test, as pytest names it; a prefix of the names of several


MUTANTS = {
    # operators
    "fake result of the dtype of x": Mutant("_library", "torch.empty(x.shape, dtype=dtype, device=x.device)", "torch.empty(x.shape, dtype=x.dtype, device=x.device)", "test_compiled.py::test_fake_results"),
    "fake rstd of another shape": Mutant("_library", "torch.empty(x.shape[:-1], dtype=torch.float32", "torch.empty(x.shape, dtype=torch.float32", "test_compiled.py::test_opcheck[True-cpu]"),
    "gradient of the sum forgotten": Mutant("_library", "x, weight, rstd, dy, ds, spec, with_dweight=wants_weight", "x, weight, rstd, dy, None, spec, with_dweight=wants_weight", "test_statements.py::test_the_residual_form"),
    "x saved instead of s": Mutant("_library", "_torch_state.save(ctx, x if s is None else s, weight, rstd)", "_torch_state.save(ctx, x, weight, rstd)", "test_statements.py::test_the_residual_form"),
    "second order without the weight": Mutant("_formula", "g = dy.float() if weight is None else dy.float() * (_rounded(weight.float(), to.weight) + spec.weight_offset)", "g = dy.float()", "test_derivatives.py::test_the_second_derivative_is_that_of_the_formula[cpu]"),
    "vmap shares a weight that is not shared": Mutant("_vmap", "if not loop and in_dims[weight_at] is None:", "if not loop:", "test_compiled.py::test_vmap_is_a_loop"),
    "vmap adds up the members' dweight": Mutant("_vmap", "weight_at=1, loop=with_dweight", "weight_at=1, loop=False", "test_derivatives.py::test_per_sample_gradients"),
    "vmap along the wrong axis": Mutant("_vmap", "return value.movedim(in_dims[position], 0)", "return value", "test_compiled.py::test_vmap_is_a_loop"),
    # dtypes
    "s of what torch promotes to": Mutant("statements", "return x + residual if x.dtype == residual.dtype == dtype else (x.float() + residual.float()).to(dtype)", "return (x + residual).to(dtype)", "test_mixed_dtypes.py::test_every_combination"),
    "the weight not rounded": Mutant("statements", "    wide = weight.to(dtype).float()", "    wide = weight.float()", "test_mixed_dtypes.py::test_every_combination"),
    "unit rounded to the dtype of x": Mutant("statements", "unit = unit.to(to.unit)  # Hugging", "unit = unit.to(x.dtype)  # Hugging", "test_mixed_dtypes.py::test_every_combination"),
    "y rounded twice": Mutant("statements", "y = (unit.float() * _scale(weight, spec, to.weight)).to(to.y)", "y = (unit.float() * _scale(weight, spec, to.weight)).to(to.unit).to(to.y)", "test_mixed_dtypes.py::test_every_combination"),
    "s_dtype forgotten by the operator": Mutant("_options", '"out_dtype": out, "s_dtype": s}', '"out_dtype": out, "s_dtype": None}', "test_mixed_dtypes.py::test_every_combination"),
    "dresidual launched as dx": Mutant("prepared", "None if residual in (None, x) else residual", "None", "test_mixed_dtypes.py::test_a_prepared_call"),
    "s launched in the dtype of x": Mutant("prepared", "self.s_dtype = None if self.to.s == kernel.x else self.to.s", "self.s_dtype = torch.float32", "test_mixed_dtypes.py::test_a_prepared_call"),
    "the second derivative rounds the weight's": Mutant("_formula", "return weight + (weight.to(dtype).float() - weight).detach()", "return weight.to(dtype).float()", "test_mixed_dtypes.py::test_the_second_derivative"),
    "a call of other dtypes": Mutant("ops", "device, added, rounding]", "device, added, _options.AS_OPERANDS]", "test_mixed_dtypes.py::test_calls_that_differ"),
    # SGLang's
    "SGLang's sum normalised as it is": Mutant("sglang", "s_dtype = torch.float32 if self.fp32_residual else dtype", "s_dtype = torch.float32", "test_sglang.py::test_a_rounded_sum"),
    "SGLang's override forgotten": Mutant("sglang", "dtype = self.override_orig_dtype or x.dtype", "dtype = x.dtype", "test_sglang.py::test_the_layer"),
    "SGLang's cast forgotten": Mutant("sglang", "    if self.cast_x_before_out_mul:\n", "    if False:\n", "test_sglang.py::test_the_layer"),
    "SGLang's addition elsewhere": Mutant("sglang", 'places: Any = {"out": input, "s_out": residual}', "places: Any = {}", "test_sglang.py::test_the_fused"),
    # in place
    "rows that every warp holds added in place": Mutant("prepared", "operands = [x] if residual is None else [x, residual]", "operands = []", "test_mixed_dtypes.py::test_y_and_s"),
    "the residual taken for safe": Mutant("prepared", "operands = [x] if residual is None else [x, residual]", "operands = [x]", "test_mixed_dtypes.py::test_y_and_s"),
    "s_out at the place of y": Mutant("_out", "if len(given) == 2 and may_overlap", "if False and may_overlap", "test_bad_input.py"),
    "s_out not written": Mutant("statements", "else s_out.copy_(s)", "else s_out", "test_mixed_dtypes.py::test_y_and_s"),
    "in place is not told to autograd": Mutant("prepared", "torch.autograd.graph.increment_version(tensor)", "pass", "test_mixed_dtypes.py::test_y_and_s"),
    # the public functions
    "eps read with `or`": Mutant("_options", "of((_validate.eps(eps), ", "of((_validate.eps(eps) or 1e-6, ", "test_ops.py::test_eps_of_zero"),
    "options of an earlier call": Mutant("_options", "known = _specs.get(given)", "known = next(iter(_specs.values()), None)", "test_ops.py::test_the_options_of_one_call"),
    "out returned unwritten": Mutant("statements", "out.copy_(y)", "out", "test_ops.py::test_out_receives_y[64-cpu]"),
    "JAX's y not in out": Mutant("through_jax", 'y if out is None else out.copy_(y), s if s is None', 'y if out is None else out, s if s is None', "test_statements.py::test_out_by_the_way_of_jax"),
    "create_graph after JAX comes out as a constant": Mutant("through_jax", "        if torch.is_grad_enabled():\n", "        if False:\n", "test_statements.py::test_the_way_of_jax"),
    # torch's own statements
    "rounded once": Mutant("statements", "unit = unit.to(to.unit)  # Hugging", "pass  # Hugging", "test_statements.py::test_the_bits_are_hugging_face_s[torch.bfloat16-33-cpu]"),
    "y of the dtype of x": Mutant("statements", "* _scale(weight, spec, to.weight)).to(to.y)", "* _scale(weight, spec, to.weight)).to(x.dtype)", "test_statements.py::test_the_replay"),
    "rows added where they lie": Mutant("statements", "    x = x.contiguous() if s is None else s\n", "    x = x if s is None else s\n", "test_statements.py::test_rows_at_strides"),
    "gradients added where they lie": Mutant("statements", "    x, dy, rstd = x.contiguous(), dy.contiguous(), ", "    x, dy, rstd = x, dy, ", "test_statements.py::test_rows_at_strides"),
    "zero has no sign": Mutant("statements", "return wide + spec.weight_offset if spec.weight_offset else wide", "return wide + spec.weight_offset", "test_mixed_dtypes.py::test_every_combination"),
    "the gradient of unit not rounded": Mutant("statements", "* _scale(weight, spec, to.weight)).to(to.unit).float()", "* _scale(weight, spec, to.weight)).float()", "test_statements.py::test_gradients_are"),
    "dweight of an unrounded unit": Mutant("statements", "factor = unit.to(to.unit)", "factor = unit", "test_statements.py::test_gradients_are"),
    "JAX is the way of a CPU": Mutant("_library", "    return statements.forward(", "    from . import through_jax\n    return through_jax.forward(", "test_statements.py::test_no_call_starts_jax"),
    "a device that is not there": Mutant("_explain", "if index >= (count := torch.cuda.device_count()):", "if index >= 1 << (count := 9):", "test_statements.py::test_a_device_that"),
    "the weight left out": Mutant("through_jax", 'given = {"x": x, "residual": residual, "weight": weight}', 'given = {"x": x, "residual": residual}', "test_ops.py::test_the_bits_are_jax_s[torch.bfloat16-33-cpu]"),
    "forward mode silently zero": Mutant("_options", "    _validate.no_tangents(x, residual, weight)\n", "", "test_derivatives.py::test_forward_mode"),
    "the operator forgets to refuse duals": Mutant("_library", 'library.impl("rms_norm", _rms_norm_autograd, "Autograd")\n', "", "test_compiled.py::test_opcheck[True-cpu]"),
    "autocast followed": Mutant("ops", "    spec = _options.spec(x, None, weight,", "    x = x.to(torch.get_autocast_dtype('cpu')) if torch.is_autocast_enabled('cpu') else x\n    spec = _options.spec(x, None, weight,", "test_ops.py::test_autocast"),
    "the module's weight starts at one in spite of its offset": Mutant("module", "1.0 - self.weight_offset", "1.0", "test_ops.py::test_the_module"),
    "SGLang's function of three axes": Mutant("sglang", "if input.ndim != 2:", "if False:", "test_bad_input.py"),
    # results of 8 bits
    "8 bits: scale of zeros": Mutant("quantized_statements", "torch.where(scales == 0, quantized_reference.SCALE_OF_ZEROS, scales)", "scales", "test_quantized.py::test_special_values"),
    "8 bits: int8 not saturated": Mutant("quantized_statements", "torch.clamp(torch.round(quotients), -128, 127)", "torch.round(quotients)", "test_quantized.py::test_special_values"),
    "8 bits: divided by the other dtype's largest": Mutant("quantized_statements", "LARGEST[_validate.dtype_name(dtype)])\n", "LARGEST['int8'])\n", "test_quantized.py::test_torch_statements"),
    "8 bits: the gradient silently zero": Mutant("quantized", "        _quantized_library.no_gradient(x, residual, weight)\n", "", "test_quantized.py::test_there_is_no_gradient"),
    "8 bits: vmap shares a scale that is not shared": Mutant("_quantized_library", "if not any(is_batched[len(rows) :]):", "if True:", "test_quantized.py::test_vmap_is_a_loop"),
    "8 bits: fake scales of another shape": Mutant("_quantized_library", "n // (group or n)", "n", "test_quantized.py::test_the_operator_passes"),
    # what is refused
    "out may overlap x": Mutant("_out", "if not same and may_overlap(value, x):", "if False:", "test_bad_input.py"),
    "out may hold the weight": Mutant("_out", "if weight is not None and may_overlap(value, weight):", "if False:", "test_bad_input.py"),
    "out may be expanded": Mutant("_overlap", "if stride <= reach:", "if stride < 0:", "test_overlap.py"),
    "storages compared, not addresses": Mutant("_overlap", "    if left.numel() == 0", "    if left.untyped_storage().data_ptr() != right.untyped_storage().data_ptr():\n        return False\n    if left.numel() == 0", "test_overlap.py"),
    "every stride taken for a multiple of the smallest": Mutant("_overlap", " or any(step % min(steps) for step in steps)", "", "test_overlap.py"),
    "interleaved columns refused": Mutant("_overlap", "return left.element_size() != right.element_size() or not width", "return True or not width", "test_overlap.py"),
    "jit.trace passed by": Mutant("ops", "        and _tracing() is None\n    )\n", "    )\n", "test_compiled.py::test_jit_trace"),
    "tangent of the gradient lost": Mutant("_library", " or _torch_state.forward_mode() or not all", " or not all", "test_derivatives.py::test_a_tangent"),
    "batches of gradients launched": Mutant("_library", " or not all(map(_torch_state.is_memory, (dy, ds)))", "", "test_derivatives.py::test_a_batch"),
    "zeros for a y that is not used": Mutant("_library", "        spec, dx, dweight = ctx.spec, ds, None\n", "        spec, dx, dweight = ctx.spec, ds, None\n        dy = torch.zeros_like(x) if dy is None else dy\n", "test_derivatives.py::test_where_y_is_unused"),
    "a kernel of another form crashes the call": Mutant("_library", "            direct.refuse(x.shape[-1], x.device.index, str(reason))\n    return statements.forward", "            raise\n    return statements.forward", "test_launch.py::test_a_kernel_that_cannot"),
    "out checked after the call": Mutant("ops", "            _out.memory({\"out\": out}, {\"x\": x}, weight)\n", "            pass\n", "test_bad_input.py"),
    # what memory means
    "x negated lazily is launched": Mutant("ops", "    if x.is_neg() or (\n", "    if (\n", "test_what_memory_means.py::test_a_call_like"),
    "a weight negated lazily is launched": Mutant("ops", " or weight.is_neg() or ", " or ", "test_what_memory_means.py::test_a_call_like"),
    "a residual negated lazily is launched": Mutant("ops", " or residual.is_neg()", "", "test_what_memory_means.py::test_a_call_like"),
    "a zero tensor is launched at address 0": Mutant("prepared", "        if any(tensor is not None and tensor._is_zerotensor() for", "        if False and any(tensor is not None and tensor._is_zerotensor() for", "test_what_memory_means.py::test_a_call_like"),
    "out negated lazily is written": Mutant("_out", "        or out.is_neg()\n", "", "test_what_memory_means.py::test_a_call_like"),
    "out of autograd's zeros is written": Mutant("_out", "        bool(start)\n        and not start", "        not start", "test_what_memory_means.py::test_a_call_like"),
    "gradients negated lazily are launched": Mutant("_torch_state", " and not is_batched(tensor) and not is_lazy(tensor))", " and not is_batched(tensor))", "test_what_memory_means.py::test_gradients_that"),
    "tensors of inference mode saved": Mutant("_torch_state", "tensor.clone() if tensor.is_inference() else tensor", "tensor", "test_what_memory_means.py::test_operands_made"),
    # programs that torch makes
    "proxies refused": Mutant("_torch_state", "    return any(not isinstance(value, Tensor) and", "    return False and any(not isinstance(value, Tensor) and", "test_programs.py::test_symbolic_trace_keeps"),
    "a proxy for x alone": Mutant("ops", "_torch_state.is_stand_in(x, weight, out)", "_torch_state.is_stand_in(x)", "test_programs.py::test_a_proxy"),
    "fake tensors decompose": Mutant("_torch_state", "    torch._decomp.meta_table[overload] = overload\n", "", "test_programs.py::test_the_decompositions"),
    "dweight does not decompose": Mutant("_decompositions", "with_dweight=with_dweight", "with_dweight=False", "test_programs.py::test_gradients"),
    "unbacked rows guarded": Mutant("_validate", "    if torch.SymInt not in map(type, (*found, *needed)):\n", "    if True:\n", "test_programs.py::test_unbacked_rows_compile"),
    "functionalize meets an autograd.Function": Mutant("ops", "    if _transformation() is not None and _torch_state.functionalized():\n", "    if False:\n", "test_programs.py::test_functionalize_takes"),
    "functionalize beside others meets it": Mutant("_library", "    if not _torch_state.alone():\n", "    if False:\n", "test_programs.py::test_functionalize_beside"),
    # DTensor
    "dweight of each rank is the whole": Mutant("_dtensor", "Partial() if with_dweight and not isinstance(rows, Replicate) else Replicate()", "Replicate()", "test_dtensor.py::test_placements"),
    "dweight of all rows is a part": Mutant("_dtensor", "if with_dweight and not isinstance(rows, Replicate) else", "if with_dweight else", "test_dtensor.py::test_placements"),
    "a part of a row is normalised": Mutant("_dtensor", "range(len(x.shape) - 1)", "range(len(x.shape))", "test_dtensor.py::test_placements"),
    "one sharding for all options": Mutant("_dtensor", '        _torch_state.options_decide_sharding(overload, "eps")\n', "", "test_dtensor.py::test_placements"),
    "plain zeros beside DTensors": Mutant("_library", "        ctx.set_materialize_grads(False)\n        if not ctx.with_dweight:", "        if not ctx.with_dweight:", "test_dtensor.py::test_placements"),
    # exchange
    "a view shared as if it were contiguous": Mutant("exchange", "    if not tensor.is_contiguous():\n        return", "    if False:\n        return", "test_exchange.py"),
    "copied without being asked": Mutant("exchange", "    if copy:\n", "    if copy or _share_of(tensor) is not None:\n", "test_exchange.py"),
    "never copied": Mutant("exchange", "tensor if _share_of(tensor) is None else tensor.clone(memory_format=torch.contiguous_format)", "tensor", "test_exchange.py::test_call_jax"),
    "float64 narrowed": Mutant("exchange", "if tensor.dtype in NARROWED and not x64:", "if False:", "test_exchange.py"),
    "lazily conjugated memory shared": Mutant("exchange", "if tensor.is_conj() or tensor.is_neg():", "if False:", "test_exchange.py"),
    # the disk cache
    "cache trusts everybody": Mutant("cache", "status.st_uid == os.geteuid() and not", "status.st_uid >= 0 or not", "test_cache.py"),
    "cache checks no sum": Mutant("cache", "or content[len(MAGIC) : head] != _seal(key, payload)", "or False", "test_cache.py"),
    "cache forgets the key": Mutant("cache", 'MAGIC + key.encode() + b"\\0" + payload', "MAGIC + payload", "test_cache.py"),
    "cache follows links": Mutant("cache", " | os.O_NOFOLLOW", "", "test_cache.py"),
    "cache fails on a full disk": Mutant("cache", "    except OSError:\n        return False\n", "    except ZeroDivisionError:\n        return False\n", "test_cache.py"),
    # rows and launches
    "strides of another axis": Mutant("rows", "steps = [stride[axis] for stride in strides]", "steps = [stride[0] for stride in strides]", "test_rows.py"),
    "offset within 256 bytes dropped": Mutant("rows", "Strides(offset, o * size, i * size)", "Strides(0, o * size, i * size)", "test_rows.py"),
    "rows at any address": Mutant("rows", "if (offset | o * size | i * size) % (vec * size):", "if False:", "test_rows.py"),
    "axes merged that do not follow each other": Mutant("rows", "all(outer == inner * size", "all(outer >= inner * 1", "test_rows.py"),
    "fresh results at the strides of the operands": Mutant("rows", "return Strides(0, group * row_bytes, row_bytes if group > 1 else 0)", "return Strides(0, row_bytes, row_bytes)", "test_rows.py"),
    "rows that every warp holds in place": Mutant("prepared", " and not count % plan.block", "", "test_prepared.py::test_rows_that_every_warp"),
    "rows that are read twice written in place": Mutant("prepared", "plan, count = self.plan if in_rows else from_memory(self.plan),", "plan, count = self.plan,", "test_prepared.py::test_a_row_that_is_read_twice"),
    "a persistent grid of as many CTAs as rows": Mutant("prepared", "or NO_LIMIT, program.plan.cluster", "and NO_LIMIT or NO_LIMIT, program.plan.cluster", "test_prepared.py::test_a_persistent_grid"),
    "layouts of other offsets": Mutant("prepared", "key: Any = x.shape, x.stride(), x_at % ALIGNMENT\n", "key: Any = x.shape, x.stride()\n", "test_prepared.py::test_rows_at_other_offsets"),
    "rstd like another thread's": Mutant("prepared", "        rstd = _empty_like(like)", "        rstd = _empty_like(self._rstd)", "test_prepared.py::test_threads_with_other_row_counts"),
    "another number of CTAs goes unseen": Mutant("launch/compiling", "if plan is not None and (recorded.grid,", "if False and (recorded.grid,", "test_launch_driver.py::test_a_grid_that_is_not"),
    "loaded wherever lowering left the context": Mutant("launch/compiling", "            with driver.context_of(device):  # again", "            if True:  # again", "test_launch_driver.py::test_lowering_that_changes"),
    "the caller's context lost": Mutant("launch/driver", "    finally:\n        ask(\"cuCtxSetCurrent\", before)\n", "    finally:\n        pass\n", "test_launch_driver.py::test_another_context"),
    "launch errors dropped": Mutant("launch/kernels", "            if status := launch(*memory.arguments):\n", "            if (status := launch(*memory.arguments)) and False:\n", "test_launch_driver.py::test_an_error_of_the_driver"),
    "no second try after entering": Mutant("launch/kernels", "            if before != driver.primary_context(self.device):", "            if driver.current_context() != driver.primary_context(self.device):", "test_launch_driver.py::test_a_thread_without"),
    "launched on after it was refused": Mutant("direct", "    calls.clear()\n", "", "test_prepared.py::test_what_explain_says"),
    "no second try in the own context": Mutant("launch/kernels", "        if status in (NO_CONTEXT, ANOTHERS):\n", "        if False:\n", "test_launch_driver.py::test_another_context"),
    "a descriptor of another address": Mutant("launch/kernels", "known.get(address)", "next(iter(known.values()), None)", "test_launch_driver.py::test_descriptors"),
    "a head of another stream": Mutant("launch/kernels", "memory.grid != grid or memory.stream != stream", "memory.grid != grid", "test_launch_driver.py::test_the_driver_reads"),
    "any trial is passed": Mutant("launch/proof", "    if wrong := [name", "    if wrong := [] and [name", "test_launch_driver.py::test_a_refusal"),
    "y may be anything in a trial": Mutant("launch/proof", "        left &= ~right\n", "        left &= False\n", "test_launch_driver.py::test_a_kernel_that_computes"),
    "dx may be anything in a trial": Mutant("launch/proof", "    bound += ROUNDINGS", "    bound += 1e9 * ROUNDINGS", "test_launch_driver.py::test_a_kernel_that_computes"),
    "one key for every GPU": Mutant("launch/compiling", "{_source_digest()} {program.gpu} {program.plan}", "{_source_digest()} {program.plan}", "test_cache_hostile.py::test_another_gpu"),
    "one key for every release": Mutant("launch/compiling", "b\"\\0\".join([release.encode(), *(", "b\"\\0\".join([*(", "test_cache_hostile.py::test_a_release_without_sources"),
    "an unknown JAX is launched": Mutant("launch/lowering", "if KNOWN_JAX[0] <= jax.__version_info__[:2] < KNOWN_JAX[1]:", "if True:", "test_launch.py::test_an_unknown_jax"),
    "an old GPU is taken": Mutant("launch/compiling", "_target.too_old(capability) or ", "", "test_launch.py::test_an_old_gpu"),
    "kernels of two generations in one process": Mutant("launch/compiling", " or _target.assembled_for_another(capability)", "", "test_launch.py::test_a_process_compiles"),
    "a module of another architecture is compiled": Mutant("launch/lowering", "if not _target.takes(program.gpu.capability, found):", "if False:", "test_launch.py::test_a_module_of_another_architecture"),
    "the plans of one GPU for all": Mutant("_kernels", "self.spec, self.strided, gpu=gpu)", "self.spec, self.strided)", "test_launch.py::test_each_gpu_has_a_program_of_its_own"),
    "an Ampere asked for its clusters": Mutant("launch/recording", "    if clusters:\n", "    if True:\n", "test_launch_driver.py::test_a_gpu_without_clusters"),
    "one backward pass without a kernel ends all": Mutant("_library", "        except Misfit:  # of this kernel alone: the forward one goes on\n            pass\n", "        except Misfit as reason:\n            direct.refuse(x.shape[-1], x.device.index, str(reason))\n", "test_prepared.py::test_a_backward_pass_without_a_kernel"),
    # patched models
    "text that is not the code is hashed": Mutant("_sources", "    if _computes(code) not in map(_computes, compiled):\n        return None\n", "", "test_huggingface_source.py::test_a_file_edited"),
    "another torch in the text": Mutant("_sources", "    return definition if _names_mean_what_they_say(function) else None", "    return definition", "test_huggingface_source.py::test_another_torch"),
    "kernels for other dtypes": Mutant("_launches", "        and tensor.dtype in DTYPES\n        and tensor.layout is STRIDED", "        and tensor.layout is STRIDED", "test_huggingface_ways_back.py::test_unusual_operands"),
    "lazily negated memory launched": Mutant("_launches", "tensor.is_neg() or tensor.is_nested", "tensor.is_nested", "test_huggingface_ways_back.py::test_unusual_operands"),
    "forward mode launched": Mutant("_launches", "    return not forward_mode() and (transformation() is None or not _torch_state.inside_jvp())\n", "    return True\n", "test_huggingface_ways_back.py::test_forward_mode"),
    "tensors of inference mode launched": Mutant("_launches", "    if inference and torch.is_grad_enabled():\n        return False\n", "", "test_huggingface_ways_back.py::test_tensors_of_inference"),
    "the operator lost in compiled programs": Mutant("_launches", "    if is_compiling():\n", "    if False:\n", "test_huggingface_ways_back.py::test_compiled_programs"),
    "a hidden helper passed by": Mutant("_replacing", "            and all(name not in members for name in hidden)  # isdisjoint ends a compiled graph of torch 2.11\n", "", "test_huggingface_ways_back.py::test_a_helper_hidden"),
    "a changed class passed by": Mutant("_replacing", "            and owner.forward is own\n", "", "test_huggingface_ways_back.py::test_a_class_whose_forward"),
    "torch's autocast passed by": Mutant("_replacing", "            and not (row.autocast and torch.is_autocast_enabled(x.device.type))\n", "", "test_huggingface_ways_back.py::test_under_autocast"),
    "the instance's forward passed by in fused layers": Mutant("_decoder_layers", '        "forward" not in members  # bound to the instance: accelerate\'s hooks, anybody\'s function\n        and members', "        members", "test_huggingface_ways_back.py::test_a_forward_set"),
    "global hooks passed by in fused layers": Mutant("_decoder_layers", "        and not any(MODULE_HOOKS)\n", "", "test_huggingface_ways_back.py::test_global_hooks"),
    "the class's call passed by in fused layers": Mutant("_decoder_layers", "        and type(norm).__call__ is nn.Module.__call__\n", "", "test_huggingface_ways_back.py::test_a_class_with_its_own_call"),
    "the norm of something else fused": Mutant("_decoder_layers", "if operand in names:\n", "if operand:\n", "test_decoder_layers.py::test_an_addition"),
    "a sum that another name has is lost": Mutant("_decoder_layers", "for name in kept[1:]]", "for name in kept[2:]]", "test_decoder_layers.py::test_an_addition"),
    "a fused forward without its class's cell": Mutant("_decoder_layers", "or forward.__code__.co_freevars", "", "test_decoder_layers.py::test_an_addition"),
    "a fused forward without defaults": Mutant("_decoder_layers", "    made.__defaults__, made.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__\n", "", "test_decoder_layers.py::test_the_fused"),
    "side effects passed by": Mutant("_purity", "    for _ in _functions(owner):\n        pass\n", "", "test_huggingface_computed.py::test_what_is_wrong_by_a_step_is_left[Printing]"),
    "branches on shapes passed by": Mutant("_computation", "    if found := branches():\n", "    if False:\n", "test_huggingface_computed.py::test_what_is_wrong_by_a_step_is_left[BranchesOnRows]"),
    "gradients not compared": Mutant("_computation", "    _gradients_are_its_own(twin, n, forms[F32, F32], eps)\n", "", "test_huggingface_computed.py::test_what_is_wrong_by_a_step_is_left[StatisticsWithoutGrad]"),
    "bits not compared": Mutant("_computation", "        if y.dtype != expected.dtype or not torch.equal(_bits(y), _bits(expected)):\n", "        if False:\n", "test_huggingface_computed.py::test_the_proof_finds_a_wrong_form"),
    "what it read may change": Mutant("_computed", "                and (not read or all(_read(self, path) == value for path, value in read))\n", "", "test_huggingface_computed.py::test_an_attribute_that_changes"),
}  # fmt: skip


def _run(name: str, mutant: Mutant | None, killers: list[str]) -> int:
    """pytest's exit code with the changed package: 0 where nothing failed, so the mutant lives; 1 where it is killed."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy)
        if mutant is not None:
            file = copy / f"{mutant.module}.py"
            source = file.read_text()
            if source.count(mutant.old) != 1:
                print(f"{name}: {mutant.old!r} is {source.count(mutant.old)} times in {mutant.module}", file=sys.stderr)
                return 70
            file.write_text(source.replace(mutant.old, mutant.new))
        sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry) != PACKAGE.parent)]
        # Rewritten assertions say more of a failure, which nobody reads here, and took 1.5 of a fork's 2.8 s.
        options = ["-q", "-x", "-m", "not gpu and not nightly", "--assert=plain", "--no-header"]
        options += ["-p", "no:cacheprovider", "-p", "no:randomly"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = pytest.main([*options, *(f"tests/interop/{killer}" for killer in killers)])
        if code not in (0, 1):
            print(name, output.getvalue()[-3000:], file=sys.stderr)
        return int(code)


def nodes(killer: str) -> list[str]:
    """pytest takes no prefixes of names: the tests of the file that begin so. One with its parameters is meant alone."""
    file, _, prefix = killer.partition("::")
    if not prefix or "[" in prefix:
        return [killer]
    source = (Path(__file__).parent / file).read_text().splitlines()
    found = [line.split("(")[0].removeprefix("def ") for line in source if line.startswith(f"def {prefix}")]
    assert found, f"no test of {file} begins with {prefix}"
    return [f"{file}::{name}" for name in found]


def main() -> int:
    # Imported before the forks, with nothing of it started.
    import hypothesis  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pallas_norm  # noqa: F401

    killers = sorted({node for mutant in MUTANTS.values() for node in nodes(mutant.killer)})
    whole = {node for node in killers if "::" not in node}
    control = [node for node in killers if node in whole or node.partition("::")[0] not in whole]
    codes = {}
    for name, mutant, chosen in (
        ("the package as it is", None, control),
        *((name, mutant, nodes(mutant.killer)) for name, mutant in MUTANTS.items()),
    ):
        child = os.fork()
        if not child:
            code = 71
            try:
                code = _run(name, mutant, chosen)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        codes[name] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
