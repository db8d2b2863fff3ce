"""The homework report's runs as one job: under one folder, one after the other, each an ordinary run of `lowmem train`.

The process that conducts it starts a process for each run and imports no torch: what a run leaves behind in its own
(CUDA's context, the allocator's cache and its fragments, an emulated card's cap) would be in the way of the next plan.
"""
