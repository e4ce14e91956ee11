"""How cost grows: decoding with context and rows, prefill with the prompt, training with processes.

    python benchmarks/growth.py [--layers 2] [--rounds 2]

Random weights with the widths of SmolLM2-135M (but heads that 4 ranks can share), in BF16, two layers. Writes
`growth.json` and `growth.png` beside this file. Ten minutes on two slow cores.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from PIL import Image, ImageDraw

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from helpers import make_checkpoint, text_fields  # noqa: E402
from train_cases import make_chats  # noqa: E402

from generate import Engine  # noqa: E402
from model import MistralMedium  # noqa: E402
from runtime.checkpoint import Checkpoint, fill  # noqa: E402
from runtime.config import parse_config, read_config  # noqa: E402
from runtime.cpu import speed_up  # noqa: E402
from runtime.requests import Request  # noqa: E402
from vision import build_model  # noqa: E402

SIZES = dict(
    vocab_size=4096, hidden_size=576, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4,
    head_dim=72, max_position_embeddings=40000,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e6, original_max_position_embeddings=40000, llama_4_scaling_beta=0.0
    ),
)  # fmt: skip
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
ROWS = [1, 2, 4, 8, 16, 32, 64]
GRIDS = ["", "--tp 2", "--pp 2", "", "--tp 4", "--tp 2 --pp 2"]  # what is not split is replicated
PROCESSES = [1, 2, 2, 2, 4, 4]


def generation(model: MistralMedium, rounds: int) -> dict[str, list]:
    """Milliseconds per token decoded, and seconds per prompt."""
    vocab, found = model.config.vocab_size, {"decode": [], "rows": [], "prefill": []}
    engine = Engine(model, -1, model.config.max_position_embeddings)

    def measure(rows: int, size: int, count: int) -> tuple[float, float]:
        figures = []
        for turn in range(rounds):
            engine.groups.clear()  # what they hold of earlier prompts
            prompts = torch.randint(vocab, (rows, size), generator=torch.Generator().manual_seed(turn)).tolist()
            engine.generate([Request(prompt, max_new_tokens=count) for prompt in prompts])
            figures.append((engine.seconds["prefill"], engine.seconds["decode"] / (rows * (count - 1))))
        return tuple(map(statistics.median, zip(*figures)))

    for rows in (1, 2):  # warms up: from some steps on they are graphs
        measure(rows, 256, 40)
    for context in CONTEXTS:
        prefill, token = measure(1, context, 17)
        found["decode"].append([context, 1000 * token])
        found["prefill"].append([context, prefill])
    for rows in ROWS:
        found["rows"].append([rows, 1000 * measure(rows, 128, 17)[1]])
    return found


def training(folder: str, ckpt: str) -> list:
    """Tokens per second of train.py, on a core per process as far as there are any."""
    data, found = make_chats(folder, images=False, count=64), []
    for processes, grid in zip(PROCESSES, GRIDS):
        out = os.path.join(folder, f"run-{len(found)}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["train.py", "--ckpt", ckpt, "--data", data, "--out", out, "--dtype", "float32", *grid.split()]
        command += ["--max-steps", "8", "--global-batch-size", "16", "--micro-batch-size", "2"]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        with open(os.path.join(out, "metrics.jsonl")) as file:
            speeds = [line["tokens_per_s"] for line in map(json.loads, file) if "loss" in line][2:]
        found.append([processes, grid or ("--dp 2" if processes == 2 else ""), statistics.median(speeds)])
    return found


WIDTH, HEIGHT, MARGIN = 440, 330, 56


def panel(draw, left: int, title: str, axis: str, points: list, slope: float, anchor: int) -> None:
    """A log-log plot; in grey, through the point number `anchor`, what grows with the power `slope`."""
    xs, ys = zip(*points)
    low, high = min(ys) / 1.5, max(ys) * 1.5
    reference = [(x, ys[anchor] * (x / xs[anchor]) ** slope) for x in xs]
    reference = [point for point in reference if low <= point[1] <= high]

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        up = math.log(y / low) / math.log(high / low)
        return left + MARGIN + across * (WIDTH - 1.5 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    draw.text((left + WIDTH / 2, 24), title, fill="black", anchor="mm")
    draw.text((left + WIDTH / 2, HEIGHT - 16), axis, fill="black", anchor="mm")
    for x in xs[:: 1 if len(xs) < 8 else 2]:
        draw.text((at(x, low)[0], HEIGHT - MARGIN + 14), f"{x // 1024}k" if x >= 1024 else str(x), "black", anchor="mm")
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for y in (10**power, 2 * 10**power, 5 * 10**power):
            if low <= y <= high:
                draw.line((*at(xs[0], y), *at(xs[-1], y)), fill="#dddddd")
                draw.text((at(xs[0], y)[0] - 6, at(xs[0], y)[1]), f"{y:g}", fill="black", anchor="rm")
    draw.line([at(*point) for point in reference], fill="#aaaaaa", width=2)
    draw.line([at(*point) for point in points], fill="#1f77b4", width=3)
    for x, y in (at(*point) for point in points):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#1f77b4")


def picture(found: dict, path: str) -> None:
    image = Image.new("RGB", (3 * WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    panel(draw, 0, "ms per token, one row (grey: linear)", "tokens of context", found["decode"], 1, -1)
    panel(draw, WIDTH, "ms per token of a batch (grey: 1 / rows)", "rows, 128 tokens each", found["rows"], -1, 0)
    panel(draw, 2 * WIDTH, "seconds per prompt (grey: linear)", "tokens of the prompt", found["prefill"], 1, 0)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(text_fields(num_hidden_layers=args.layers, **SIZES))
        ckpt = make_checkpoint(os.path.join(folder, "ckpt"), config)
        model = build_model(read_config(ckpt))
        fill(model, Checkpoint(ckpt))
        speed_up(model)
        found = generation(model, args.rounds)
        del model
        found["training"] = training(folder, ckpt)
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "growth.json"), "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    picture(found, os.path.join(here, "growth.png"))
    for what, rows in found.items():
        print(
            what, *(" ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) for row in rows), sep="\n  "
        )
    print(f"took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
