"""A training run on disk: its folder, metrics, loss curve, and saved state."""

import argparse
import fcntl
import glob
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta

import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.files import UserError, flush_to_disk, parse_line, read_json, read_lines, write_json, writing
from runtime.launch import caught, gather_objects, new_folder, together
from runtime.optimizer import STATE, Held, Optimizer


def save_state(directory: str, step: int, optimizer: Optimizer, settings: dict, keep: int) -> None:
    """Write `directory`/step-N with every rank's part of the run's state; all ranks call this together.

    Replicas hold the same state and share the writing. The folder has another name until it is whole and on the disk;
    only then are all but the `keep` newest states removed.
    Raises UserError, on all ranks, if any of them cannot write; then nothing new is left behind.
    """
    place, final = optimizer.place, os.path.join(directory, f"step-{step}")
    partial, rank = f"{final}.partial", optimizer.place.rank

    def make_folder() -> None:
        if rank == 0:
            remove_state(partial)
            os.makedirs(partial, exist_ok=True)

    def write_part() -> None:
        path = os.path.join(partial, f"rank-{rank:05d}.safetensors")
        tensors, slices = {}, {}
        owned = [entry for entry in optimizer.parts if entry[0].owner]
        for tensor, views in owned[place.dp_rank :: place.dp_size]:
            part = tensor.part  # written without its padding, which depends on the topology
            slices[tensor.name] = [part.start, part.start + part.length]
            for kind in STATE:
                tensors[f"{tensor.name}/{kind}"] = views[kind].narrow(part.dim, 0, part.length).contiguous().cpu()
        save_file(tensors, path, metadata={"slices": json.dumps(slices)})
        flush_to_disk(path)

    def finish() -> None:
        if rank == 0:
            write_json(os.path.join(partial, "state.json"), {"step": step, "ranks": place.world_size, **settings})
            flush_to_disk(partial)
            os.rename(partial, final)
            flush_to_disk(directory)

    def explained(phase) -> None:
        with writing(final, "earlier checkpoints are whole: make room, then --resume"):
            phase()

    try:
        for phase in (make_folder, write_part, finish):
            together(lambda: explained(phase))
    except UserError:
        if rank == 0:
            remove_state(partial)
        raise
    if rank == 0:
        newest = sorted((found for name in os.listdir(directory) if (found := step_of(name))), reverse=True)[:keep]
        for name in os.listdir(directory):
            if step_of(name.removesuffix(".partial")) and step_of(name) not in newest:
                remove_state(os.path.join(directory, name))


def remove_state(path: str) -> None:
    """Remove a saved state, or part of one: the files that `save_state` writes, and the folder unless it holds others.

    It loses its name first, so that whoever is killed here leaves no state that looks whole. What cannot be removed
    stays: that is no reason to stop a run.
    """
    partial = path if path.endswith(".partial") else f"{path}.partial"
    with suppress(OSError):
        os.rename(path, partial)
        for name in os.listdir(partial):  # .tmp and six characters: what safetensors has not finished
            if re.fullmatch(r"rank-\d{5,}\.safetensors|\.tmp\w{6}|state\.json(\.partial)?", name):
                os.remove(os.path.join(partial, name))
        os.rmdir(partial)


def step_of(name: str) -> int:
    """12, of the folder's name "step-12"; 0 if it is not the name of a saved state."""
    match = re.fullmatch(r"step-([1-9]\d{0,11})", name)
    return int(match[1]) if match else 0


def newest_state(directory: str) -> str | None:
    """The folder of the latest step, or None. What was not finished has another name."""
    newest = max(map(step_of, os.listdir(directory)), default=0) if os.path.isdir(directory) else 0
    return os.path.join(directory, f"step-{newest}") if newest else None


def load_state(path: str, optimizer: Optimizer, settings: dict, data: str) -> int:
    """Fill the optimizer and the model's weights from a state that any topology wrote; returns its step.

    `settings` are those of this run; the ones that decide what a step computes must be those of the state. The one
    named "data" is a digest of the samples in the file `data`. The files may hold anything: whatever that breaks, here
    or in a library, is a UserError that names the file.
    """
    file_name = os.path.join(path, "state.json")
    try:
        facts = read_json(file_name)
        for name, value in settings.items():
            if name == "data" and facts[name] != value:
                raise UserError(f"{path}: was made with other data than {data}; resume with the data it began with")
            if facts[name] != value:
                raise UserError(f"{path}: was made with {name} = {str(facts[name])[:80]}, but this run has {value}")
        step, ranks = facts["step"], facts["ranks"]
        if type(step) is not int or type(ranks) is not int or step != step_of(os.path.basename(path)):
            raise ValueError(f"step {step!r} of {ranks!r} ranks")
        pieces: dict[str, list] = {}  # name -> (start, stop, file name, file) of every rank that wrote a part of it
        for rank in range(ranks):
            file_name = os.path.join(path, f"rank-{rank:05d}.safetensors")
            if not os.path.isfile(file_name):
                raise ValueError("no such file")
            file = safe_open(file_name, framework="pt")
            for name, (start, stop) in json.loads(file.metadata()["slices"]).items():
                pieces.setdefault(name, []).append((start, stop, file_name, file))
        with torch.no_grad():
            for tensor, views in optimizer.parts:
                done = tensor.part.start
                for start, stop, file_name, file in sorted(pieces.get(tensor.name, []), key=lambda piece: piece[:2]):
                    done = read_piece(tensor, views, file, start, stop, done)
                if done < tensor.part.start + tensor.part.length:
                    file_name = path
                    raise ValueError(f"holds no whole {tensor.name}")
    except Exception as error:
        if isinstance(error, UserError) and not str(error).startswith(file_name):
            raise
        reason = str(error).removeprefix(f"{file_name}: ")[:160]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{file_name}: cannot be read ({kind}{reason}); remove {path} to resume from before") from None
    optimizer.resume(step)
    return step


def read_piece(tensor: Held, views: dict[str, torch.Tensor], file: safe_open, start: int, stop: int, done: int) -> int:
    """Copy what this rank needs out of a piece [start, stop) of a tensor, cut along the same dimension by other ranks.

    The part is filled up to `done` so far, in rows of the whole tensor; returns how far it is then.
    """
    part = tensor.part
    low, high = max(start, part.start), min(stop, part.start + part.length)
    if low >= high:
        return done
    if low > done:
        raise ValueError(f"{tensor.name} lacks {done} to {low}")
    index = (slice(None),) * part.dim + (slice(low - start, high - start),)
    for kind in STATE:
        source = file.get_slice(f"{tensor.name}/{kind}")[index]
        target = views[kind].narrow(part.dim, low - part.start, high - low)
        if source.shape != target.shape or source.dtype != target.dtype or not source.isfinite().all():
            raise ValueError(f"{tensor.name}/{kind} is not {list(target.shape)} finite float32 numbers")
        target.copy_(source)
    return max(done, high)


RECORD, STAGED = "run.json", ".partial"  # says whose folder this is; what is not finished yet


def read_record(out: str) -> dict | None:
    """What `run.json` says of the run in the folder `out`, or None if that is empty. UserError if it holds no run."""
    names = set(os.listdir(out)) if os.path.isdir(out) else set()
    if RECORD in names:
        record = read_json(os.path.join(out, RECORD))
        if isinstance(record, dict) and record.get("program") == "train.py":
            return record
    elif not names:
        return None
    elif "metrics.jsonl" in names and "checkpoints" in names:  # older runs have no run.json
        return {"finished": os.path.exists(os.path.join(out, "model", "config.json"))}
    raise UserError(f"{out}: holds {min(names)!r}, but no run of train.py; choose a new or an empty folder")


@contextmanager
def claimed(args: argparse.Namespace, decides: dict, rank: int) -> Iterator[bool]:
    """Take the folder `args.out` for this run alone while the block lasts, or raise UserError; all ranks come here.

    Only rank 0 looks, and locks the folder; if the process is killed, the kernel releases it. `decides`: the options
    that decide with what the run ends. Yields whether it is finished already; then nothing was touched.
    """
    out, finished, is_new = args.out, False, not os.path.exists(args.out)

    def claim() -> None:
        nonlocal finished
        for flag in ("ckpt", "init", "tokenizer", "data", "val"):
            path, real = getattr(args, flag), os.path.realpath(out)
            if path and os.path.commonpath([os.path.realpath(path), real]) == real:
                raise UserError(f"--{flag} {path} lies inside --out {out}; choose another --out")
        with writing(out):
            finished = may_go_on()
            if finished and not os.path.exists(os.path.join(out, STAGED)):  # else it was killed in its last moment
                return
            os.makedirs(out, exist_ok=True)
            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out}: another run is writing there; choose another, or wait for its end") from None
            except OSError:
                pass  # a file system without locks
            finished = may_go_on()  # that run may have ended just now
            shutil.rmtree(os.path.join(out, STAGED), ignore_errors=True)

    def may_go_on() -> bool:
        record = read_record(out)
        if record is None:
            return False
        if not args.resume:
            raise UserError(f"{out}: holds a run already; --resume goes on with it, or choose another --out")
        model, ended = os.path.join(out, "model"), record.get("finished")
        if os.path.exists(model) and not ended:
            raise UserError(f"{model}: was not written by the run in {out}, which is not finished; move it away")
        # With other options, or when its last states were removed, a run goes on; without any state it cannot.
        states = glob.glob(os.path.join(glob.escape(out), "checkpoints", "step-*[0-9]"))
        same = ended is True
        if isinstance(ended, dict):
            same = ended == decides | {"step": ended.get("step")}
            same = same and any(os.path.basename(state) == f"step-{ended['step']}" for state in states)
        return os.path.exists(model) and (same or not states)

    with ExitStack() as stack:
        try:
            together(claim if rank == 0 else lambda: None)
            yield gather_objects(finished)[0]
        finally:
            if rank == 0 and is_new:
                with suppress(OSError):
                    os.rmdir(out)  # if nothing was written


def write_record(out: str, finished: dict | None = None) -> None:
    """`finished`: what decided the end of a run whose model is about to be put into its place, and its last step."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        write_json(os.path.join(out, RECORD), {"program": "train.py", "finished": finished})


WEIGHTS = r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors"


@contextmanager
def finishing(out: str, finished: dict, rank: int) -> Iterator[str]:
    """Yields a folder for what a run leaves in `out` at its end, which takes its place there when all of it is whole.

    All ranks come here. What an earlier end of the run left is replaced; a folder with files that this program does not
    write is kept under another name.
    """
    staged = os.path.join(out, STAGED)

    def put() -> None:
        for name in os.listdir(staged):
            new, final = os.path.join(staged, name), os.path.join(out, name)
            if os.path.isdir(final):
                own = {*os.listdir(new), *(name for name in os.listdir(final) if re.fullmatch(WEIGHTS, name))}
                strange = set(os.listdir(final)) - own
                os.rename(final, f"{final}.old" if strange else os.path.join(staged, f"old {name}"))
        write_record(out, finished)  # whoever is killed before the next line left no model, and --resume writes it anew
        for name in sorted(os.listdir(staged), key=lambda name: name == "model"):  # last: with it all is in place
            if not name.startswith("old "):
                os.rename(os.path.join(staged, name), os.path.join(out, name))

    def guarded(action) -> None:
        with writing(out, "make room, then --resume"):
            action()

    with ExitStack() as stack:
        together(lambda: guarded(lambda: stack.enter_context(new_folder(staged))) if rank == 0 else None)
        yield staged
        with caught(lambda number, frame: None):  # the last moment: a signal has nothing left to stop
            together(lambda: guarded(put) if rank == 0 else None)


LINE = "step {step}/{total}  loss {loss:.4f}  gradient norm {grad_norm:.4g}  {tokens_per_s:.0f} tokens/s  {left} left"


class Metrics:
    """`metrics.jsonl` in the folder `out`, one JSON object per line, and each line for people on stderr.

    In a terminal the line of a step takes the place of the last one's.
    """

    def __init__(self, out: str, after_step: int, total: int):
        """Keeps what an earlier run wrote, up to `after_step`: the steps after it will be taken again."""
        self.path, self.total = os.path.join(out, "metrics.jsonl"), total
        lines = read_lines(self.path) if os.path.exists(self.path) else []
        if lines and not lines[-1][1].endswith(b"}"):
            lines.pop()  # cut off when its process was killed
        self.lines = []
        for number, text in lines:
            line = parse_line(text, where := f"{self.path} line {number}")
            if type(line.get("step")) is not int:
                raise UserError(f"{where}: has no step; remove this line, or the file, to resume")
            if line["step"] <= after_step:
                self.lines.append(line)
        if not os.path.exists(os.path.join(out, RECORD)):
            write_record(out)  # the first file of a run: the folder is one from here on
        with writing(self.path):
            with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
            os.replace(f"{self.path}.partial", self.path)
        self.seconds: list[float] = []  # of the steps taken here, at most 20
        self.open = False  # the last line shown is to be replaced

    def write(self, line: dict) -> None:
        self.lines.append(line)
        with writing(self.path, "make room, then --resume"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "val_loss" in line:
            shown = [f"{name} {value:.4f}" for name, value in line.items() if name != "step"]
            return self.say(f"step {line['step']}: {', '.join(shown)}")
        self.seconds = [*self.seconds[-19:], line["step_s"]]
        seconds = sum(self.seconds) / len(self.seconds) * (self.total - line["step"])
        left = timedelta(seconds=round(min(seconds, 1e9)))  # 30 years: no calendar goes on for ever
        text = LINE.format(**line, total=self.total, left=left)
        if not sys.stderr.isatty():
            self.say(text)
        else:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be replaced
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self.open = True
        if len(self.seconds) == 10 and line["step"] < self.total:
            end = datetime.now() + left
            self.say(f"after ten steps: {left} left, which is until {end:%H:%M} on {end:%d %B}")

    def say(self, text: str) -> None:
        """A line that stays."""
        print("\n" * self.open + text, file=sys.stderr, flush=True)
        self.open = False

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        """What is said next, an error perhaps, gets a line of its own."""
        print("\n" * self.open, end="", file=sys.stderr, flush=True)
        self.open = False

    def summary(self) -> str:
        """How the loss went, over tenths of the run, since single steps are noise."""
        losses = [line["loss"] for line in self.lines if is_loss(line.get("loss"))] or [math.nan]
        some = max(1, len(losses) // 10)
        first, last = sum(losses[:some]) / some, sum(losses[-some:]) / some
        return f"loss {first:.4f} in the first {some} steps, {last:.4f} in the last {some}"


WIDTH, HEIGHT, MARGIN = 900, 500, 60  # of loss.png, in pixels

SMOOTHING = 0.9  # of the curve over the noise: each step's share in it shrinks by this with every later one


def draw_loss(path: str, lines: list[dict]) -> None:
    """A picture of the loss by step (pale), smoothed (blue), the validation loss (orange), the learning rate (grey)."""
    names = ("lr", "loss", "val_loss")
    found = {name: [(line["step"], line[name]) for line in lines if is_loss(line.get(name))] for name in names}
    smooth, mean, weight = [], 0.0, 0.0
    for step, loss in found["loss"]:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        smooth.append((step, mean / weight))  # over what there was: the first steps don't lean to 0
    steps, losses = zip(*(found["loss"] + found["val_loss"] or [(1, 0.0)]))
    last, low, high = max(2, *steps), min(losses), max(losses)
    high = max(high, low + 1e-3 * max(1, abs(low)))
    largest = max((rate for _, rate in found["lr"]), default=0) or 1
    rates = [(step, low + rate / largest * (high - low)) for step, rate in found["lr"]]

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - 1) / (last - 1) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for loss in round_numbers(low, high):
        left, y = at(1, loss)
        draw.line((left, y, WIDTH - MARGIN, y), fill="#dddddd")
        draw.text((left - 8, y), f"{loss:.6g}", fill="black", anchor="rm")
    for step in sorted({max(1, round(step)) for step in round_numbers(1, last)}):
        x, y = at(step, low)
        draw.line((x, y, x, y + 5), fill="black")
        draw.text((x, y + 8), str(step), fill="black", anchor="mt")
    draw.text((WIDTH / 2, HEIGHT - 20), "step", fill="black", anchor="mm")
    curves = [("#bbbbbb", rates, f"learning rate, 0 to {largest:.3g}"), ("#b5d3ea", found["loss"], "loss")]
    curves += [("#1f77b4", smooth, "loss, smoothed"), ("#ff7f0e", found["val_loss"], "validation loss")]
    for i, (color, points, name) in enumerate(curves):
        if xy := [at(*point) for point in points]:
            draw.line(xy, fill=color, width=2)
            for x, y in xy if len(xy) == 1 or points is found["val_loss"] else ():
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
            draw.text((WIDTH - MARGIN, 12 + 14 * i), name, fill=color, anchor="rm")
    with writing(path):
        image.save(path)


def round_numbers(low: float, high: float) -> list[float]:
    """At most nine from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 8))
    apart = next(n * power for n in (1, 2, 5, 10, 20) if (high - low) / (n * power) <= 8)
    return [i * apart for i in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def is_loss(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30
