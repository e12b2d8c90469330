"""python -m bench times|accuracy|training measures on this machine's GPU and writes a result file; `readme` renders
them."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import accuracy, readme, results, times, training


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=["times", "accuracy", "training", "readme"])
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="where the result file goes")
    parser.add_argument("--commit", help="of the tree that runs, where it is no checkout")
    arguments = parser.parse_args()
    if arguments.what == "readme":
        readme.run()
        return
    rows = {"times": times.run, "accuracy": accuracy.run, "training": training.run}[arguments.what]()
    path = results.write(arguments.what, rows, arguments.folder, arguments.commit)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
