"""Real processes, started by torchrun, on the loopback interface."""
