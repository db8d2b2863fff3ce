"""Metered comparisons: each cell in a clean process, the median of several steps with its spread."""

from lowmem.bench.suite import COLUMNS, Cell, Measurement, cells, measure, to_markdown

__all__ = ["COLUMNS", "Cell", "Measurement", "cells", "measure", "to_markdown"]
