"""What each trick of `runtime/cpu.py` gains: the same model with and without it, in turns.

    python benchmarks/tricks.py CKPT [--rounds 5]

CKPT is a text checkpoint in the HF layout; BF16. A ratio above 1 is what the trick gains.
"""

import argparse
import time

import torch
from compare import Ours, Table

import model
from runtime import cpu

SHAPES = {"decode": (1, 16, 64), "decode 16 rows": (16, 20, 32)}  # rows, tokens, new
SHAPES |= {"prefill 1024": (1, 1024, 2), "prefill 4000": (1, 4000, 2)}


def without_graphs(side: Ours) -> None:
    side.model.forward.traces = False


def without_layouts(side: Ours) -> None:
    """Neither weights in the kernels' layout nor, since those are their inputs, graphs."""
    side.model.__dict__.pop("forward")
    for module in side.model.modules():
        module.__dict__.pop("multiply", None)


def with_masks(side: Ours) -> None:
    side.model.attention = model.attend


def training_attention(config: model.Config, dtype: torch.dtype, table: Table) -> None:
    """Forward and backward passes of all layers' attention, for eight samples of 112 tokens."""
    name = f"attention by products, 8 x 112, {str(dtype).removeprefix('torch.')}"
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(8, n, 112, config.head_dim, dtype=dtype, requires_grad=True) for n in heads)

    def run(attention) -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(config.num_hidden_layers):
            attention(q, k, v).backward(q.detach())
        return {name: time.perf_counter() - started}

    table.measure("s", {"with": lambda: run(cpu.attend_fast), "without": lambda: run(model.attend)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table, usual = Table(args.rounds), Ours(args.ckpt, torch.bfloat16)
    draw, vocabulary = torch.Generator().manual_seed(0), usual.model.config.vocab_size
    prompts = {name: torch.randint(vocabulary, shape[:2], generator=draw).tolist() for name, shape in SHAPES.items()}

    def run(side: Ours, name: str, title: str) -> dict[str, float]:
        rows, size, count = SHAPES[name]
        prefill, decode = side.generate(prompts[name], count)
        return {f"{title}: {name}": rows * (count - 1) / decode if "decode" in name else rows * size / prefill}

    for title, take_off, names in (
        ("steps as graphs", without_graphs, ("decode", "decode 16 rows")),
        ("products in other layouts and precisions", without_layouts, ("decode", "decode 16 rows", "prefill 1024")),
        ("a chunk and what is before it apart", with_masks, ("prefill 4000",)),
    ):
        other = Ours(args.ckpt, torch.bfloat16)
        take_off(other)
        for name in names:
            runs = {"with": lambda n=name, t=title: run(usual, n, t)}
            runs["without"] = lambda n=name, t=title, o=other: run(o, n, t)
            table.measure("tokens/s", runs)
    for dtype in (torch.bfloat16, torch.float32):
        training_attention(usual.model.config, dtype, table)


if __name__ == "__main__":
    main()
