"""Several processes training one network: what torch.distributed does for a run, and nothing of its own beside it.

launch.py    how this process was started (by torchrun, or alone)
group.py     what the processes say to each other, and which pictures of the effective batch each takes
reducer.py   the sum of their gradients, during the backward pass
"""
