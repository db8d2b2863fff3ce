"""What only a card can tell of the library, each in a clean process: `python -m benchmarks.gpu.probes`, a question as
JSON on standard input, one JSON line out.

A question names the probe, the device and the environment that it wants: variables to set (or, null, to unset) before
torch is loaded. On the CPU the same code runs as far as there is anything to see; what is left out says so.
"""
