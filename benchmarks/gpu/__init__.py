"""One prepared run for a machine with a CUDA card that can be had for minutes: see README.md beside this file."""
