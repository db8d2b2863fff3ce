#!/bin/sh
# The report's six networks at width 16 on a fixed 10,000-picture subset: what the report found, small enough for two
# CPU cores (about half an hour; the two halves run side by side, one core each). Repeating it goes on where it stopped.
#
#   benchmarks/small_report.sh PICTURES OUT      PICTURES: a folder with train/<class>/* and test/<class>/*
set -eu
pictures=$1
out=$2

one() {
    if [ -d "$out/$1" ]; then
        lowmem resume "$out/$1"
    else
        lowmem train --arch "$1" --block basic --width 16 --data "folder:$pictures" --epochs 12 --precision amp \
            --set data.train_subset=10000 --set data.test_subset=2000 --out "$out/$1"
    fi
}

export OMP_NUM_THREADS=1
for depth in 110 56 20; do one "res$depth"; done &
for depth in 110 56 20; do one "cnn$depth"; done
wait
lowmem report "$out"/res* "$out"/cnn* --out "$out/report"
