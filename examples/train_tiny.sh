#!/usr/bin/env bash
# Makes the small checkpoint: data, training from random weights, FP8, and a measurement.
#
#     bash examples/train_tiny.sh OUT
#
# OUT/tiny is the checkpoint. One process, on all cores; SEED makes another one; CHATS and HELD_OUT make it smaller. The
# one in examples/tiny was trained for longer, and with data that changed: its README says how, and what this makes.
set -euo pipefail
out=$(realpath -m "${1:?say where to: bash examples/train_tiny.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=$out/data seed=${SEED:-0}

[ -d "$data" ] || {
    rm -rf "$data.partial"
    python examples/shapes.py "$data.partial" --chats "${CHATS:-128000}" --held-out "${HELD_OUT:-1000}" --seed "$seed"
    mv "$data.partial" "$data"
}

# One epoch in the order of the file. Many small steps teach faster than few large ones; BF16 is no faster than FP32 for
# matrices as small as these. Called again, it goes on where it stopped.
train() {
    python train.py "$@" --no-shuffle --global-batch-size 8 --micro-batch-size 8 --dtype float32 --seed "$seed" \
        --resume --min-lr 1e-5 --warmup-steps 60 --betas 0.9 0.98
}
train --init "$data/start/config.json" --tokenizer "$data/start" --data "$data/train.jsonl" --out "$out/first" --lr 5e-4
# A second part with a learning rate that is high once more. What is learned last, to find the thing that a word names,
# was learned in it in one of three runs; until then corners and sides are hardly more than guessed.
train --ckpt "$out/first/model" --data "$data/second.jsonl" --out "$out/run" --lr 4e-4

rm -rf "$out/tiny"
python fp8.py "$out/run/model" "$out/tiny" --calibrate "$data/calibrate.jsonl"
python examples/evaluate.py "$data" --ckpt "$out/tiny" "$out/run/model" --batch-size 64
