"""A run from its beginning to its end. The route of `lowmem train`, each room entered once, downward only:

`cli` turns flags into settings; `lifecycle.execute` takes them the rest of the way, as it takes a resume and a fork:
1. `distributed`: the processes that torchrun has started join, and are one group from now on; one process is one, too.
2. `begin` (here) makes one value of new, resume or fork: the settings as they are asked for, resolved with `config`,
   what the run has recorded, read from `runs`, and a checkpoint that belongs to it.
3. `data` gives the pictures.
4. `choose` decides, once, what is trained: precision, batch, and a plan, by what `simulate` predicts and `calibrate`
   has measured; `trial` tries it in a process of its own if that is wanted. An unplanned run comes through unchanged.
5. `begin` makes the folder, or goes on in the one there is, under its lock.
6. `train` puts network, optimizer and batches together, and takes the state from the checkpoint.
7. `begin` commits: preflight and the first checkpoint; or rows cut back; or rows and state carried over.
8. `train` trains, a step at a time (`step`, which runs the network by `remat`), and saves with `runs`.

What goes wrong before 7 leaves nothing behind; after it the run can be resumed, whatever happens.
"""
