"""A training run on disk: its folder, its metrics and its saved states."""

import argparse
import glob
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta

import torch
from torch import nn

from parallel import Place, Slice
from runtime.checkpoint import Checkpoint
from runtime.curve import draw_loss, points_of
from runtime.export import export, export_adapters, export_draft, staged, write_tensors
from runtime.files import (
    UserError,
    flush_to_disk,
    lock,
    parse_line,
    read_json,
    read_lines,
    reading,
    remove,
    require,
    write_json,
    write_text,
    writing,
)
from runtime.launch import Postponed, gather_objects, together
from runtime.optimizer import STATE, Optimizer

RECORD = "run.json"  # says that a folder is a run's

INDEX = "state.safetensors.index.json"  # of a saved state

MENDED = ""  # in place of a digest: of pictures that stopped a run, and will be others when it goes on

SAVE_SECONDS = 600  # without --save-every, the run's state is saved as often as this, and at the end

LINE = "step {step}/{total}  loss {loss:.4f}  gradient norm {grad_norm:.4g}  {tokens_per_s:.0f} tokens/s  {left} left"


class RunFolder:
    """The folder of a run, --out, which belongs to this run alone inside `with`. All ranks make every call together.

    Its states:

    - absent or empty: a run may start here. Nothing is written before `start`, so a mistake leaves no folder behind;
    - running: `run.json` is there. Only --resume continues it, from the newest of `checkpoints/step-N/`. A process that
      writes here holds a lock, which the kernel releases even if the process is killed;
    - finished: `model/` is there, or `draft/`. `finish` writes it last, and the run has nothing left to do.

    A folder that holds anything else is refused, with a UserError.
    """

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place, self.out = args, place, args.out
        result = "draft" if args.draft_layers else "model"
        self.states, self.model = (os.path.join(args.out, name) for name in ("checkpoints", result))
        self.finished = False
        self.signals = Postponed()  # replaced while training
        self.saved = 0.0  # when, by the clock of time.monotonic
        self.kept = 0  # the last step of which the state was saved, or should have been
        self.unheard = ""  # why nobody reads what is said any more
        self.lines: list[dict] = []  # of metrics.jsonl
        self.seconds: list[float] = []  # of the steps taken here, at most 20

    def __enter__(self) -> "RunFolder":
        with ExitStack() as stack:
            self.on_rank_0(self.claim, stack)
            self.finished = gather_objects(self.finished)[0]
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def on_rank_0(self, action: Callable, *arguments):
        return together(lambda: action(*arguments) if self.place.rank == 0 else None)

    def claim(self, stack: ExitStack) -> None:
        """Lock the folder and find its state; `stack` undoes it."""
        for flag in ("ckpt", "init", "tokenizer", "data", "val"):
            path, real = getattr(self.args, flag), os.path.realpath(self.out)
            inside = path and os.path.commonpath([os.path.realpath(path), real]) == real
            require(not inside, f"--{flag} {path} lies inside --out {self.out}; choose another --out")
        no_link = not os.path.islink(self.states)  # old states are removed, and nothing behind a link ever is
        require(no_link, f"{self.states}: is a link; remove it, and give an --out on the disk that it leads to")
        is_new = not os.path.exists(self.out)
        with writing(self.out):
            os.makedirs(self.out, exist_ok=True)
            lock(self.out, stack)
            if is_new:
                stack.callback(remove_if_empty, self.out)
            self.finished = self.is_finished()
        for name in ("adapters", "model", "draft", "checkpoints/step-*"):  # where a process was killed: see `staged`
            for path in glob.glob(f"{glob.escape(self.out)}/{name}.partial-*"):
                remove(path)

    def is_finished(self) -> bool:
        names = set(os.listdir(self.out)) - {f"{RECORD}.partial"}
        if not names:
            return False
        record = read_json(os.path.join(self.out, RECORD)) if RECORD in names else None
        is_run = isinstance(record, dict) and record.get("program") == "train.py"
        require(is_run, f"{self.out}: holds {min(names)!r}, but no run of train.py; choose a new or an empty folder")
        advice = "--resume goes on with it, or choose another --out"
        require(self.args.resume, f"{self.out}: holds a run already; {advice}")
        config = "params.json" if self.args.draft_layers else "config.json"
        return os.path.exists(os.path.join(self.model, config)) and self.is_whole()

    def is_whole(self) -> bool:
        """Whether the result holds all its files; if some are gone, it is written again from the newest state."""
        try:
            model = Checkpoint(self.model)
            for file in {tensor.file for tensor in model.tensors.values()}:
                model.file(file)  # its header, which says how long it should be
        except UserError as error:
            has_state = newest_state(self.states)
            require(has_state, f"{error}; and no saved state is left to write it again; choose another --out")
            self.say(f"{error}; it is written again")
            return False
        return True

    def say_finished(self) -> None:
        """Say that nothing is left to do. Raises UserError if there is, but no state from which to do it."""
        what = f"{self.out}: this run is finished; its {os.path.basename(self.model)} is {self.model}"
        lines = self.on_rank_0(read_metrics, self.out) or []
        lost = not gather_objects(newest_state(self.states))[0]
        done = max((line["step"] for line in lines), default=0)
        more = f"its saved states are gone: start from this model, in another --out, to take more than its {done} steps"
        require(not lost or (self.args.max_steps or 0) <= done, f"{what}; {more}")
        self.say(f"{what}; {more if lost else 'move it away to take more steps'}")

    def start(self, optimizer: Optimizer, settings: dict, total: int) -> int:
        """Make the folder a run's, of `total` steps; returns the number of steps that were taken already.

        If there is a saved state, the optimizer and the model continue from it. `settings` are what a resumed run must
        not change; see `load_state`.
        """
        self.settings, self.total, step = settings, total, 0
        self.started = self.saved = time.monotonic()
        seen = gather_objects(newest_state(self.states))  # network file systems show a rank new folders late
        if newest := max(seen, key=lambda path: step_of(path or "")):
            step = self.kept = together(lambda: load_state(newest, optimizer, settings, self.args.data))
            self.say(f"resumed after step {step} from {newest}")
            if changes := changed_options(newest, settings["options"]):
                self.say(f"changed from here on: {changes}")
        elif self.args.resume:
            self.say(f"{self.out}: holds no saved state; the run starts from its beginning")
        self.lines = self.on_rank_0(start_metrics, self.out, step) or []
        return step

    def record(self, line: dict) -> None:
        """Append a line to `metrics.jsonl`, and say it."""
        self.lines.append(line)
        self.on_rank_0(append_line, os.path.join(self.out, "metrics.jsonl"), line)
        if "val_loss" in line:
            said = [f"{name} {value:.4f}" for name, value in line.items() if name != "step"]
            self.say(f"step {line['step']}: {', '.join(said)}")
        else:
            self.say_step(line)

    def due(self, step: int) -> bool:
        """Whether to save after this step: because of --save-every or the clock, or as it is the last one, or ends the
        run: because of a signal, or as nobody reads what it says.

        Signals reach the ranks at different moments, and clocks differ: ranks act on what all of them know.
        """
        late = time.monotonic() - self.saved > SAVE_SECONDS
        lates, signals, unheard = zip(*gather_objects((late, self.signals.number, self.unheard)))
        every = self.args.save_every
        regular = step % every == 0 if every else lates[0]
        return step == self.total or regular or any(signals) or any(unheard)

    def save(self, step: int, optimizer: Optimizer) -> None:
        """Save the run's state. If a signal came, or nobody reads what the run says, it ends here."""
        self.keep(step, optimizer)
        signals, unheard = zip(*gather_objects((self.signals.number, self.unheard)))
        rest = f"stopped after step {step}, which is saved; the same with --resume goes on"
        if number := max(signals):
            raise UserError(f"{signal.Signals(number).name}: {rest}", 128 + number)
        if any(unheard) and step < self.total:
            raise UserError(f"standard error: {max(unheard)}; {rest}", 1)

    def keep(self, step: int, optimizer: Optimizer) -> None:
        """Save the state after `step`, if it was not, and remove all but the newest --keep states."""
        if step <= self.kept:
            return
        self.kept = step
        save_state(self.states, step, optimizer, self.settings)
        if self.place.rank == 0:
            remove_old_states(self.states, self.args.keep)
        self.saved = time.monotonic()

    def rescue(self, step: int, optimizer: Optimizer, error: UserError, lines: list[int]) -> None:
        """End a run with `error`, which all ranks have, but first save its state after `step` if that is not saved.

        `lines` of the data have pictures that could not be decoded. They may be others when the run goes on.
        """
        if mended := {str(line) for line in lines} & set(self.settings["pictures"]):
            self.settings["pictures"] |= dict.fromkeys(mended, MENDED)
            self.kept = 0
        if step <= self.kept:
            raise error
        try:
            self.keep(step, optimizer)
        except UserError:  # the disk is full, say: that is what the error is about
            raise error from None
        raise UserError(f"{error}; stopped after step {step}, which is saved: --resume goes on", error.status)

    def finish(self, model: nn.Module) -> None:
        """Write what the run leaves: `loss.png`, with LoRA `adapters/`, and last `model/`; or `draft/`, of a head."""
        args, source = self.args, self.args.ckpt or self.args.tokenizer
        curve, adapters = (os.path.join(self.out, name) for name in ("loss.png", "adapters"))
        self.on_rank_0(self.draw, curve)
        if args.lora_rank:
            export_adapters(adapters, model, args.lora_rank, args.lora_alpha, args.ckpt or args.init)
        if args.draft_layers:
            export_draft(self.model, model, args.export)
        else:
            export(self.model, model, args.export, source)
        took = timedelta(seconds=round(time.monotonic() - self.started))
        self.say(f"done in {took}: {summary(self.lines)}; {curve} shows it")

    def draw(self, path: str) -> None:
        if os.path.islink(path):
            remove(path)
        draw_loss(path, self.lines)
        flush_to_disk(path)

    def say(self, text: str) -> None:
        """Print a line on stderr, from rank 0."""
        try:
            if self.place.rank == 0:
                print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: two threads say something
        except OSError as error:  # its reader went away, or the disk is full: the run ends when a step is saved
            self.unheard = error.strerror
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def say_stopping(self) -> None:
        self.say("stopping after this step, whose state is saved; Ctrl-C again ends the run at once")

    def say_step(self, line: dict) -> None:
        self.seconds = [*self.seconds[-19:], line["step_s"]]
        seconds = sum(self.seconds) / len(self.seconds) * (self.total - line["step"])
        left = timedelta(seconds=round(min(seconds, 1e9)))  # 30 years: dates end in the year 9999
        self.say(LINE.format(**line, total=self.total, left=left))
        if len(self.seconds) == 10 and line["step"] < self.total:
            end = datetime.now() + left
            self.say(f"after ten steps: {left} left, which is until {end:%H:%M} on {end:%d %B}")


def remove_if_empty(folder: str) -> None:
    with suppress(OSError):
        os.rmdir(folder)


# --------------------------------------------------------------------------------------------------------- metrics


def start_metrics(out: str, after_step: int) -> list[dict]:
    """Make `out` a run's folder; returns the lines of its `metrics.jsonl` up to `after_step`, which are all that stay.

    The steps after it will be taken again.
    """
    kept, path = [line for line in read_metrics(out) if line["step"] <= after_step], os.path.join(out, "metrics.jsonl")
    with writing(path):
        if not os.path.exists(os.path.join(out, RECORD)):
            write_json(os.path.join(out, RECORD), {"program": "train.py"})
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_metrics(out: str) -> list[dict]:
    """The lines of `metrics.jsonl` in a run's folder. Raises UserError for one without a step."""
    path = os.path.join(out, "metrics.jsonl")
    lines = read_lines(path) if os.path.exists(path) else []
    if lines and not lines[-1][1].endswith(b"}"):
        lines.pop()  # cut off when its process was killed
    parsed = []
    for number, text in lines:
        line = parse_line(text, where := f"{path} line {number}")
        has_step = type(line.get("step")) is int
        require(has_step, f"{where}: has no step; remove this line, or the file, to resume")
        parsed.append(line)
    return parsed


def append_line(path: str, line: dict) -> None:
    with writing(path, "make room, then --resume"), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def summary(lines: list[dict]) -> str:
    """How the loss went, over tenths of the run, since single steps are noise."""
    losses = [loss for _, loss in points_of(lines, "loss")] or [math.nan]
    count = max(1, len(losses) // 10)
    first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
    if count == 1:
        return f"loss {first:.4f} in the first step, {last:.4f} in the last"
    return f"loss {first:.4f} in the first {count} steps, {last:.4f} in the last {count}"


# ---------------------------------------------------------------------------------------------------- saved states


def step_of(path: str) -> int:
    """12, of the folder "…/step-12"; 0 if that is not the name of a saved state."""
    match = re.fullmatch(r"step-([1-9]\d{0,11})", os.path.basename(path))
    return int(match[1]) if match else 0


def newest_states(directory: str, count: int) -> list[str]:
    """The folders of the `count` latest saved states, the newest first."""
    states = [os.path.dirname(path) for path in glob.glob(os.path.join(glob.escape(directory), "step-*", INDEX))]
    return sorted(filter(step_of, states), key=step_of, reverse=True)[:count]


def newest_state(directory: str) -> str | None:
    return next(iter(newest_states(directory, 1)), None)


def unpadded(parts: Iterable) -> Iterator[tuple[str, Slice, torch.Tensor]]:
    """The tensors of the optimizer's `parts` by their names, without padding, which depends on the topology."""
    for held, views in parts:
        for kind in STATE:
            yield f"{held.name}/{kind}", held.part, views[kind].narrow(held.part.dim, 0, held.part.length)


def save_state(directory: str, step: int, optimizer: Optimizer, settings: dict) -> None:
    """Write `directory`/step-N with every rank's part of the run's state; all ranks call this together.

    Replicas hold the same state and share the writing. A tensor NAME/KIND@START:STOP is these rows (or columns) of an
    FP32 tensor of the whole model. The index lists them like that of a checkpoint, and has the step and the settings as
    its metadata. Raises UserError.
    """
    place, tensors = optimizer.place, {}
    file = f"rank-{place.rank:05d}.safetensors"
    owned = [entry for entry in optimizer.parts if entry[0].owner]
    for name, part, values in unpadded(owned[place.dp_rank :: place.dp_size]):
        tensors[f"{name}@{part.start}:{part.start + part.length}"] = values.contiguous().cpu()
    names = gather_objects(dict.fromkeys(tensors, file))
    final, advice = os.path.join(directory, f"step-{step}"), "earlier checkpoints are whole: make room, then --resume"
    with staged(final, place.rank, advice) as folder:
        write_tensors(os.path.join(folder, file), tensors, step=str(step))
        if place.rank == 0:
            weight_map = {name: file for part in names for name, file in part.items()}
            write_json(os.path.join(folder, INDEX), {"metadata": {"step": step, **settings}, "weight_map": weight_map})


def changed_options(path: str, options: dict) -> str:
    """What is different since the state in `path` was saved: "--lr from 0.001 to 0.0001, …"."""
    before = read_json(os.path.join(path, INDEX))["metadata"]["options"]
    changed = [name for name, value in options.items() if before[name] != value]
    return ", ".join(f"--{name.replace('_', '-')} from {before[name]} to {options[name]}" for name in changed)


def remove_old_states(directory: str, keep: int) -> None:
    """Remove all but the `keep` newest states: the files that `save_state` writes, and folders without others.

    The index goes first, so that whoever is killed here leaves no state that looks whole. What cannot be removed stays:
    that is no reason to stop a run.
    """
    newest = newest_states(directory, keep)
    for path in filter(step_of, glob.glob(os.path.join(glob.escape(directory), "step-*"))):
        files = [os.path.join(path, INDEX), *glob.glob(os.path.join(glob.escape(path), "rank-[0-9]*.safetensors"))]
        if path not in newest and os.path.islink(path):
            remove(path)
        elif path not in newest:
            with suppress(OSError):
                for file in filter(os.path.exists, files):
                    os.remove(file)
                os.rmdir(path)


def load_state(path: str, optimizer: Optimizer, settings: dict, data: str) -> int:
    """Fill the optimizer and the model's weights from a state that any topology wrote; returns its step.

    `settings` are those of this run, which have to be the state's: they decide what a step computes. The one named
    "data" is a digest of the samples in the file `data`. Raises UserError.
    """
    index, advice = os.path.join(path, INDEX), f"remove {path} to resume from before"
    settings = {"step": step_of(path), **settings}
    pictures, options = settings.pop("pictures"), settings.pop("options")
    with reading(index, "index", advice):
        metadata = read_json(index)["metadata"]
        found = {name: metadata.get(name) for name in settings}  # a state from before there were heads has no word
        require(metadata["options"].keys() == options.keys(), "its options are others than those of this program")
        learned = metadata["pictures"].items()
        others = [line for line, digest in learned if digest != MENDED and pictures.get(line) != digest]
    same_data, same_weights = (found[name] == settings[name] for name in ("data", "weights"))
    require(same_data, f"{path}: was made with other data than {data}; resume with the data it began with")
    lines = ", ".join(others)[:80]
    require(not others, f"{path}: was made with other pictures in {data} line {lines}; resume with those it began with")
    require(same_weights, f"{path}: was made with another --ckpt; resume with the weights it began with")
    for name, value in settings.items():
        made = f"{path}: was made with {name} = {str(found[name])[:80]}"
        require(found[name] == value, f"{made}, but this run has {value}")
    with reading(path, "saved state", advice), torch.no_grad():
        state = Checkpoint(path)
        for file in {stored.file for stored in state.tensors.values()}:
            step = (state.file(file).metadata() or {}).get("step")
            require(step in (None, str(settings["step"])), f"{file}: is of the state after step {step}")
        for name, part, values in unpadded(optimizer.parts):
            state.fill_part(name, part, values)
    optimizer.resume(settings["step"])
    return settings["step"]
