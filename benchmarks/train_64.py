"""The recipe's topology, 64 processes as TP=8 × PP=8, on one machine: a small model takes three steps on CPU.

    python benchmarks/train_64.py [--tp 8] [--pp 8] [--dp 1]

The losses and gradient norms must be those of one process. The processes are forked from this one, after its imports,
which saves most of the time and memory that torchrun would take to start 64 of them.
"""

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import torch
import torch.distributed as dist
from helpers import layout_config, text_fields, vision_fields, write_tekken
from PIL import Image

import train

OPTIONS = "--dtype float32 --max-steps 3 --global-batch-size 16 --lr 1e-3 --activation-checkpointing".split()
OPTIONS += ["--freeze", "vision_tower", "projector", "embeddings"]


def write_inputs(folder: str) -> list[str]:
    vocabulary = write_tekken(folder)
    tower = vision_fields(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, patch_size=4, image_size=64
    )
    fields = text_fields(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=192, num_hidden_layers=11, num_attention_heads=16,
        num_key_value_heads=8, head_dim=16, max_position_embeddings=4096, initializer_range=0.1, vision_config=tower,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )  # fmt: skip
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(layout_config(fields, "new")[1], file)
    draw = random.Random(0)
    with open(os.path.join(folder, "chats.jsonl"), "w", encoding="utf-8") as file:
        for i in range(48):
            Image.new("RGB", (draw.randint(10, 70), draw.randint(10, 70)), (i, 90, 5 * i)).save(f"{folder}/{i}.png")
            text = "".join(draw.choices("the in other when ", k=draw.randint(5, 60)))
            parts = [{"type": "image_url", "image_url": {"url": f"{i}.png"}}, {"type": "text", "text": text}]
            answer = {"role": "assistant", "content": "".join(draw.choices("abc", k=draw.randint(1, 30)))}
            file.write(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}) + "\n")
    inputs = {"--init": "config.json", "--data": "chats.jsonl"}
    return [
        "--tokenizer",
        folder,
        *(x for n, file in inputs.items() for x in (n, os.path.join(folder, file))),
        *OPTIONS,
    ]


def work(rank: int, world_size: int, port: int, argv: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    train.main(argv)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run(argv: list[str], world_size: int) -> float:
    """Run train.py's main in so many processes; returns seconds."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    context, started = multiprocessing.get_context("fork"), time.perf_counter()
    ranks = [context.Process(target=work, args=(i, world_size, port, argv)) for i in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"exit status of the ranks: {[process.exitcode for process in ranks]}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("tp", 8), ("pp", 8), ("dp", 1)):
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        argv, metrics = write_inputs(folder), []
        for tp, pp, dp in ((1, 1, 1), (args.tp, args.pp, args.dp)):
            out = os.path.join(folder, f"{tp}-{pp}-{dp}")
            seconds = run([*argv, "--out", out, "--tp", str(tp), "--pp", str(pp)], tp * pp * dp)
            print(f"TP={tp} PP={pp} DP={dp}: {tp * pp * dp} processes, {seconds:.0f} s")
            with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
                metrics.append([json.loads(line) for line in file])
    for one, many in zip(*metrics, strict=True):
        for name in ("loss", "grad_norm"):
            difference = abs(many[name] / one[name] - 1)
            print(f"step {one['step']} {name}: {one[name]:.6f} and {many[name]:.6f}, difference {difference:.1e}")
            assert difference < 1e-4


if __name__ == "__main__":
    main()
