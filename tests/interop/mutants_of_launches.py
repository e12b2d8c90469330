"""The disk cache, rows, and what is launched."""

from __future__ import annotations

from tests.interop.mutant import Mutant

MUTANTS = {
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
    "rows that every warp holds in place": Mutant("prepared", "not may_be_in_place(plan, count)", "plan.source.value == \"memory\"", "test_prepared_rows.py::test_rows_that_every_warp"),
    "rows that are read twice written in place": Mutant("prepared", "plan, count = self.plan if in_rows else from_memory(self.plan),", "plan, count = self.plan,", "test_prepared_rows.py::test_a_row_that_is_read_twice"),
    "a persistent grid of as many CTAs as rows": Mutant("prepared", "or NO_LIMIT, program.plan.cluster", "and NO_LIMIT or NO_LIMIT, program.plan.cluster", "test_prepared.py::test_a_persistent_grid"),
    "layouts of other offsets": Mutant("prepared", "key: Any = x.shape, x.stride(), x_at % ALIGNMENT\n", "key: Any = x.shape, x.stride()\n", "test_prepared_rows.py::test_rows_at_other_offsets"),
    "layouts of other offsets in the short way": Mutant("prepared", "get((x.shape, x.stride(), x_at % ALIGNMENT))", "get((x.shape, x.stride(), 0))", "test_prepared_rows.py::test_rows_at_other_offsets"),
    "rows at strides never in one step": Mutant("prepared", "if numbers is None or self._at_strides is None:", "if True:", "test_prepared_rows.py::test_rows_at_strides_that_were"),
    "rstd like another thread's": Mutant("prepared", "        rstd = _empty_like(like)", "        rstd = _empty_like(self._rstd)", "test_prepared.py::test_threads_with_other_row_counts"),
    "another number of CTAs goes unseen": Mutant("launch/compiling", "if plan is not None and (recorded.grid,", "if False and (recorded.grid,", "test_launch_driver.py::test_a_grid_that_is_not"),
    "loaded wherever lowering left the context": Mutant("launch/compiling", "            with driver.context_of(device):  # again", "            if True:  # again", "test_launch_driver.py::test_lowering_that_changes"),
    "the caller's context lost": Mutant("launch/driver", "    finally:\n        ask(\"cuCtxSetCurrent\", before)\n", "    finally:\n        pass\n", "test_launch_driver.py::test_another_context"),
    "launch errors dropped": Mutant("launch/kernels", "            if status := launch(*memory.arguments):\n", "            if (status := launch(*memory.arguments)) and False:\n", "test_launch_driver.py::test_an_error_of_the_driver"),
    "no second try after entering": Mutant("launch/kernels", "            if before != driver.primary_context(self.device):", "            if driver.current_context() != driver.primary_context(self.device):", "test_launch_driver.py::test_a_thread_without"),
    "launched on after it was refused": Mutant("direct", "    calls.clear()\n", "", "test_prepared_refusals.py::test_what_explain_says"),
    "no second try in the own context": Mutant("launch/kernels", "        if status in (NO_CONTEXT, ANOTHERS):\n", "        if False:\n", "test_launch_driver.py::test_another_context"),
    "a descriptor of another address": Mutant("launch/kernels", "known.get(address)", "next(iter(known.values()), None)", "test_launch_driver.py::test_descriptors"),
    "a head of another stream": Mutant("launch/kernels", "memory.grid != grid or memory.stream != stream", "memory.grid != grid", "test_launch_driver.py::test_the_driver_reads"),
    "an address of memory that nobody holds": Mutant("launch/proof", "arguments.values(program, arrays, ", "arguments.values(program, {**arrays, \"parts\": parts.to(device)}, ", "test_trial_run.py::test_what_a_trial_launches_on"),
    "any trial is passed": Mutant("launch/proof", "    if wrong := [name", "    if wrong := [] and [name", "test_trial_run.py::test_a_refusal"),
    "y may be anything in a trial": Mutant("launch/trial", "left = wrong if left is None else left & wrong", "left = wrong & False", "test_trial_run.py::test_a_kernel_that_computes"),
    "dx may be anything in a trial": Mutant("launch/trial", "return dx, bound + ROUNDINGS", "return dx, bound + 1e9 * ROUNDINGS", "test_trial_run.py::test_a_kernel_that_computes"),
    "one key for every GPU": Mutant("launch/compiling", "{_source_digest()} {program.gpu} {program.plan}", "{_source_digest()} {program.plan}", "test_cache_hostile.py::test_another_gpu"),
    "one key for every release": Mutant("launch/compiling", "b\"\\0\".join([release.encode(), *(", "b\"\\0\".join([*(", "test_cache_hostile.py::test_a_release_without_sources"),
    "an unknown JAX is launched": Mutant("launch/lowering", "if KNOWN_JAX[0] <= jax.__version_info__[:2] < KNOWN_JAX[1]:", "if True:", "test_launch.py::test_an_unknown_jax"),
    "an old GPU is taken": Mutant("launch/compiling", "_target.too_old(capability) or ", "", "test_launch.py::test_an_old_gpu"),
    "kernels of two generations in one process": Mutant("launch/compiling", " or _target.assembled_for_another(capability)", "", "test_launch.py::test_a_process_compiles"),
    "a module of another architecture is compiled": Mutant("launch/lowering", "if not _target.takes(program.gpu.capability, found):", "if False:", "test_launch.py::test_a_module_of_another_architecture"),
    "as many CTAs for few rows as a grid for many has": Mutant("prepared_few", "return self._run, rows, rows, 0,", "return self._run, rows, many[2], 0,", "test_few_rows.py::test_few_rows_take"),
    "the clusters of the kernel for many rows": Mutant("prepared_few", "rows, 0, self._cluster", "rows, 0, many[4]", "test_few_rows.py::test_few_rows_take"),
    "the blocks of warps for few rows of a CTA": Mutant("prepared_few", "return self._run, rows, rows, 0,", "return self._run, many[1], rows, 0,", "test_few_rows.py::test_few_rows_take"),
    "compiled while a graph is captured": Mutant("prepared_few", "if launch.captures(self._device):", "if False:", "test_few_rows.py::test_a_capture"),
    "one schedule for all row counts": Mutant("_kernels", "gpu=gpu, few=self.few)", "gpu=gpu)", "test_few_rows.py::test_few_rows_take"),
    "the plans of one GPU for all": Mutant("_kernels", "self.spec, self.strided, gpu=gpu, few", "self.spec, self.strided, few", "test_launch.py::test_each_gpu_has_a_program_of_its_own"),
    "an Ampere asked for its clusters": Mutant("launch/recording", "    if clusters:\n", "    if True:\n", "test_launch_driver.py::test_a_gpu_without_clusters"),
    "one backward pass without a kernel ends all": Mutant("_library", "        except Misfit:  # of this kernel alone: the forward one goes on\n            pass\n", "        except Misfit as reason:\n            direct.refuse(x.shape[-1], x.device.index, str(reason))\n", "test_prepared_refusals.py::test_a_backward_pass_without_a_kernel"),
}  # fmt: skip
