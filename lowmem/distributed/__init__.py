"""Several processes training one network: what torch.distributed does for a run, and nothing of its own beside it."""
