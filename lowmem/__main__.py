"""`python -m lowmem` is `lowmem`; this form is what torchrun starts."""

from lowmem.cli.main import main

if __name__ == "__main__":
    main()
