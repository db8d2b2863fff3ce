"""The command line: parsing and printing only. Nothing here imports torch before a command runs (invariant 11)."""
