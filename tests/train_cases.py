"""What the training tests share: a tiny model, chats with and without images, and launching train.py."""

import json
import os
import random
import signal
import socket
import subprocess
import sys

import torch
from helpers import layout_config, text_fields, vision_fields, write_json, write_tekken
from PIL import Image
from safetensors.torch import save_file

from checkpoint import hf_name
from config import Config, parse_config
from model import MistralMedium
from optimizer import held_tensors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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


def make_checkpoint(folder, config: Config, seed: int = 0, dtype=torch.float32) -> str:
    """Random weights with norms that are not 1, in the HF layout, with a tokenizer."""
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(seed)
    tensors = {}
    for tensor in held_tensors(MistralMedium(config)):
        noise = torch.randn(tensor.part.shape)
        weight = 1 + 0.3 * noise if noise.dim() == 1 else noise / noise[0].numel() ** 0.5
        tensors[hf_name(tensor.name, config)] = weight.to(dtype)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    write_json(os.path.join(folder, "config.json"), config.raw)
    assert write_tekken(folder) <= config.vocab_size
    return str(folder)


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


def start(argv: list[str], topology: tuple[int, int, int] = (1, 1, 1), **popen) -> subprocess.Popen:
    """train.py with torchrun on tp × pp × dp processes, or by itself."""
    (tp, pp, dp), command = topology, [sys.executable]
    if tp * pp * dp > 1:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={tp * pp * dp}", f"--master-port={port}"]
        argv = [*argv, "--tp", str(tp), "--pp", str(pp)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, os.path.join(ROOT, "train.py"), *argv], env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, **popen,
    )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a run with all its ranks; torchrun, which would tell them to stop, is halted first."""
    try:
        os.kill(process.pid, signal.SIGSTOP)
    except ProcessLookupError:
        return
    family = [process.pid]
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid:
            family.insert(0, int(entry))
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def launch(argv: list[str], topology: tuple[int, int, int] = (1, 1, 1), timeout: int = 300, **popen):
    """Run to the end; returns (exit status, stderr)."""
    process = start(argv, topology, **popen)
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            kill(process)
    return process.returncode, errors


def metrics(out) -> list[dict]:
    with open(os.path.join(str(out), "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def worst(ours: list[dict], theirs: list[dict], name: str) -> float:
    """The largest relative difference of a column."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs))
