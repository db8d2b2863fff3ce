"""A run from its beginning to its end. The route of `lowmem train`, twelve rooms, each called from above it only:

 1. `cli` makes settings of flags, by the schema and the order of precedence in 2. `config`, and calls
 3. `lifecycle`: `execute` takes a new run, a resume or a fork (`begin`) the same way, in this order. In
 4. `distributed` the processes that torchrun has started become one group; one process is a group of one.
    `begin` opens: it makes one value of new, resume or fork, the settings as they are asked for, with what is recorded.
 5. `data` gives the pictures.
 6. `choose` decides once what is trained, precision, batch and plan, by what 7. `simulate` predicts and what
 8. `calibrate` has measured; 9. `trial` tries it in a process of its own. A run without a budget passes through.
10. `train` puts network, optimizer and batches together.
    `begin` commits: preflight and the first checkpoint; or rows cut back; or rows and state carried over. Then
    `train` trains, by 11. `step`, and saves by 12. `runs`, which keeps the folder under its lock.
Before the commit whatever goes wrong leaves nothing behind; after it the run can be resumed, whatever happens.
"""
