"""Valid inputs of every kind that a user can hand over, for fuzz.py to change, each with what reads it."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from chat_cases import write_tekken
from draft_cases import make_draft
from helpers import (
    SIZES,
    load,
    make_checkpoint,
    make_eyes,
    random_state,
    text_fields,
    whole_state,
    write_checkpoint,
    write_json,
)
from helpers import write_tekken as write_small_tekken
from PIL import Image
from train_cases import IMAGES, TEXT, make_chats

import generate
import train
from parallel import Place, TopologyError
from runtime import chat, curve, data, export, images, launch, optimizer, plan, run, terminal
from runtime.checkpoint import Checkpoint, fill, initialize
from runtime.config import parse_config, read_config
from runtime.draft import Eagle, read_draft
from runtime.files import UserError
from runtime.lora import add_adapters, initialize_adapters
from runtime.requests import Request
from runtime.tokenizer import load_tokenizer
from vision import build_model

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Kind:
    """A valid input: `files` of `folder` are changed (one per case), and `read` is called.

    Where a case is no change of one file, `change` makes it. It gets random numbers and returns what a refusal has to
    name, and makes its case of the valid input, whatever was read before.
    """

    folder: str
    files: list[str]
    read: Callable[[], object]
    change: Callable[[random.Random], str] | None = None


def read_model(folder: str) -> None:
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
    return Kind(make_eyes(folder, "new", "static", {}), ["config.json"], lambda: read_model(folder))


def kind_params(folder: str) -> Kind:
    return Kind(make_eyes(folder, "native", "static", {}), ["params.json"], lambda: read_model(folder))


def kind_index(folder: str) -> Kind:
    fields = text_fields()
    write_checkpoint(folder, fields, random_state(fields), shards=3)
    return Kind(folder, ["model.safetensors.index.json"], lambda: read_model(folder))


def kind_safetensors(folder: str) -> Kind:
    fields = text_fields(num_hidden_layers=1)
    write_checkpoint(folder, fields, random_state(fields))
    return Kind(folder, ["model.safetensors"], lambda: read_model(folder))


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
    with open(f"{folder}/adapter_config.json") as file:
        fields = json.load(file)
    off = dict.fromkeys("use_dora use_rslora use_qalora fan_in_fan_out trainable_token_indices".split(), False)
    off |= dict.fromkeys("modules_to_save layer_replication alora_invocation_tokens corda_config loftq_config".split())
    off |= dict(rank_pattern={}, alpha_pattern={}, megatron_config=None, init_lora_weights=True, lora_bias=False)
    write_json(f"{folder}/adapter_config.json", fields | off)
    args = generate.parse_args(["--ckpt", ckpt, "--prompt", "hi", "--lora", folder])
    names = ["adapter_config.json", "adapter_model.safetensors"]
    return Kind(folder, names, lambda: generate.Session(args, Place()))


def kind_draft(folder: str) -> Kind:
    """A head, which guesses: a wrong one is no problem, as long as it fits."""
    session = small_session(folder)
    model, fields = session.model, session.config.raw["text_config"]
    make_draft(folder, fp8="static", **{name: fields[name] for name in (*SIZES, "rope_parameters") if name in fields})
    request = Request([1, 2, 3], max_new_tokens=5, temperature=1.0)

    def read() -> None:
        draft = Eagle(read_draft(folder, model), model, 2)
        generate.Engine(model, -1, 100, draft).generate([request])

    return Kind(folder, ["params.json", "consolidated.safetensors"], read)


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


# ----------------------------------------------------------------------------------------------- the folder of a run


def contents(folder: str) -> dict[str, str]:
    """Path -> a digest of what is there, links not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path, what = os.path.join(root, name), "folder"
            if os.path.islink(path):
                what = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    what = hashlib.sha256(file.read()).hexdigest()
            found[os.path.relpath(path, folder)] = what
    return found


ODD_NAMES = [*[".partial"] * 3, ".old", ".partial-00000000", "0", ".1"]  # beside what has this name without them


def change_folder(draw: random.Random, out: str, elsewhere: str) -> None:
    """Something in `out` becomes a link or something else, goes away or changes places; `elsewhere` is like it."""
    names = sorted(contents(out))
    name, other = draw.choice(names), draw.choice(names)
    path, new = os.path.join(out, name), os.path.join(out, name) + draw.choice(ODD_NAMES)
    kind = draw.randrange(5)
    if kind == 0:  # files change places, those of two saved states perhaps
        same = [o for o in names if os.path.basename(o) == os.path.basename(name) and o != name]
        other = os.path.join(out, draw.choice(same or names))
        if path not in other and other not in path:
            os.rename(path, f"{out}-moved")
            os.rename(other, path)
            os.rename(f"{out}-moved", other)
        return
    if kind == 1:
        if not os.path.lexists(new):
            os.rename(path, new)
        return
    if kind == 2:
        path = new
    if os.path.lexists(path):
        (shutil.rmtree if os.path.isdir(path) and not os.path.islink(path) else os.remove)(path)
    makers = [lambda: os.symlink(os.path.join(elsewhere, name), path), lambda: os.symlink(elsewhere, path)]
    makers += [lambda: os.symlink(os.path.join(elsewhere, other), path), lambda: os.symlink(path, path)]
    makers += [lambda: os.symlink(f"{out}-nowhere", path), lambda: os.mkdir(path), lambda: os.mkfifo(path)]
    makers += [lambda: open(path, "wb").write(draw.randbytes(draw.choice([0, 9, 500]))), lambda: None]
    draw.choice(makers)()


def kind_folder(folder: str) -> Kind:
    """A run that goes on for a step and ends, in a folder in which things are not what they were."""
    root = os.path.dirname(folder)
    ckpt, whole, elsewhere, out = f"{root}/ckpt", f"{root}/whole", f"{root}/elsewhere", f"{folder}/out"
    os.makedirs(ckpt, exist_ok=True)
    make_checkpoint(ckpt, TEXT)
    model = load(ckpt)
    adam = optimizer.Optimizer(model, (0.9, 0.99), 1e-8, 0.0, False)
    options = dict.fromkeys(("init", "tokenizer", "data", "val", "save_every", "lora_rank", "draft_layers"))
    options |= dict(ckpt=ckpt, out=out, resume=True, keep=2, max_steps=4, export="bfloat16", data="chats.jsonl")
    settings = {"seed": 1, "data": "0123", "weights": "4567", "pictures": {}, "options": {}}
    line = dict(loss=2.5, grad_norm=1.0, lr=1e-5, target_tokens=9, tokens_per_s=3.0, step_s=1.0)

    def go_on(steps: int) -> None:
        there = run.RunFolder(argparse.Namespace(**options), Place())
        there.say = lambda text: None
        with there:
            if there.finished:
                return there.say_finished()
            first = there.start(adam, settings, 4) + 1
            for step in range(first, first + steps):
                there.record(line | dict(step=step))
                there.keep(step, adam)
            there.finish(model)

    if not os.path.exists(whole):
        go_on(2)
        os.rename(out, whole)
    kept = contents(whole)

    def read() -> None:
        try:
            go_on(1)
        finally:
            assert contents(elsewhere) == kept, "what a link leads to was changed"

    def change(draw: random.Random) -> str:
        for path in (folder, elsewhere):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, elsewhere)
        shutil.copytree(whole, out)
        if draw.random() < 0.8:
            shutil.rmtree(f"{out}/model")
        for _ in range(draw.choice([1, 1, 2])):
            change_folder(draw, out, elsewhere)
        return folder

    return Kind(folder, [], read, change)


# ----------------------------------------------------------------------------------------------- command lines

WORDS = [
    "",
    "0",
    "1",
    "2",
    "-1",
    "1e-45",
    "1e400",
    "nan",
    "inf",
    "0x10",
    "1_0",
    " 3 ",
    "٣",
    "1" + "0" * 12,
    "9" * 400,
    "9" * 5000,
]
WORDS += ["none", "high", "fp8", "bfloat16", "--", "-", "-x", "--tp", "--tp=", "@file", "a\n\x1b[31m", "x" * 100_000]
WORDS += [
    "\udcff",
    "漢",
    "%s{0}",
    "/",
    ".",
    "..",
    "/dev/zero",
    "/dev/stdin",
    "/etc/passwd",
    "nowhere/at/all",
    "https://a/b",
]


def flags_of(parse: Callable) -> list[argparse.Action]:
    """The options of a program, from its own parser."""
    found = []

    class Stop(Exception):
        pass

    def caught(parser, *arguments):
        found.extend(action for action in parser._actions if action.option_strings and action.dest != "help")
        raise Stop

    before, launch.Parser.parse_args = launch.Parser.parse_args, caught
    with contextlib.suppress(Stop):
        parse([])
    launch.Parser.parse_args = before
    return found


def drawn_option(draw: random.Random, action: argparse.Action, paths: list[str]) -> list[str]:
    """An option of a program with right, nearly right and hostile values; at times too few or too many of them."""
    count = 0 if action.nargs == 0 else action.nargs if isinstance(action.nargs, int) else 1
    count = max(0, count + draw.choice([0] * 30 + [-1, 1]))
    right = [str(choice) for choice in action.choices or ()] + ([str(action.default)] if action.default else [])
    values = [draw.choice(draw.choice([right or ["1"]] * 2 + [paths, ["1", "2", "0.5"], WORDS])) for _ in range(count)]
    flag = draw.choice(action.option_strings)
    return [f"{flag}={values[0]}"] if len(values) == 1 and draw.random() < 0.3 else [flag, *values]


def kind_options(folder: str) -> Kind:
    """Command lines of the four programs, up to the reading of the checkpoint's tensors."""
    ckpt = small_session(folder).args.ckpt
    paths = [ckpt, f"{ckpt}/config.json", f"{folder}/chats.jsonl", f"{folder}/new"]
    case: list[str] = []

    def generate_(argv: list[str]) -> None:
        session = object.__new__(generate.Session)
        session.args = args = generate.parse_args(argv)
        session.place = launch.find_place(args.tp, args.pp)
        asked, _ = generate.read_input(args)
        generate.read_requests(args, asked)
        session.read()

    def train_(argv: list[str]) -> None:
        args = train.parse_args(argv)
        with run.RunFolder(args, launch.find_place(args.tp, args.pp)):
            data.Chats(args.data, load_tokenizer(args.ckpt or args.tokenizer), TEXT, args.max_length, Place())

    def convert(source: str, target: str, to_fp8: bool, chats: str | None) -> None:
        read_config(source)
        Checkpoint(source)
        export.check_free(target)

    def fp8_(argv: list[str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # it says what it wrote
            export.main(argv)

    programs = {
        "generate": (generate_, generate.parse_args, ["--ckpt", ckpt, "--prompt", "hi"]),
        "train": (train_, train.parse_args, ["--ckpt", ckpt, "--data", paths[2], "--out", "out"]),
        "fp8": (fp8_, export.main, [ckpt, "new"]),
        "parallel": (plan.main, plan.main, ["--plan", "--config", paths[1]]),
    }
    flags = {name: flags_of(parse) for name, (_, parse, _) in programs.items()}

    def change(draw: random.Random) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        make_chats(folder, False)
        name = draw.choice(list(programs))
        argv = list(programs[name][2])
        for _ in range(draw.choice([1, 1, 2, 3])):
            kind, at = draw.randrange(12), draw.randrange(len(argv))
            if kind == 0:
                argv[at] = draw.choice(WORDS + paths)
            elif kind == 1 and len(argv) > 1:
                del argv[at]
            else:
                at = at if kind == 2 else len(argv)
                argv[at:at] = drawn_option(draw, draw.choice(flags[name]), paths)
        case[:] = [name, *argv]
        return ""

    def read() -> None:
        os.chdir(folder)
        export.convert = convert
        sys.stdin = io.TextIOWrapper(io.BytesIO(b'{"raw": "a"}'))
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                programs[case[0]][0](case[1:])
            except TopologyError as error:  # as launch.explain does
                raise UserError(f"{error}; {launch.WHAT_TO_DO}") from None

    return Kind(folder, [], read, change)


KINDS = {name[5:]: build for name, build in list(globals().items()) if name.startswith("kind_")}
