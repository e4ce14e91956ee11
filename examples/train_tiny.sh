#!/usr/bin/env bash
# Makes the small checkpoint: data, training from random weights, FP8, and a measurement.
#
#     bash examples/train_tiny.sh OUT
#
# OUT/tiny is the checkpoint. Two processes on two cores; CHATS, ADVANCED, HELD_OUT, PROCESSES make it smaller or wider.
set -euo pipefail
out=$(realpath -m "${1:?say where to: bash examples/train_tiny.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
data=$out/data

[ -d "$data" ] || {
    rm -rf "$data.partial"
    python examples/shapes.py "$data.partial" --chats "${CHATS:-110000}" --advanced "${ADVANCED:-44000}" \
        --held-out "${HELD_OUT:-500}"
    mv "$data.partial" "$data"
}

# One epoch in the order of the file. Many small steps teach faster than few large ones; BF16 is not faster than FP32 on
# CPUs without matrix units. Called again, it goes on where it stopped.
train() {
    torchrun --standalone --nproc-per-node "${PROCESSES:-2}" train.py "$@" --resume --save-every 1000 \
        --no-shuffle --epochs 1 --global-batch-size 8 --micro-batch-size 4 --dtype float32 --betas 0.9 0.98
}
train --init "$data/start/config.json" --tokenizer "$data/start" --data "$data/train.jsonl" --out "$out/first" \
    --lr 5e-4 --min-lr 2e-5 --warmup-steps 60
train --ckpt "$out/first/model" --data "$data/advanced.jsonl" --out "$out/advanced" \
    --lr 3e-4 --min-lr 1e-5 --warmup-steps 60

rm -rf "$out/tiny"
python fp8.py "$out/advanced/model" "$out/tiny" --calibrate "$data/calibrate.jsonl"
python examples/evaluate.py "$data" --ckpt "$out/tiny" --by-kind
