"""Training a run. `loop.Trainer` is the run in this process: a `replica.Replica` (network, optimizer, step, batches,
plan, state) with the loop over its epochs. The loop asks `watchers` and `loss_watchers` for verdicts and acts on the
strongest; `metrics` counts and writes rows; `oom_fallback` goes down the plan's ladder."""
