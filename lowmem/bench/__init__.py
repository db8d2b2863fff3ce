"""Metered comparisons: each cell in a clean process, the median of several steps with its spread."""
