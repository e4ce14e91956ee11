"""Training speed against transformers with torch's Adam, in one process, in turns, on the same weights and batches.

    python benchmarks/train_vs_transformers.py CKPT [--dtype float32] [--rounds 5] [--answer-tokens 40]

CKPT is a text checkpoint in the HF layout that both can load. A round is one step of each, with the same micro-batches:
forward, backward, clipping, Adam. Prints losses, the median tokens a second of each, and the median of the ratios;
rounds alternate, so that a machine whose speed drifts drifts for both. transformers computes logits for all tokens;
train.py for those only that an assistant wrote, so that the share of these matters: measure more than one.
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train
from data import IGNORE
from parallel import find_place


def write_chats(path: str, count: int, question_tokens: int, answer_tokens: int) -> None:
    """Chats of English-like words; a word is about 1.3 tokens."""
    draw = random.Random(0)
    words = "the a of heart scan shows left right image patient what is seen in with and large small mass lung".split()
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            texts = [" ".join(draw.choices(words, k=n)) for n in (question_tokens, answer_tokens)]
            roles = zip(("user", "assistant"), texts)
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in roles]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--question-tokens", type=int, default=200)
    parser.add_argument("--answer-tokens", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "chats.jsonl")
        batch_size = args.micro_batch_size * args.micro_batches
        write_chats(data, batch_size * args.rounds, args.question_tokens, args.answer_tokens)
        argv = ["--ckpt", args.ckpt, "--data", data, "--out", folder, "--dtype", args.dtype]
        argv += ["--micro-batch-size", str(args.micro_batch_size), "--global-batch-size", str(batch_size)]
        ours = train.Trainer(train.parse_args(argv), find_place(1, 1))
        measure(args, ours)


def measure(args: argparse.Namespace, ours: train.Trainer) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype)).train()
    theirs.to(ours.place.device)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-5)
    speeds, pad = {"train.py": [], "transformers": []}, ours.tokenizer.pad_id or 0
    for step in range(1, args.rounds + 1):
        prepared = ours.prepare_step(step)
        line = ours.step(step, prepared)

        started, total = time.perf_counter(), 0.0
        count = sum(int((batch.targets != IGNORE).sum()) for batch in prepared[0])
        for batch in prepared[0]:
            # transformers shifts the labels itself, so it gets the last token too.
            ids = torch.nn.functional.pad(batch.tokens, (0, 1), value=pad).to(ours.place.device)
            labels = torch.nn.functional.pad(batch.targets, (1, 0), value=IGNORE).to(ours.place.device)
            ids = torch.where(labels == IGNORE, ids, labels)
            labels = labels.masked_fill(labels == IGNORE, -100)
            mask = (ids != pad).long()
            loss = theirs(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        speeds["train.py"].append(line["tokens_per_s"])
        speeds["transformers"].append(sum(batch.length for batch in prepared[0]) / seconds)
        print(
            f"step {step}: loss {line['loss']:.5f} and {total:.5f}, {count} targets of "
            f"{sum(batch.length for batch in prepared[0])} tokens, "
            + ", ".join(f"{name} {values[-1]:.0f} tokens/s" for name, values in speeds.items())
        )
    ratios = [a / b for a, b in zip(*speeds.values())]
    for name, values in speeds.items():
        print(f"{name}: median {statistics.median(values):.1f} tokens/s")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
