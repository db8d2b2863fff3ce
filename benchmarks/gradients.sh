#!/bin/sh
# Why the plain net of 110 layers fails: the gradient norms of CNN110 and Res110 at width 8, on a fixed subset of 3,000
# pictures, for five epochs of the homework report's schedule (about three minutes on two CPU cores, one each).
#
#   benchmarks/gradients.sh PICTURES OUT      PICTURES: a folder with train/<class>/* and test/<class>/*
set -eu
pictures=$1
out=$2

one() {
    lowmem train --arch "$1" --block basic --width 8 --data "folder:$pictures" --batch 64 --set train.max_steps=235 \
        --set data.train_subset=3000 --set data.test_subset=500 --out "$out/$1" >"$out/$1.txt" 2>&1
}

export OMP_NUM_THREADS=1
mkdir -p "$out"
one res110 &
one cnn110
wait
lowmem report "$out/res110" "$out/cnn110" --out "$out/report"
