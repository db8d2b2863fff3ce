"""Executes a finished plan: the step, the loop over epochs, signals. Decides nothing about memory."""
