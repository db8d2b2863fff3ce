"""Where pictures come from, and how they reach the network: `load` a `Dataset`, draw `TrainBatches` from it.

Every choice made here (subset, order, crop, flip) is a function of an address, see `lowmem.core.counter_rng`
(invariant 3).
"""

from lowmem.data.batches import TrainBatches, eval_batches
from lowmem.data.load import load
from lowmem.data.pictures import Dataset, Pictures

__all__ = ["Dataset", "Pictures", "TrainBatches", "eval_batches", "load"]
