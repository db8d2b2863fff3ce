#!/bin/sh
# What the homework report found, small enough for two CPU cores: its six networks and the two that its author could not train, at
# width 16 on a fixed subset of the pictures, as one job of `lowmem reproduce`. Repeating the command goes on where it
# stopped. With RESULTS, what is committed is copied there at the end.
#
#   benchmarks/small_report.sh PICTURES OUT [RESULTS]     PICTURES: a folder with train/<class>/* and test/<class>/*
set -eu
pictures=$1
out=$2
results=${3:-}

lowmem reproduce --out "$out" --block bottleneck --width 16 --epochs 8 --batch 64 --precision amp \
    --data "folder:$pictures" --set data.train_subset=4000 --set data.test_subset=1000

[ -n "$results" ] || exit 0
mkdir -p "$results/runs"
cp "$out"/report/*.md "$out"/report/*.png "$results"
for run in "$out"/*/config.yaml; do
    run=$(dirname "$run")
    copy=$results/runs/$(basename "$run")
    mkdir -p "$copy"
    for name in config.yaml env.json metrics.csv steps.csv events.jsonl; do
        # Where the pictures are is nobody's business.
        sed "s|folder:$pictures|folder:cifar|g" "$run/$name" >"$copy/$name"
    done
done
