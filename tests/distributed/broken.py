"""The command, with a bug in process 1: in its sixth step, when its backward pass is at stage 3."""

from __future__ import annotations

import os
import sys

from lowmem.cli.main import main
from lowmem.train.loop import Trainer

make = Trainer.__init__


def broken(self: Trainer, *arguments: object, **named: object) -> None:
    make(self, *arguments, **named)  # type: ignore[arg-type]
    assert self.planned is not None
    done = self.planned.lowmem.stage_done
    assert done is not None

    def stage_done(index: int) -> None:
        if os.environ["RANK"] == "1" and self.state.step == 5 and index == 3:
            raise ValueError("stage 3 is broken")
        done(index)

    self.planned.lowmem.stage_done = stage_done


if __name__ == "__main__":
    Trainer.__init__ = broken  # type: ignore[method-assign]
    main(sys.argv[1:])
