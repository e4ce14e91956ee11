#!/usr/bin/env bash
# Makes the small checkpoint: data, training from random weights, FP8, and a measurement.
#
#     bash examples/train_tiny.sh OUT
#
# OUT/tiny is the checkpoint. SEED makes another one; CHATS and HELD_OUT make it smaller; PROCESSES is how many cores.
set -euo pipefail
out=$(realpath -m "${1:?say where to: bash examples/train_tiny.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=$out/data seed=${SEED:-0}

[ -d "$data" ] || {
    rm -rf "$data.partial"
    python examples/shapes.py "$data.partial" --chats "${CHATS:-280000}" --held-out "${HELD_OUT:-1000}" --seed "$seed"
    mv "$data.partial" "$data"
}

# One epoch in the order of the file. Many small steps teach faster than few large ones; BF16 is hardly faster than FP32
# for matrices as small as these, and two processes are faster than two threads. Called again, it goes on where it was.
OMP_NUM_THREADS=1 torchrun --nproc-per-node "${PROCESSES:-2}" train.py --init "$data/start/config.json" \
    --tokenizer "$data/start" --data "$data/train.jsonl" --out "$out/run" --no-shuffle --global-batch-size 8 \
    --micro-batch-size 4 --dtype float32 --seed "$seed" --resume --lr 7e-4 --min-lr 1e-5 --warmup-steps 200 \
    --betas 0.9 0.98

rm -rf "$out/tiny"
python fp8.py "$out/run/model" "$out/tiny" --calibrate "$data/calibrate.jsonl"
python examples/evaluate.py "$data" --ckpt "$out/tiny" --batch-size 64
