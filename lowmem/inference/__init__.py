"""What a trained network is used for: loaded with the way its pictures are prepared, and taken elsewhere."""

from lowmem.inference.loading import LoadedRun, load_run

__all__ = ["LoadedRun", "load_run"]
