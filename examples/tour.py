"""A tour of the model: one question through a checkpoint, and a page that shows what happened on the way.

    python examples/tour.py --image examples/tiny/picture.png --prompt "How many blue stars are there?" --out tour.html

The page is one file, which needs no network. All its numbers are measured in this run, through the project's own
modules: `tour_measure.py` watches them, and `tour_page.html` draws. `tour.png` shows its part about layers:

    sed 's/<section id="s[^5]"/& hidden/' tour.html > layers.html
    chromium --headless --hide-scrollbars --window-size=1280,1420 --screenshot=examples/tour.png layers.html
"""

import argparse
import base64
import html
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import textwrap
import time
from dataclasses import asdict, replace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
import tour_measure as measure
from PIL import Image

import generate
from generate import TINY, Session
from runtime.checkpoint import Checkpoint
from runtime.config import read_config
from runtime.draft import Eagle, Guesses, read_draft
from runtime.files import UserError, read_file, writing
from runtime.images import MEAN, STD, grid, load_image, pixels
from runtime.launch import SIZE, Parser, find_place, run_program
from runtime.requests import command_line_request
from runtime.tokenizer import Tekken, load_tokenizer

HEAD = os.path.join(TINY, "draft")  # guesses for the small checkpoint
GUESSES = 3  # a step
CUT = 1 << 30  # bytes of a checkpoint up to which four processes load it once more
LARGE = os.path.join(ROOT, "tests", "data", "config.json")  # of the 128B
SIDE = 480  # pixels of a picture in the page, at most


def source(match: re.Match) -> str:
    """The code of "[[module.thing]]", as HTML that folds out."""
    thing = pkgutil.resolve_name(match[1])
    file, (code, line) = os.path.relpath(inspect.getsourcefile(thing), ROOT), inspect.getsourcelines(thing)
    summary = f'{thing.__qualname__} <span class="soft">{file}:{line}</span>'
    code = html.escape(textwrap.dedent("".join(code)), quote=False)
    return f'<details class="source"><summary>{summary}</summary><pre class="card">{code}</pre></details>'


def packed(x: torch.Tensor) -> dict:
    return {"shape": [*x.shape], "float32": base64.b64encode(x.float().contiguous().numpy().tobytes()).decode()}


def picture(image: Image.Image, values: torch.Tensor, vision) -> dict:
    """The picture as given, and as the `values` (3, height, width) that `vision.pixels` made of it."""
    values = values * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    seen = Image.fromarray((values * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    found = {"given": image.size, "resized": seen.size, "patch": vision.patch_size, "merge": vision.spatial_merge_size}
    found |= {"grid": grid(*image.size, vision), "urls": []}
    for shown in (image.copy(), seen):
        shown.thumbnail((SIDE, SIDE))
        shown.save(file := io.BytesIO(), "PNG")
        found["urls"].append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return found


def ask(session: Session, spec: dict, limits: dict[str, float], draft: Guesses | None) -> tuple[measure.Watch, dict]:
    """What was watched, and the answer of one question."""
    watch = measure.Watch(session.model, limits)
    session.engine.groups.clear()  # else a beginning that two questions share would be in the cache already, unseen
    with watch.watching():
        (answer,) = session.answer([spec])
    if not answer["tokens"]:
        raise UserError("the question fills the context and leaves no room for an answer; shorten it")
    said = measure.speech(session.model, watch.steps, answer["tokens"], len(answer["prompt_tokens"]))
    again = measure.drafted(session, draft, spec) if draft else None
    return watch, {**answer, "effort": spec["reasoning_effort"], "said": said, "drafted": again}


def tokens_of(tokenizer, words: list[dict], answers: list[dict]) -> dict[int, tuple]:
    """Every token that is mentioned: its text, its bytes, whether it is a control token."""
    ids, names = {id for word in words for id in word["ids"]}, {id: name for name, id in tokenizer.special.items()}
    for answer in answers:
        ids |= {*answer["prompt_tokens"], *answer["tokens"]}
        ids |= {id for said in answer["said"] for id, *_ in (*said["top"], *said["drawn"], *said["lens"])}
        for step in answer["drafted"]["steps"] if answer["drafted"] else ():
            ids.update(*step)
    spelled = dict(enumerate(getattr(tokenizer, "token_bytes", ())))  # which SentencePiece does not have
    found = {}
    for id in ids:
        text = tokenizer.decode([id])  # of an id beyond the vocabulary: nothing
        found[id] = (names.get(id) or text, spelled.get(id, text.encode()).hex(), id in names)
    return found


def write(out: str, data: str) -> None:
    """The page, all of it or nothing."""
    page = read_file(os.path.join(ROOT, "examples", "tour_page.html"), 1 << 20).decode()
    page = re.sub(r"\[\[([\w.]+)\]\]", source, page)
    temporary = f"{out}.{os.getpid()}"
    with writing(out):
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(page.replace("{{data}}", data.replace("</", "<\\/")))
            os.rename(temporary, out)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The tour's own options, and those of `generate.py` that ask the question."""
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--image", metavar="PICTURE", help="what it is about; a checkpoint for text takes none")
    parser.add_argument("--ckpt", default=TINY, metavar="DIR", help="checkpoint, any layout; default: the small one")
    parser.add_argument(
        "--draft", metavar="DIR", help="EAGLE head that guesses tokens; default: the small checkpoint's"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the page; must not exist yet")
    parser.add_argument("--word", default="strawberries", metavar="TEXT", help="what the tokenizer cuts, too")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of activations")
    parser.add_argument("--max-new-tokens", type=SIZE, default=48, metavar="N", help="longest answer")
    own = parser.parse_args(argv)
    if os.path.lexists(own.out):
        raise UserError(f"{own.out}: exists already; choose another name, or remove it")
    if not os.access(os.path.dirname(os.path.abspath(own.out)), os.W_OK):
        raise UserError(f"{own.out}: cannot be written; choose a folder that exists and may be written to")
    if own.draft is None and os.path.abspath(own.ckpt) == TINY and os.path.isdir(HEAD):
        own.draft = HEAD
    if own.draft:
        read_config(own.draft)  # its mistakes are told before anything is started
    options = {"ckpt": own.ckpt, "dtype": own.dtype, "max-new-tokens": own.max_new_tokens, "temperature": 0}
    options |= {"prompt": own.prompt, "top-p": 1, "seed": 0} | ({"image": own.image} if own.image else {})
    return own, generate.parse_args([f"--{name}={value}" for name, value in options.items()])


def main(argv: list[str]) -> None:
    began, (own, args) = time.monotonic(), parse_args(argv)
    image = load_image(own.image) if own.image else None
    checkpoint = Checkpoint(own.ckpt)
    config = checkpoint.fit(read_config(own.ckpt))
    tokenizer = load_tokenizer(own.ckpt, config)
    if image and config.vision is None:
        raise UserError(f"{own.ckpt}: has no vision tower and cannot see; leave out --image")
    args.raw = "[INST]" not in tokenizer.special  # it knows no chat, and continues the text
    spec = command_line_request(args, None)
    cut = measure.held(config, (2, 2), (1, 4))
    size = sum(map(os.path.getsize, {at.file for at in checkpoint.tensors.values()}))
    pipe = measure.start(args, spec, cut["sizes"] if size < CUT else None)
    session = Session(args, find_place(1, 1))
    session.engine.record = None  # steps that are replayed call no hooks,
    vars(session.model).pop("forward", None)  # neither on GPUs nor, as `runtime.cpu.Steps`, on CPUs
    draft = Eagle(read_draft(own.draft, session.model).eval(), session.model, GUESSES) if own.draft else None
    limits = measure.input_limits(checkpoint, config.num_hidden_layers)
    efforts = ("high", "none") if "reasoning_effort" in (tokenizer.model_settings or {}) else (None,)
    asked = [ask(session, {**spec, "reasoning_effort": effort}, limits, draft) for effort in efforts]
    (watch, answer), answers = asked[0], [answer for _, answer in asked]
    words = measure.merges(tokenizer, f"{own.word} {own.prompt}") if isinstance(tokenizer, Tekken) else []
    seen = [pixels(image, config.vision)] if image else []
    places = len(watch.layers) * len(watch.heads) * len(watch.steps[-1].rows[0][0])
    steps = measure.spread(len(answer["said"]), max(1, measure.MAPS // places))
    data = {
        "ckpt": os.path.basename(os.path.abspath(own.ckpt)), "dtype": own.dtype, "prompt": own.prompt, "raw": args.raw,
        "words": words, "answers": answers, "tokens": tokens_of(tokenizer, words, answers),
        "config": asdict(replace(config, raw={})),
        "picture": picture(image, seen[0], config.vision) if image else None,
        "tower": measure.tower_maps(watch.tower) if image else None,
        "positions": measure.positions(session.model, answer["prompt_tokens"], answer["tokens"], seen),
        "attention": {"layers": watch.layers, "heads": watch.heads, "steps": steps},
        "rows": [torch.stack(watch.steps[i].rows) for i in steps], "shapes": watch.shapes,
        "weights": measure.weights(checkpoint, session.model), "inputs": watch.inputs, "limits": limits,
        "cut": cut, "large": measure.held(read_config(LARGE), (8, 8)), "found": measure.receive(pipe),
    }  # fmt: skip
    data["seconds"] = round(time.monotonic() - began, 1)
    write(os.path.abspath(own.out), json.dumps(data, default=packed))


if __name__ == "__main__":
    run_program(main)
