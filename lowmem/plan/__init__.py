"""Decides what is kept and what is computed again. Pure: no torch, no card, no files."""
