"""The command line: `python -m benchmarks.gpu prepare | run | collect | rehearse | train`; see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.job import select
from lowmem.core.errors import LowmemError


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 if a part did not do what it should."""
    asked = _parser().parse_args(arguments)
    try:
        return int(asked.do(asked) or 0)
    except LowmemError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return int(error.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="plans and questions, where there is no card; and the missing wheels")
    prepare.add_argument("--out", type=Path, required=True, help="folder of the job")
    prepare.add_argument("--present", type=Path, help="what the card's machine has: its `pip list` in a file")
    prepare.set_defaults(do=_prepare)

    run = commands.add_parser("run", help="the parts, on the machine with the card")
    run.add_argument("--prepared", type=Path, required=True, help="folder that `prepare` made")
    run.add_argument(
        "--out", type=Path, required=True, help="folder of the results; what is done there is not repeated"
    )
    run.add_argument("--minutes", type=float, default=9.0, help="limit of all parts together (9)")
    run.add_argument("--parts", help="some parts only, with commas between")
    run.set_defaults(do=_run)

    collect = commands.add_parser("collect", help="keep what came back of a card in benchmarks/results/gpu-CARD")
    collect.add_argument("folders", type=Path, nargs="+", help="what `run` and `train` wrote")
    collect.set_defaults(do=_collect)

    train = commands.add_parser("train", help="a network of the homework report, as many epochs as fit")
    train.add_argument(
        "--network", default="next", help="like res110 or res110-bottleneck; next: the first not finished"
    )
    train.add_argument(
        "--pictures", type=Path, required=True, help="archive, or folder, of train/CLASS/* and test/CLASS/*"
    )
    train.add_argument("--out", type=Path, required=True, help="folder of what is to be kept; goes on from what it has")
    train.add_argument("--minutes", type=float, default=9.0, help="limit of this call (9)")
    train.add_argument("--epochs", type=int, help="instead of as many as fit")
    train.add_argument("--width", type=int, default=64, help="channels of the stem (64, the homework report's)")
    train.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    train.set_defaults(do=_train)

    rehearse = commands.add_parser("rehearse", help="all of it on the CPU, with small networks")
    rehearse.add_argument("--out", type=Path, required=True, help="folder of everything, summary.json last")
    rehearse.add_argument("--quick", action="store_true", help="under three minutes on two cores")
    rehearse.set_defaults(do=_rehearse)
    return parser


def _prepare(asked: argparse.Namespace) -> None:
    from benchmarks.gpu import wheels
    from benchmarks.gpu.plans import ON_CARD
    from benchmarks.gpu.prepare import prepare

    present = wheels.PRESENT if asked.present is None else asked.present.read_text(encoding="utf-8")
    lacking = wheels.missing(wheels.names_of(present))
    prepare(asked.out, ON_CARD)
    print(f"prepared: {asked.out}")
    if lacking:
        print(f"wheels for the machine, beside the job:\n{wheels.download_command(lacking, str(asked.out / 'wheels'))}")


def _run(asked: argparse.Namespace) -> int:
    from benchmarks.gpu.run import conduct

    return _judged(conduct(asked.prepared, asked.out, select(asked.parts), asked.minutes))


def _collect(asked: argparse.Namespace) -> None:
    from benchmarks.gpu.collect import collect

    print(f"written: {collect(asked.folders)}")


def _train(asked: argparse.Namespace) -> int:
    from benchmarks.gpu.train import Turn, take

    record = take(
        Turn(
            network=asked.network,
            pictures=asked.pictures,
            out=asked.out,
            minutes=asked.minutes,
            device=asked.device,
            width=asked.width,
            epochs=asked.epochs,
        )
    )
    if record is None:
        print("nothing left to do: finished already")
        return 0
    print(
        f"{record['network']}: {record['epochs_done']} of {record['epochs']} epochs, {record['test_error_pct']} % wrong"
    )
    return 0 if record["finished"] else 1


def _rehearse(asked: argparse.Namespace) -> int:
    from benchmarks.gpu.rehearse import rehearse

    return _judged(rehearse(asked.out, asked.quick))


def _judged(wrong: list[str]) -> int:
    print("\n".join(wrong) or "every part did what it should")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
