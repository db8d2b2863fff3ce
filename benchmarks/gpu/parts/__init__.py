"""What each part does, in its own process: `python -m benchmarks.gpu.parts`, as `benchmarks.gpu.run` starts it.

None of them uses the card itself: what needs it is asked in clean processes, so that there is no second context."""
