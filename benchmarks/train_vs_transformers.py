"""Training speed against transformers with torch's Adam, in one process, in turns, on the same weights and batches.

    python benchmarks/train_vs_transformers.py [--dtype float32] [--rounds 5] [--question-words 60 --answer-words 12]

The model has random weights and the sizes of SmolLM2-135M, with ten of its thirty layers unless --layers says so. A
round is one step of each, with the same micro-batches: forward, backward, clipping, Adam. Rounds alternate, so that a
machine whose speed drifts drifts for both; where other programs compete for its cores, look at the ratio of CPU
seconds, with OMP_NUM_THREADS=1.
transformers computes logits for all tokens, train.py for those only that an assistant wrote, so that the share of these
matters: measure more than one.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from helpers import text_fields  # noqa: E402
from train_cases import make_checkpoint  # noqa: E402

import train  # noqa: E402
from config import parse_config  # noqa: E402
from launch import find_place  # noqa: E402
from pipeline import IGNORE  # noqa: E402

SIZES = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, max_position_embeddings=8192,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e6, original_max_position_embeddings=8192, llama_4_scaling_beta=0.0
    ),
)  # fmt: skip


def write_chats(path: str, count: int, question_words: int, answer_words: int) -> None:
    draw = random.Random(0)
    words = "the a of heart scan shows left right image patient what is seen in with and large small mass lung".split()
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            texts = [" ".join(draw.choices(words, k=n)) for n in (question_words, answer_words)]
            roles = zip(("user", "assistant"), texts)
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in roles]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--question-words", type=int, default=60)
    parser.add_argument("--answer-words", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "chats.jsonl")
        batch_size = args.micro_batch_size * args.micro_batches
        write_chats(data, batch_size * args.rounds, args.question_words, args.answer_words)
        ckpt = make_checkpoint(
            os.path.join(folder, "ckpt"), parse_config(text_fields(num_hidden_layers=args.layers, **SIZES))
        )
        argv = ["--ckpt", ckpt, "--data", data, "--out", folder, "--dtype", args.dtype, "--min-lr", "1e-5"]
        argv += ["--micro-batch-size", str(args.micro_batch_size), "--global-batch-size", str(batch_size)]
        ours = train.Trainer(train.parse_args(argv), find_place(1, 1))
        measure(args, ours, ckpt)


def measure(args: argparse.Namespace, ours: train.Trainer, ckpt: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(ckpt, dtype=getattr(torch, args.dtype)).train()
    theirs.to(ours.place.device)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-5)
    speeds, pad = {"train.py": [], "transformers": []}, ours.tokenizer.pad_id or 0
    cpu_ratios = []
    for step in range(1, args.rounds + 1):
        upcoming = ours.upcoming(step)
        our_cpu = time.process_time()
        line = ours.step(step, upcoming)
        our_cpu = time.process_time() - our_cpu

        started, their_cpu, total = time.perf_counter(), time.process_time(), 0.0
        count = sum(int((batch.targets != IGNORE).sum()) for batch in upcoming[0])
        for batch in upcoming[0]:
            # transformers shifts the labels itself, so it gets the last token too.
            ids = torch.nn.functional.pad(batch.tokens, (0, 1), value=pad).to(ours.place.device)
            labels = torch.nn.functional.pad(batch.targets, (1, 0), value=IGNORE).to(ours.place.device)
            ids = torch.where(labels == IGNORE, ids, labels)
            labels = labels.masked_fill(labels == IGNORE, -100)
            mask = (ids != pad).long()
            loss = theirs(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        cpu_ratios.append((time.process_time() - their_cpu) / our_cpu)
        speeds["train.py"].append(line["tokens_per_s"])
        speeds["transformers"].append(sum(batch.length for batch in upcoming[0]) / seconds)
        print(
            f"step {step}: loss {line['loss']:.5f} and {total:.5f}, {count} targets of "
            f"{sum(batch.length for batch in upcoming[0])} tokens, "
            + ", ".join(f"{name} {values[-1]:.0f} tokens/s" for name, values in speeds.items())
            + f", CPU seconds {cpu_ratios[-1]:.2f} : 1",
            flush=True,
        )
    ratios = [a / b for a, b in zip(*speeds.values())]
    for name, values in speeds.items():
        print(f"{name}: median {statistics.median(values):.1f} tokens/s")
    for name, values in (("speed", ratios), ("CPU seconds", cpu_ratios)):
        print(f"ratio of {name}: median {statistics.median(values):.2f}, from {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
