"""Measures pallas_norm and its peers on this machine.

run         a suite with every provider; continues the file where it stopped
compare     what changed between two files of run (or overhead) by more than the spread
plot        the pictures of files of run and overhead
overhead    host time of one call, by the ways to call
tune        candidates for the tables of plans
parity      how far each way to compute a model's norms is from Hugging Face's rounding
model       tokens per second of a whole model
mixed       calls whose dtypes differ, and additions in place
accuracy, training              outputs against exact statistics; a training step
evidence    accuracy, training, overhead, parity, model, run and the GPU tests, of one commit and one device; continues
            where it stopped
readme      fills README.md and docs/ from the committed files, and draws the pictures
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from pathlib import Path

from . import (
    accuracy,
    baselines,
    compare,
    evidence,
    overhead,
    parity_report,
    plots,
    readme,
    results,
    run,
    suite,
    training,
    tune,
)

OF_MODELS = {"parity": "parity", "model": "model_speed", "mixed": "mixed"}  # imported when asked for: they need torch
README_FIGURES = {"accuracy": accuracy.run, "training": training.run}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--commit", help="of the tree that runs, where it is no checkout")
    output = argparse.ArgumentParser(add_help=False, parents=[common])
    output.add_argument("--out", type=Path, help="default: bench/results/COMMAND_DEVICE.json")
    limited = argparse.ArgumentParser(add_help=False)
    limited.add_argument("--time-limit", type=float, metavar="SECONDS", help="starts nothing that would end later")
    limited.add_argument("--suite", choices=suite.SUITES, default="quick")

    running = commands.add_parser("run", parents=[output, limited], help="a suite with every provider")
    running.add_argument("--providers", help=f"comma-separated, of: {', '.join(baselines.BASELINES)}; default all")
    running.add_argument("--repetitions", type=int, default=21, help="samples of each provider and case")
    running.add_argument("--retry", action="store_true", help="measure cases again in which a provider failed")
    running.add_argument("--workers", type=int, default=4, help="threads that compile JAX programs")
    running.add_argument("--ahead", type=int, default=0, metavar="PROCESSES", help="that build every case first")

    comparing = commands.add_parser("compare", help="what changed by more than the spread")
    comparing.add_argument("before", type=Path, metavar="A")
    comparing.add_argument("after", type=Path, metavar="B")

    plotting = commands.add_parser("plot", help="the pictures of files of run and overhead")
    plotting.add_argument("files", type=Path, nargs="+", metavar="FILE")
    plotting.add_argument("--folder", type=Path, default=plots.DOCS, help="where the pictures go; default docs/")
    plotting.add_argument("--png", action="store_true", help="PNG files too")

    commands.add_parser("overhead", parents=[output], help="host time of one call, by the ways to call")

    tuning = commands.add_parser("tune", parents=[output, limited], help="candidates for the tables of plans")
    tuning.add_argument("--operation", choices=tune.candidates.CANDIDATES)
    tuning.add_argument("--n", help="comma-separated row lengths; default those of the suite")
    tuning.add_argument("--dtype", choices=suite.ITEMSIZE)
    tuning.add_argument("--list", action="store_true", help="show the candidates, measure nothing")
    tuning.add_argument("--lower", action="store_true", help="--list, and whether each lowers for CUDA; needs no GPU")

    models = commands.add_parser("parity", parents=[output], help="a causal LM's norms against exact statistics")
    parity_report.parity_options(models)
    speeds = commands.add_parser("model", parents=[output], help="tokens per second of a whole model")
    parity_report.model_options(speeds)

    proving = commands.add_parser("evidence", parents=[common], help="every result file that docs show, step by step")
    proving.add_argument("folder", type=Path, help="where the files go; the same again continues")
    proving.add_argument("--seconds", type=float, default=math.inf, help="begins nothing that would end later")
    proving.add_argument("--steps", help=f"comma-separated, of: {', '.join(step.kind for step in evidence.STEPS)}")

    mixed = commands.add_parser("mixed", parents=[output], help="calls whose dtypes differ, and additions in place")
    mixed.add_argument("--repetitions", type=int, default=31, help="samples of each call")
    for name in README_FIGURES:
        figures = commands.add_parser(name, parents=[common], help="for docs/")
        figures.add_argument("--folder", type=Path, default=results.FOLDER, help="where the result file goes")
    commands.add_parser("readme", help="fills README.md and docs/ from the committed result files")
    return parser


def _subjects(arguments: argparse.Namespace) -> list[tune.Subject]:
    widths = None if arguments.n is None else [int(n) for n in arguments.n.split(",")]
    found = tune.subjects(arguments.suite, operation=arguments.operation, widths=widths, dtype=arguments.dtype)
    if not found:
        raise ValueError(
            f"the suite {arguments.suite} has no such rows (--operation {arguments.operation}, --n {arguments.n}, "
            f"--dtype {arguments.dtype}); pass --suite full or other values"
        )
    return found


def _dispatch(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if command in README_FIGURES:
        print(f"wrote {results.write(command, README_FIGURES[command](), arguments.folder, arguments.commit)}")
    elif command in OF_MODELS:
        try:
            chosen = importlib.import_module(f".{OF_MODELS[command]}", __package__)
        except ModuleNotFoundError as error:
            raise RuntimeError(f"{error.name} is not installed: pip install 'pallas-norm[bench,hf]'") from error
        return chosen.run(arguments)
    elif command == "readme":
        readme.run()
    elif command == "evidence":
        steps = evidence.named(arguments.steps)
        return evidence.run(arguments.folder, commit=arguments.commit, seconds=arguments.seconds, steps=steps)
    elif command == "compare":
        compare.run(arguments.before, arguments.after)
    elif command == "plot":
        plots.run(arguments.files, arguments.folder, png=arguments.png)
    elif command == "overhead":
        return overhead.run(arguments.out or results.default_path("overhead"), commit=arguments.commit)
    elif command == "tune":
        found = _subjects(arguments)
        if arguments.list or arguments.lower:
            return int(tune.show(found, lower=arguments.lower) > 0)
        out = arguments.out or results.default_path("tune")
        return tune.run(found, out, commit=arguments.commit, time_limit_s=arguments.time_limit)
    else:
        out = arguments.out or results.default_path(f"run_{arguments.suite}")
        options = {"commit": arguments.commit, "time_limit_s": arguments.time_limit}
        options |= {"repetitions": arguments.repetitions, "workers": arguments.workers, "retry": arguments.retry}
        options["processes"] = arguments.ahead
        return run.run(arguments.suite, baselines.named(arguments.providers), out, **options)
    return 0


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    # JAX and torch share the GPU here; JAX would take three quarters of its memory at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        return _dispatch(arguments)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if type(error) not in (ValueError, FileNotFoundError, RuntimeError):  # a bug's or a driver's, not a message
            raise
        print(f"python -m bench {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
