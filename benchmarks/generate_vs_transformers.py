"""Decode and prefill speed against transformers, in one process, in turns, on the same weights.

    python benchmarks/generate_vs_transformers.py CKPT [--dtype bfloat16] [--rounds 5]

CKPT is a text checkpoint in the HF layout that both can load. Prints the median tokens a second of each and the
median of the ratios, round by round: the rounds alternate, so that a machine whose speed drifts drifts for both.
"""

import argparse
import os
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from checkpoint import Checkpoint, fill
from config import read_config
from engine import Engine, Request
from model import MistralMedium
from tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    config, checkpoint = read_config(args.ckpt), Checkpoint(args.ckpt)
    ours = MistralMedium(config, dtype=dtype)
    ours.join()
    fill(ours, checkpoint)
    ours.pack()
    theirs = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=dtype).eval()
    short = torch.randint(100, config.vocab_size, (1, 16)).tolist()[0]
    long = torch.randint(100, config.vocab_size, (1, args.prompt_tokens)).tolist()[0]

    tokenizer = load_tokenizer(args.ckpt)
    tokenizer.eos_id = -1  # neither side may end early

    def our_run(prompt, count):
        engine = Engine(ours, tokenizer.eos_id, config.max_position_embeddings)
        started = time.perf_counter()
        (answer,) = engine.generate([Request(prompt, max_new_tokens=count)])
        assert len(answer.tokens) == count
        return time.perf_counter() - started

    def their_run(prompt, count):
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        assert out.shape[1] == len(prompt) + count
        return time.perf_counter() - started

    for name, prompt, count, tokens in (
        ("decode", short, args.new_tokens + 1, args.new_tokens),
        ("prefill", long, 1, args.prompt_tokens),
    ):
        rows = []
        for _ in range(args.rounds + 1):
            times = []
            for run in (our_run, their_run):
                once = run(short, 1) if name == "decode" else 0.0  # decode alone: without the short prompt's pass
                times.append(run(prompt, count) - once)
            rows.append(times)
        rows = rows[1:]  # the first round warms both up
        mine, other = (statistics.median(tokens / row[i] for row in rows) for i in (0, 1))
        ratio = statistics.median(row[1] / row[0] for row in rows)
        print(
            f"{name}: {mine:.1f} tokens/s here, {other:.1f} transformers, ratio {ratio:.2f} (median of {args.rounds})"
        )


if __name__ == "__main__":
    main()
