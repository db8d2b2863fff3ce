"""The shipped recipes against each other at equal epochs: Res20, thin, on a part of the CIFAR-10 pictures.

    python benchmarks/recipes.py PICTURES RUNS [--epochs 10] [--train 4000] [--test 2000] [--width 8] [--seeds 0 1 2]

PICTURES: a folder with train/<class>/* and test/<class>/*; RUNS: where the runs are kept: those that are finished stay,
others go on where they stopped. A seed decides initial weights, order and augmentation, and which pictures are trained
and tested on, the same for both recipes; the runs take turns. Writes `results/recipes.json` and `.md` beside this file
and prints the table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from conditions import RESULTS, conditions, sentence, table, write

from lowmem.runs.view import RunView

RECIPES = ("report", "modern")


def train(recipe: str, seed: int, pictures: Path, out: Path, args: argparse.Namespace) -> RunView:
    """The run, finished. Raises CalledProcessError."""
    shape = f"--arch res20 --width {args.width} --epochs {args.epochs} --precision amp"
    begin = f"train --recipe {recipe} --seed {seed} {shape}".split()
    subsets = [f"--set=data.train_subset={args.train}", f"--set=data.test_subset={args.test}", *args.set]
    new = [*begin, f"--data=folder:{pictures}", *subsets, f"--out={out}"]
    if not out.exists() or RunView(out).state != "finished":
        command = ["resume", str(out)] if out.exists() else new
        subprocess.run([sys.executable, "-m", "lowmem", *command], check=True)
    return RunView(out)


def row(recipe: str, runs: list[RunView]) -> dict[str, object]:
    """Errors on the test pictures at the end, one a seed, and what they are together."""
    ends = [run.epochs[-1] for run in runs]
    errors = [end.test_error_pct for end in ends]
    return {
        "recipe": recipe,
        "test_error_pct": errors,
        "mean_pct": statistics.mean(errors),
        "deviation_pct": statistics.stdev(errors) if len(errors) > 1 else None,
        "train_loss": [end.train_loss for end in ends],
        "elapsed_seconds": [end.elapsed_seconds for end in ends],
        "errors_by_epoch": [[epoch.test_error_pct for epoch in run.epochs] for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("runs", type=Path)
    for name, default in (("epochs", 10), ("train", 4000), ("test", 2000), ("width", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--set", action="append", default=[], type="--set={}".format)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[str, list[RunView]] = {recipe: [] for recipe in args.recipes}
    where = conditions() | {
        "command": "python benchmarks/recipes.py PICTURES RUNS"
    }  # where they lie is nobody's business
    for seed in args.seeds:
        for recipe in args.recipes:
            out = args.runs / f"{Path(recipe).stem}-{seed}"
            found[recipe].append(train(recipe, seed, args.pictures, out, args))
    rows = [row(recipe, runs) for recipe, runs in found.items()]
    text = describe(rows, args, sentence(where))
    write(args.results, "recipes", {"conditions": where, "shape": shape(args), "rows": rows}, text)
    print(text)


def shape(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in ("width", "epochs", "train", "test", "seeds")}


def describe(rows: list[dict[str, object]], args: argparse.Namespace, where: str) -> str:
    cells = []
    for one in rows:
        errors, spread = one["test_error_pct"], one["deviation_pct"]
        assert isinstance(errors, list)
        each = ", ".join(f"{error:.2f}" for error in errors)
        deviation = "" if spread is None else f" ± {spread:.2f}"
        cells.append([str(one["recipe"]), f"{one['mean_pct']:.2f} %{deviation}", each])
    return (
        "# Recipes against each other\n\n"
        f"Res20 of width {args.width}, {args.train:,} training and {args.test:,} test pictures of CIFAR-10 (JPEG "
        f"files), {args.epochs} epochs, mixed precision (bf16), all else as the recipes have it. Test error at the end:"
        " mean ± standard deviation over the seeds, and each of them. A seed also chooses the pictures, the same for "
        "both. The network is thin and the steps are few: this says nothing of width 64 and all pictures.\n\n"
        + table(["recipe", "test error", "seeds"], cells)
        + f"\n{where}\n"
    )


if __name__ == "__main__":
    main()
