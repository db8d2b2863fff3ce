"""What is on disk: the run folder, metrics, checkpoints. Knows nothing of networks."""
