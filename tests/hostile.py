"""Valid inputs of every kind that a user can hand over, for fuzz.py to change, each with what reads it."""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from chat_cases import write_tekken
from helpers import make_eyes, random_state, text_fields, whole_state, write_checkpoint
from helpers import write_tekken as write_small_tekken
from PIL import Image
from train_cases import IMAGES, make_chats

import generate
from parallel import Place
from runtime import chat, curve, data, export, images, launch, optimizer, run, terminal
from runtime.checkpoint import Checkpoint, fill, initialize
from runtime.config import parse_config, read_config
from runtime.files import UserError
from runtime.lora import add_adapters, initialize_adapters
from runtime.tokenizer import load_tokenizer
from vision import build_model

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Kind:
    """A valid input: `files` of `folder` are changed (one per case), and `read` is called."""

    folder: str
    files: list[str]
    read: Callable[[], object]


def load(folder: str) -> None:
    checkpoint = Checkpoint(folder)
    model = build_model(checkpoint.fit(read_config(folder)), dtype=torch.float32)
    fill(model, checkpoint)


def tokenize(folder: str) -> None:
    tokenizer = load_tokenizer(folder, parse_config(text_fields(vocab_size=1 << 20)))
    ids = tokenizer.encode("Hello, " + "a" * 50 + "!! 漢字 🙂\n\n  1234 " + " " * 50 + "x")
    tokenizer.decode(ids)
    if tokenizer.version != "v1":
        with contextlib.suppress(UserError):  # a request's errors name the request
            chat.encode_chat(tokenizer, [{"role": "user", "content": "hi"}], None, None, None)


def kind_config(folder: str) -> Kind:
    return Kind(make_eyes(folder, "new", "static", {}), ["config.json"], lambda: load(folder))


def kind_params(folder: str) -> Kind:
    return Kind(make_eyes(folder, "native", "static", {}), ["params.json"], lambda: load(folder))


def kind_index(folder: str) -> Kind:
    fields = text_fields()
    write_checkpoint(folder, fields, random_state(fields), shards=3)
    return Kind(folder, ["model.safetensors.index.json"], lambda: load(folder))


def kind_safetensors(folder: str) -> Kind:
    fields = text_fields(num_hidden_layers=1)
    write_checkpoint(folder, fields, random_state(fields))
    return Kind(folder, ["model.safetensors"], lambda: load(folder))


def kind_tekken(folder: str) -> Kind:
    write_tekken(os.path.join(HERE, "golden", "tokenizer_tekken.json"), folder, "v15")
    return Kind(folder, ["tekken.json"], lambda: tokenize(folder))


def kind_sentencepiece(folder: str) -> Kind:
    shutil.copy(os.path.join(HERE, "golden", "tokenizer_spm.model"), f"{folder}/tokenizer.model")
    return Kind(folder, ["tokenizer.model"], lambda: tokenize(folder))


def small_session(folder: str, *more: str) -> generate.Session:
    """With a checkpoint beside `folder`."""
    os.makedirs(ckpt := os.path.join(os.path.dirname(folder), "ckpt"), exist_ok=True)
    fields = IMAGES.raw["text_config"] | dict(vocab_size=write_small_tekken(ckpt) + 3, architectures=[])
    fields |= dict(vision_config=IMAGES.raw["vision_config"], tie_word_embeddings=False)
    write_checkpoint(ckpt, fields, whole_state(fields), "new")
    return generate.Session(generate.parse_args(["--ckpt", ckpt, "--prompt", "hi", *more]), Place())


def kind_requests(folder: str) -> Kind:
    session = small_session(folder)
    Image.new("RGB", (30, 20), "red").save(f"{folder}/picture.png")
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    function = {"name": "f", "description": "a function", "parameters": {"type": "object", "properties": {}}}
    picture = {"type": "image_url", "image_url": {"url": "picture.png"}}
    thought = {"type": "thinking", "thinking": "hm"}
    text = {"type": "text", "text": "what?"}
    lines = [
        {"raw": "abc", "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x", "y"]},
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": [picture, text]}]},
        {
            "messages": [
                {"role": "user", "content": "call f"},
                {"role": "assistant", "content": [thought, text]},
                {"role": "user", "content": "now"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "4", "tool_call_id": "call00000", "name": "f"},
            ],
            "tools": [{"type": "function", "function": function}],
            "reasoning_effort": "none",
        },
    ]
    with open(path := f"{folder}/requests.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

    def read() -> None:
        for spec in generate.read_requests(argparse.Namespace(requests=path)):
            session.requests.read(spec)

    return Kind(folder, ["requests.jsonl"], read)


def kind_saved(folder: str) -> Kind:
    """What the chat's /load reads; after which a turn can be added, or is refused."""
    session = small_session(folder)
    Image.new("RGB", (30, 20), "red").save(f"{folder}/picture.png")
    calls = [{"id": f"call0000{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(2)]
    picture = {"type": "image_url", "image_url": {"url": "picture.png"}}
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "call f"}, picture]},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
        {"role": "tool", "content": "4", "tool_call_id": "call00000"},
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    line = {"messages": messages, "answer": answer, "seed": 3, "temperature": 0.5, "reasoning_effort": "none"}
    with open(path := f"{folder}/saved.jsonl", "w") as file:
        file.write(json.dumps(line))

    def read() -> None:
        terminal.note = terminal.gather_objects = lambda said: None
        terminal.stream = lambda session, spec, stop: session.requests.read(spec) and answered
        answered = {"text": "a", "tool_calls": [], "finish_reason": "stop", "prompt_tokens": [], "tokens": []}
        answered["stats"] = {"decode_tokens_per_s": 1}
        keyboard = argparse.Namespace(mode=lambda canonical: contextlib.nullcontext(), stop=None, recall=str)
        talk = terminal.Chat(session, keyboard)
        talk.do_load(path)
        for command, text in (
            (talk.do_tool, "4"),
            (talk.do_retry, ""),
            (talk.say, "on"),
            (talk.do_undo, ""),
            (talk.do_set, ""),
        ):
            with contextlib.suppress(UserError):  # whose errors name the turn
                command(text)
        talk.do_save(f"{folder}/again.jsonl")
        os.remove(f"{folder}/again.jsonl")

    return Kind(folder, ["saved.jsonl"], read)


def kind_adapters(folder: str) -> Kind:
    ckpt = small_session(folder).args.ckpt
    model = build_model(Checkpoint(ckpt).fit(read_config(ckpt)), dtype=torch.float32)
    add_adapters(model, 2, 4.0)
    initialize_adapters(model, 0)
    export.export_adapters(folder, model, 2, 4.0, ckpt)
    args = generate.parse_args(["--ckpt", ckpt, "--prompt", "hi", "--lora", folder])
    names = ["adapter_config.json", "adapter_model.safetensors"]
    return Kind(folder, names, lambda: generate.Session(args, Place()))


def kind_chats(folder: str) -> Kind:
    os.makedirs(tokenizer := os.path.join(os.path.dirname(folder), "tokenizer"), exist_ok=True)
    write_small_tekken(tokenizer)
    tokenizer, path = load_tokenizer(tokenizer), make_chats(folder, True)
    read = lambda: data.Chats(str(path), tokenizer, IMAGES, 10_000, Place())  # noqa: E731
    return Kind(folder, [os.path.basename(path)], read)


def kind_images(folder: str) -> Kind:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    names = [f"image.{extension}" for extension in ("png", "jpg", "gif", "bmp", "webp", "tiff", "ppm", "ico", "jp2")]
    for name in names:
        Image.fromarray(noise).save(f"{folder}/{name}")

    def read() -> None:
        for name in names:
            images.image_size(name, folder)
            images.pixels(images.load_image(name, folder), IMAGES.vision)

    return Kind(folder, names, read)


def trained() -> optimizer.Optimizer:
    model = build_model(parse_config(text_fields(num_hidden_layers=1)), dtype=torch.float32)
    initialize(model, 0)
    return optimizer.Optimizer(model, (0.9, 0.99), 1e-8, 0.0, False)


def kind_state(folder: str) -> Kind:
    adam, settings = trained(), {"seed": 1, "shuffle": True, "data": "0123", "freeze": [], "lora": [None, 0.0]}
    settings |= {"weights": "4567", "pictures": {}, "options": {}}
    run.save_state(folder, 3, adam, settings)
    path = f"{folder}/step-3"
    return Kind(path, sorted(os.listdir(path)), lambda: run.load_state(path, adam, settings, "chats.jsonl"))


def kind_run(folder: str) -> Kind:
    """The record in the folder of a finished run."""
    out = f"{folder}/out"
    os.makedirs(f"{out}/model")
    run.start_metrics(out, 0)
    options = dict.fromkeys(("ckpt", "init", "tokenizer", "data", "val", "draft_layers"))
    options |= {"out": out, "resume": True}

    def read() -> None:
        with run.RunFolder(argparse.Namespace(**options), Place()):
            pass

    return Kind(folder, ["out/run.json"], read)


def kind_metrics(folder: str) -> Kind:
    line = dict(step=1, loss=2.5, grad_norm=1.0, lr=1e-5, target_tokens=9, tokens_per_s=3.0, step_s=1.0)
    with open(f"{folder}/metrics.jsonl", "w") as file:
        for step in range(1, 4):
            file.write(json.dumps(line | dict(step=step)) + "\n")
        file.write(json.dumps(dict(step=3, val_loss=2.0)) + "\n")

    def read() -> None:
        curve.draw_loss(f"{folder}/loss.png", run.start_metrics(folder, 3))

    return Kind(folder, ["metrics.jsonl"], read)


def kind_environment(folder: str) -> Kind:
    """The variables that a launcher sets, as a JSON file for the changes; joining the others is left out."""
    valid = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost")
    with open(path := f"{folder}/environment.json", "w") as file:
        json.dump(valid | dict(MASTER_PORT="29500"), file)

    def read() -> None:
        if not os.path.isfile(path):  # the file stands for variables, which cannot be pipes
            return
        try:
            with open(path) as file:
                values = {name: str(value) for name, value in json.load(file).items() if name.isidentifier()}
        except (OSError, ValueError, AttributeError, RecursionError):
            return
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        for name, value in values.items():
            try:
                os.environ[name] = value
            except ValueError:  # a zero byte, or a lone surrogate: no shell can set that either
                continue
        launch.dist.init_process_group = lambda *arguments, **more: None
        launch.dist.rendezvous = lambda *arguments, **more: iter([(None, 0, 1)])
        try:
            launch.start_world()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None  # there is no file to name

    return Kind(folder, ["environment.json"], read)


KINDS = {name[5:]: build for name, build in list(globals().items()) if name.startswith("kind_")}
