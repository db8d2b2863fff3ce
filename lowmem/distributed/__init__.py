"""Several processes training one network: what torch.distributed does for a run, and nothing of its own beside it."""

from lowmem.distributed.group import Group, PeerLost, join
from lowmem.distributed.launch import Launch
from lowmem.distributed.reducer import Reducer
from lowmem.distributed.split import Split, even_shares

__all__ = ["Group", "Launch", "PeerLost", "Reducer", "Split", "even_shares", "join"]
