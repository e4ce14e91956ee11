"""The recipe's own topology, TP=8 × PP=8, as 64 processes on one machine: the tokens of one process?

    python benchmarks/generate_64.py [--tp 8] [--pp 8]

Makes a small checkpoint with this model's proportions (8 key/value heads, twelve times as many query heads, a tower,
FP8), answers the same requests with one process and with tp × pp of them, and compares. Takes about 200 MB a process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from helpers import ROPES, layout_config, text_fields, vision_fields, write_tekken

from parallel import parts_of
from runtime.checkpoint import initialize
from runtime.config import parse_config
from runtime.export import save
from vision import build_model

TOWER = vision_fields(
    hidden_size=96, intermediate_size=480, num_hidden_layers=6, num_attention_heads=16, patch_size=14, image_size=1540
)
SIZES = dict(
    hidden_size=768, intermediate_size=1792, num_hidden_layers=11, num_attention_heads=96, num_key_value_heads=8,
    head_dim=8, max_position_embeddings=4096, initializer_range=0.04, vision_config=TOWER,
    rope_parameters=ROPES["yarn"] | dict(llama_4_scaling_beta=0.0),
)  # fmt: skip


def make_checkpoint(directory: str) -> None:
    """Random weights in the HF layout, the decoder's linears in FP8 with scales for weights and inputs."""
    fields = text_fields(vocab_size=write_tekken(directory) + 3, **SIZES)
    config = parse_config(layout_config(fields, "new", "static")[1])
    model = build_model(config, dtype=torch.bfloat16)
    initialize(model, seed=1)
    layers = parts_of(model)
    scale = torch.tensor(0.01)
    weights = ((name, part.rows_of(layer.weight.data), None, scale) for name, (layer, part) in layers.items())
    save(os.path.join(directory, "model"), config, weights, directory)


def write_requests(directory: str) -> str:
    """Text and images, greedy and sampled, of different lengths: more requests than stages."""
    lines = [{"raw": "the other thing in the " * (i + 1), "max_new_tokens": 5 + i} for i in range(7)]
    for i, size in enumerate(((60, 90), (200, 40))):
        path = os.path.join(directory, f"{i}.png")
        Image.effect_noise(size, 80).convert("RGB").save(path)
        content = [{"type": "image_url", "image_url": {"url": path}}, {"type": "text", "text": "what is there?"}]
        lines.append({"messages": [{"role": "user", "content": content}], "max_new_tokens": 6})
    lines.append({"raw": "in the", "max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 5})
    path = os.path.join(directory, "requests.jsonl")
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def answer(directory: str, requests: str, launcher: list[str], *options: str) -> tuple[list[dict], float]:
    started = time.perf_counter()
    command = [sys.executable, *launcher, os.path.join(ROOT, "generate.py"), "--ckpt", os.path.join(directory, "model")]
    command += ["--requests", requests, "--json", "--logprobs", "--dtype", "float32", *options]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return [json.loads(line) for line in done.stdout.splitlines()], time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=8)
    args = parser.parse_args()
    world = args.tp * args.pp
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(directory)
        requests = write_requests(directory)
        one, seconds = answer(directory, requests, [])
        print(f"1 process: {len(one)} answers in {seconds:.0f} s", flush=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        many, seconds = answer(directory, requests, launcher, "--tp", str(args.tp), "--pp", str(args.pp))
    same = [a["tokens"] == b["tokens"] for a, b in zip(one, many, strict=True)]
    apart = 0.0
    for a, b in zip(one, many):
        pairs = zip(a["prompt_logprobs"][1:] + a["logprobs"], b["prompt_logprobs"][1:] + b["logprobs"])
        apart = max(apart, *(abs(x - y) for x, y in pairs))
    stats = many[0]["stats"]
    print(f"{world} processes (TP={args.tp} × PP={args.pp}): {sum(same)} of {len(same)} answers with the same tokens,")
    print(f"log-probabilities at most {apart:.1e} apart, {seconds:.0f} s in all, {stats['load_s']} s of it loading")
    print(
        f"peak memory a process: {max(stats['peak_memory_bytes']) / 1e6:.0f} MB, bytes read: {sum(stats['bytes_read'])}"
    )
    sys.exit(0 if all(same) and apart < 1e-4 else 1)


if __name__ == "__main__":
    main()
