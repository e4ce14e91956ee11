"""What the training tests share: a tiny model, chats with and without images, and train.py on several ranks."""

import json
import math
import os
import random

from helpers import layout_config, text_fields, vision_fields
from PIL import Image
from processes import run_on_ranks

import train
from runtime.config import parse_config

VOCABULARY = 307  # odd, so that a head split over ranks is padded
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=56, num_hidden_layers=5, num_attention_heads=8,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=4096,
    rope_parameters=dict(
        rope_type="default", rope_theta=500.0, original_max_position_embeddings=40, llama_4_scaling_beta=0.1
    ),
)  # fmt: skip
TOWER = vision_fields(
    theta=90.0, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, patch_size=3,
    image_size=30,
)  # fmt: skip
TEXT = parse_config(text_fields(**SIZES, tie_word_embeddings=True))
IMAGES = parse_config(layout_config(text_fields(**SIZES, vision_config=TOWER), "new")[1])


RECIPE = {"freeze": ["vision_tower", "projector", "embeddings"]}


def make_chats(folder, images: bool, count: int = 17, seed: int = 0) -> str:
    """A file of chats of one to three turns; with `images`, two of three have one or two."""
    os.makedirs(folder, exist_ok=True)
    draw, lines = random.Random(seed), []
    for i in range(count):
        messages = []
        for turn in range(draw.randint(1, 3)):
            question = "".join(draw.choices("the in other when ", k=draw.randint(3, 40)))
            if images and turn == 0 and i % 3:
                parts = []
                for j in range(draw.randint(1, 2)):
                    name, size = f"{i}-{j}.png", (draw.randint(7, 40), draw.randint(7, 40))
                    pixels = bytes(draw.choices(range(256), k=3 * size[0] * size[1]))
                    Image.frombytes("RGB", size, pixels).save(os.path.join(folder, name))
                    parts.append({"type": "image_url", "image_url": {"url": name}})
                question = [*parts, {"type": "text", "text": question}]
            answer = "".join(draw.choices("abc the ", k=draw.randint(1, 25))).strip() or "a"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path = os.path.join(folder, "chats.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def arguments(ckpt: str, data: str, out, **options) -> list[str]:
    """Command-line arguments of a short float32 run. `save_every=2` is --save-every 2, True is the bare flag."""
    options = {"max_steps": 20, "global_batch_size": 6, "dtype": "float32", "lr": 1e-3, **options}
    argv = ["--ckpt", ckpt, "--data", data, "--out", str(out)]
    for name, value in options.items():
        if value is not False:
            argv += [f"--{name.replace('_', '-')}"]
            argv += [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return argv


def on(argv: list[str], topology: tuple[int, int, int]) -> list[str]:
    return [*argv, "--tp", str(topology[0]), "--pp", str(topology[1])]


def train_on_ranks(argv: list[str], topology: tuple[int, int, int], status: int = 0, **more) -> str:
    """Run train.py to its end on tp × pp × dp ranks; returns what they say on stderr."""
    ended = run_on_ranks(math.prod(topology), "train.py", *on(argv, topology), **more)
    said = "".join(rank.err for rank in ended)
    assert [rank.status for rank in ended] == [status] * len(ended), said
    return said


def metrics(out) -> list[dict]:
    with open(os.path.join(str(out), "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def worst(ours: list[dict], theirs: list[dict], name: str) -> float:
    """The largest relative difference of a column."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs))


def trained(out) -> list[tuple]:
    """What training alone decides."""
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in metrics(out)]


def trainer(case: tuple[str, str], out, **options) -> train.Trainer:
    """A run in this process, to be taken step by step."""
    args, place = train.parse_args(arguments(*case, out, **options)), train.find_place(1, 1)
    kind = train.DraftTrainer if args.draft_layers else train.Trainer
    return kind(args, place, train.RunFolder(args, place))


def run_to_its_end(run: train.Trainer) -> None:
    with run.folder:
        run.train()
