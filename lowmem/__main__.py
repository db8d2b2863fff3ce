"""`lowmem`, and `python -m lowmem`, which is the form that torchrun starts."""

from typing import NoReturn

from lowmem.cli.interrupts import leaves_at_once


def main() -> NoReturn:
    """The command line."""
    with leaves_at_once():
        from lowmem.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
