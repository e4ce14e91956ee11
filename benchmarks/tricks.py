"""What each trick gains that only makes a CPU faster: the same model with and without it, in turns.

    python benchmarks/tricks.py CKPT [--rounds 5]

CKPT is a text checkpoint in the HF layout; BF16. A ratio above 1 is what the trick gains.
"""

import argparse
import copy
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from compare import Ours, Table

import fp8
import generate
import model
import vision

SHAPES = {"decode": (1, 16, 64), "decode 16 rows": (16, 20, 32), "prefill 16 x 20": (16, 20, 2)}  # rows, tokens, new
SHAPES |= {"prefill 1024": (1, 1024, 2), "prefill 4000": (1, 4000, 2)}


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`model.attend` with a mask where a chunk has others before it."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    mask = None if S == T else torch.ones(T, S, dtype=torch.bool).tril_(S - T)
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table, packed, plain = Table(args.rounds), Ours(args.ckpt, torch.bfloat16), Ours(args.ckpt, torch.bfloat16)
    plain.model.pack = lambda: None
    draw, vocabulary = torch.Generator().manual_seed(0), packed.model.config.vocab_size
    prompts = {name: torch.randint(vocabulary, shape[:2], generator=draw).tolist() for name, shape in SHAPES.items()}

    def run(side: Ours, name: str, title: str, without) -> dict[str, float]:
        rows, size, count = SHAPES[name]
        with without:
            prefill, decode = side.generate(prompts[name], count)
        return {f"{title}: {name}": rows * (count - 1) / decode if "decode" in name else rows * size / prefill}

    for title, without, names in (
        ("steps as graphs", (fp8, "PATIENCE", 1 << 60), ("decode", "decode 16 rows")),
        ("weights in the kernels' layout", None, ("decode", "decode 16 rows", "prefill 1024")),
        ("norms as layer norms", (vision, "FEW_ROWS", 0), ("decode", "decode 16 rows", "prefill 16 x 20")),
        ("the head's weight on the left", (fp8, "LEFT_ROWS", 0), ("decode",)),
        ("short prompts together", (model, "SHORT", 0), ("prefill 16 x 20",)),
        ("a chunk and what is before it apart", (model, "attend", masked), ("prefill 4000",)),
    ):
        for name in names:
            patch, other = (mock.patch.object(*without), copy.copy(packed)) if without else (nullcontext(), plain)
            other.engine = generate.Engine(other.model, -1, packed.engine.max_context)  # with graphs of its own
            runs = {"with": lambda n=name, t=title: run(packed, n, t, nullcontext())}
            runs["without"] = lambda n=name, t=title, o=other, p=patch: run(o, n, t, p)
            table.measure("tokens/s", runs)


if __name__ == "__main__":
    main()
