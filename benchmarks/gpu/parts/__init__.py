"""What each part does, in its own process: `python -m benchmarks.gpu.parts PART QUESTIONS ACCOUNT ARTEFACTS SECONDS`.

None of them uses the card itself: what needs it is asked in clean processes, so that there is no second context."""
