"""Supervised fine-tuning: chats in, a fine-tuned model out, on one process or many.

    python train.py --ckpt DIR --data FILE.jsonl --out DIR
    torchrun --nproc-per-node 8 train.py --ckpt DIR --data FILE.jsonl --out DIR --tp 8

The defaults are the settings of the published fine-tune on MedPix-VQA. A step, on every rank:

1. take the step's samples and split them into micro-batches, and these among the data-parallel replicas (`data.py`);
2. run forward and backward passes through the pipeline (`pipeline.py`), gradients adding up in FP32 (`optimizer.py`);
3. make gradients complete across ranks, measure and clip their norm, and let Adam take a step;
4. now and then write a checkpoint (`optimizer.py`), from which another topology could go on.

A step's loss is the mean over all target tokens of its global batch: each micro-batch contributes its sum of token
losses over that number, so that the result does not depend on how the batch was split.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from checkpoint import Checkpoint, fill, initialize, initialize_adapters
from config import UserError, read_config
from data import IGNORE, Chats, ImageReader, MicroBatch, Order, Sample, micro_batches
from engine import Engine, Request
from export import export, export_adapters
from launch import COUNT, SIZE, Parser, Progress, find_place, gather_objects, number, peak_memory, run_program, together
from model import MistralMedium, add_adapters
from optimizer import FREEZABLE, Optimizer, held_tensors, is_trained, load_state, newest_state, save_state
from parallel import Place
from pipeline import Pipeline
from tokenizer import load_tokenizer

RATE, BETA = number(float, 0, 1e9), number(float, 0, 1)


EVALUATE_AT_ONCE = 8  # micro-batches a replica whose images are held at a time


class Diverged(UserError):
    """The loss or a gradient is not a number any more."""

    status = 1


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="start from this checkpoint, any layout")
    add("--init", metavar="CONFIG.json", help="or from random weights of this shape")
    add("--tokenizer", metavar="DIR", help="with --init: the folder of the tokenizer")
    add("--data", metavar="FILE.jsonl", required=True, help="one chat a line; image paths relative to the file")
    add("--val", metavar="FILE.jsonl", help="chats to validate with")
    add("--out", metavar="DIR", required=True, help="metrics.jsonl, checkpoints/, loss.png and model/ go here")
    add("--tp", type=SIZE, default=1, metavar="N", help="tensor-parallel size")
    add("--pp", type=SIZE, default=1, metavar="N", help="pipeline-parallel size; the rest is data-parallel")
    add("--micro-batch-size", type=SIZE, default=1, metavar="N", help="samples that go through the model together")
    add("--global-batch-size", type=SIZE, default=64, metavar="N", help="samples a step, over all ranks")
    add("--max-steps", type=SIZE, metavar="N")
    add("--epochs", type=SIZE, metavar="N", help="default 1, or as many as --max-steps takes")
    add("--max-length", type=SIZE, default=2048, metavar="N", help="longer samples are dropped, in tokens")
    add("--optimizer", choices=["adam", "adamw"], default="adam")
    add("--lr", type=RATE, default=1e-5, metavar="F")
    add("--min-lr", type=RATE, default=1e-6, metavar="F", help="where the cosine ends")
    add("--warmup-steps", type=COUNT, default=0, metavar="N", help="steps in which the learning rate rises to --lr")
    add("--betas", type=BETA, nargs=2, default=[0.9, 0.999], metavar=("A", "B"))
    add("--eps", type=RATE, default=1e-8, metavar="F")
    add("--weight-decay", type=RATE, default=0.0, metavar="F", help="on every trained weight")
    add("--max-grad-norm", type=RATE, default=1.0, metavar="F", help="longer gradients are scaled down; 0: never")
    add("--freeze", nargs="+", default=[], choices=sorted(FREEZABLE), metavar="NAME", help=", ".join(FREEZABLE))
    add(
        "--lora-rank", type=SIZE, metavar="N", help="train adapters of this rank on the decoder's linears, nothing else"
    )
    add("--lora-alpha", type=RATE, metavar="F", help="adapters count alpha / rank times; default 4 times the rank")
    add("--sequence-parallel", action="store_true", help="split norms and residuals along the tokens inside --tp ranks")
    add("--activation-checkpointing", action="store_true", help="keep layers' inputs only: less memory, more time")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--seed", type=number(int, 0, (1 << 31) - 1), default=0, metavar="N", help="of the order, and of --init")
    add("--shuffle", action=argparse.BooleanOptionalAction, default=True)
    add("--save-every", type=SIZE, metavar="N", help="steps between checkpoints; there is one after the last step too")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--val-every", type=SIZE, metavar="N", help="steps between validations; there is one after the last step too")
    add("--val-generate", action="store_true", help="answer the validation chats too, and count exact answers")
    add("--export", choices=["bfloat16", "fp8"], default="bfloat16", help="precision of model/")
    args = parser.parse_args(argv)
    if (args.ckpt is None) == (args.init is None) or (args.init is None) != (args.tokenizer is None):
        raise UserError("start from --ckpt DIR, or from --init CONFIG.json with --tokenizer DIR")
    if not args.val and (args.val_every or args.val_generate):
        raise UserError("--val-every and --val-generate need --val FILE.jsonl")
    if args.sequence_parallel and args.val_generate:
        raise UserError("--val-generate does not go with --sequence-parallel: a new token cannot be split")
    if args.lora_alpha and not args.lora_rank:
        raise UserError("--lora-alpha goes with --lora-rank N")
    args.lora_alpha = args.lora_alpha or 4.0 * (args.lora_rank or 0)
    if max(args.betas) == 1 or args.min_lr > args.lr:
        raise UserError("--betas must lie below 1, and --min-lr must not exceed --lr")
    return args


def learning_rate(step: int, total: int, lr: float, min_lr: float, warmup: int) -> float:
    """Of step 1, 2, …: a straight rise to `lr` over the warm-up, then half a cosine down to `min_lr`."""
    if step <= warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup)))


class Trainer:
    """A run: everything of `args`, built on this rank at `place`."""

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place = args, place
        self.checkpoints = os.path.join(args.out, "checkpoints")
        self.config = read_config(args.ckpt or args.init)
        self.tokenizer = load_tokenizer(args.ckpt or args.tokenizer, self.config.vocab_size)
        if args.max_length > self.config.max_position_embeddings:
            raise UserError(f"--max-length goes up to {self.config.max_position_embeddings} with this model")
        read = partial(Chats, tokenizer=self.tokenizer, config=self.config, max_length=args.max_length, place=place)
        self.data = read(args.data)
        self.val = read(args.val) if args.val else None
        for chats in filter(None, (self.data, self.val)):
            self.say(f"{chats.path}: {len(chats.samples)} samples, {chats.dropped} dropped as longer than --max-length")
        epochs = args.epochs or (None if args.max_steps else 1)
        self.order = Order(len(self.data.samples), args.global_batch_size, epochs, args.seed, args.shuffle)
        self.total = min(args.max_steps or self.order.steps, self.order.steps or args.max_steps)

        self.model = self.build_model()
        self.images = ImageReader(self.config, self.model.dtype)
        decoupled = args.optimizer == "adamw"
        self.optimizer = Optimizer(self.model, args.betas, args.eps, args.weight_decay, decoupled)
        trained = bool(self.optimizer.buckets)
        self.pipeline = Pipeline(place, self.stage, self.config.hidden_size, self.model.dtype, trained)
        self.target_tokens = 0  # of the batch that goes through the pipeline
        self.losses: list[tuple[MicroBatch, torch.Tensor]] = []  # last stage: each micro-batch, sums of its B samples
        self.settings = {  # what a resumed run must not change
            "data": self.data.fingerprint(),
            "seed": args.seed,
            "shuffle": args.shuffle,
            "global_batch_size": args.global_batch_size,
            "optimizer": args.optimizer,
            "freeze": sorted(set(args.freeze)),
            "lora": [args.lora_rank, args.lora_alpha],
        }

    def say(self, text: str) -> None:
        if self.place.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def build_model(self) -> MistralMedium:
        args, place = self.args, self.place
        keep_fp8 = bool(args.lora_rank and args.ckpt and self.config.fp8)  # frozen weights stay as they are stored
        model = together(lambda: MistralMedium(self.config, place, getattr(torch, args.dtype), keep_fp8))
        if args.ckpt:
            checkpoint = Checkpoint(args.ckpt)
            together(lambda: fill(model, checkpoint, Progress(checkpoint, place)))
        else:
            initialize(model, args.seed)
        for tensor in held_tensors(model):
            tensor.parameter.requires_grad_(is_trained(tensor.name, args.freeze))
        if args.lora_rank:
            add_adapters(model, args.lora_rank, args.lora_alpha)
            initialize_adapters(model, args.seed)
        model.activation_checkpointing = args.activation_checkpointing
        if self.config.vision is not None and place.first_stage:
            model.vision_tower.activation_checkpointing = args.activation_checkpointing
        return model

    # --- one step

    def stage(self, x: torch.Tensor | None, batch: MicroBatch) -> torch.Tensor:
        """This rank's part of the model, as the pipeline wants it: hidden states, or on the last stage the loss."""
        model, device = self.model, self.place.device
        if self.place.first_stage:
            features = model.image_features(batch.pixels) if batch.pixels else None
            batch.pixels = []
            x = model.embed(batch.tokens.to(device), features)
        x = model(x, [0] * len(batch.lines))
        if not self.place.last_stage:
            return x
        targets = batch.targets.to(device)
        wanted = targets != IGNORE  # logits are computed where an assistant wrote, and nowhere else
        losses = model.lm_head.cross_entropy(model.logits(x[wanted]), targets[wanted])
        sums = torch.zeros(len(targets), device=device).index_add_(0, wanted.nonzero()[:, 0], losses.detach())
        self.losses.append((batch, sums))
        return losses.sum() / self.target_tokens

    def prepare(self, samples: list[Sample], base: str):
        """(all micro-batches, this replica's, a function that waits for their images) for some samples."""
        pad_id = self.tokenizer.pad_id or 0
        batches = micro_batches(samples, self.args.micro_batch_size, pad_id, self.place.token_parts)
        mine = batches[self.place.dp_rank :: self.place.dp_size]
        wait = self.images.start(mine, base) if self.place.first_stage else lambda: None
        return batches, mine, wait

    def prepare_step(self, step: int):
        return self.prepare([self.data.samples[i] for i in self.order.batch(step)], self.data.base)

    def feed(self, batches: list[MicroBatch], wait) -> None:
        """Wait for images, where there are any. One rank's broken image is everybody's error."""
        if any(batch.images for batch in batches):
            together(wait)

    def totals(self, squared_norm: torch.Tensor) -> tuple[float, float]:
        """(mean loss, gradient norm) over all ranks; forgets the losses collected."""
        place, loss = self.place, 0.0
        if place.last_stage:
            loss = sum(float(sums.double().sum()) for _, sums in self.losses)
        loss = torch.tensor(loss, dtype=torch.float64, device=place.device)
        if place.dp_group is not None:
            dist.all_reduce(loss, group=place.dp_group)
        counted = place.last_stage and place.tp_rank == 0
        sums = torch.stack((loss if counted else torch.zeros_like(loss), squared_norm.to(place.device)))
        for group in (place.tp_group, place.pp_group):
            if group is not None:
                dist.all_reduce(sums, group=group)
        loss, squared_norm = sums.tolist()
        return loss / self.target_tokens, math.sqrt(squared_norm) if squared_norm == squared_norm else math.nan

    def step(self, step: int, prepared) -> dict:
        """One optimizer step; returns its line for metrics.jsonl."""
        args, (batches, mine, wait) = self.args, prepared
        started = time.perf_counter()
        self.feed(batches, wait)
        self.losses = []
        self.target_tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        self.optimizer.start()
        self.pipeline.train(mine, self.optimizer.before_last_backward)
        self.optimizer.reduce()
        loss, norm = self.totals(self.optimizer.squared_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.diverge(step, loss, norm, batches)
        lr = learning_rate(step, self.total, args.lr, args.min_lr, args.warmup_steps)
        self.optimizer.step(lr, min(1.0, args.max_grad_norm / (norm + 1e-6)) if args.max_grad_norm else 1.0)
        memory = torch.tensor(peak_memory(self.place))
        if self.place.world_size > 1:
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        seconds = time.perf_counter() - started
        tokens = sum(batch.length for batch in batches)
        return {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "target_tokens": self.target_tokens,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "peak_memory_bytes": int(memory),
        }

    def diverge(self, step: int, loss: float, norm: float, batches: list[MicroBatch]) -> None:
        """Stop the run before it spoils the weights, and say which samples did it."""
        bad = [
            line for batch, sums in self.losses for line, s in zip(batch.lines, sums.tolist()) if not math.isfinite(s)
        ]
        bad = {line for part in gather_objects(bad) for line in part}
        lines = sorted(bad) or sorted(line for batch in batches for line in batch.lines)
        shown = ", ".join(map(str, lines[:8])) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
        what = f"the loss is {loss}" if bad or not math.isfinite(loss) else f"the gradient norm is {norm}"
        newest = newest_state(self.checkpoints)
        rest = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise Diverged(
            f"step {step}: {what}, from {self.args.data} line {shown}; the step was not taken, {rest}; "
            "look at these samples, or lower --lr"
        )

    # --- validation

    def validate(self, step: int) -> dict:
        """The mean loss over the validation file's target tokens, and the share of exact answers if wanted."""
        samples, args = self.val.samples, self.args
        self.losses = []
        self.target_tokens = sum(sample.target_tokens for sample in samples)
        at_once = EVALUATE_AT_ONCE * self.place.dp_size * args.micro_batch_size
        for first in range(0, len(samples), at_once):
            batches, mine, wait = self.prepare(samples[first : first + at_once], self.val.base)
            self.feed(batches, wait)
            self.pipeline.evaluate(mine)
        loss, _ = self.totals(torch.zeros((), dtype=torch.float64))
        line = {"step": step, "val_loss": loss}
        if args.val_generate:
            line["val_exact"] = self.exact_answers() / len(samples)
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in line.items() if name != "step"))
        return line

    def exact_answers(self) -> int:
        """How many validation chats the model ends with the very tokens of the file, decoding greedily."""
        place, samples = self.place, self.val.samples
        engine = Engine(self.model, self.tokenizer, self.config.max_position_embeddings)
        exact, at_once = 0, EVALUATE_AT_ONCE * place.dp_size
        for first in range(0, len(samples), at_once):
            window = samples[first : first + at_once]
            mine = window[place.dp_rank :: place.dp_size]
            batches = micro_batches(mine, 1, 0)
            wait = self.images.start(batches, self.val.base) if place.first_stage else lambda: None
            if any(sample.images for sample in window):
                together(wait)
            splits = [sample.split_answer() for sample in mine]
            requests = [
                Request(prompt, batch.pixels, max_new_tokens=len(answer))
                for (prompt, answer), batch in zip(splits, batches)
            ]
            answers = engine.generate(requests) if requests else []
            exact += sum(answer.tokens == expected for answer, (_, expected) in zip(answers, splits))
        exact = torch.tensor(exact, device=place.device)
        if place.dp_group is not None:
            dist.all_reduce(exact, group=place.dp_group)
        return int(exact)

    # --- the run

    def run(self) -> None:
        args, place = self.args, self.place
        first = self.start()
        metrics = Metrics(args.out, first - 1) if place.rank == 0 else None
        prepared = self.prepare_step(first) if first <= self.total else None
        for step in range(first, self.total + 1):
            current, prepared = prepared, self.prepare_step(step + 1) if step < self.total else None
            line = self.step(step, current)
            if metrics:
                metrics.write(line)
                metrics.show(step, self.total)
            last = step == self.total
            if self.val and (last or (args.val_every and step % args.val_every == 0)):
                line = self.validate(step)
                if metrics:
                    metrics.write(line)
            if args.save_every and (last or step % args.save_every == 0):
                save_state(self.checkpoints, step, self.optimizer, self.settings)
        if metrics:
            draw_loss(os.path.join(args.out, "loss.png"), metrics.lines)
        if args.lora_rank:
            export_adapters(os.path.join(args.out, "adapters"), self.model, args.lora_rank, args.lora_alpha)
        export(os.path.join(args.out, "model"), self.model, args.export, args.ckpt or args.tokenizer)
        self.say(f"done: {os.path.join(args.out, 'model')}")

    def start(self) -> int:
        """The first step to take: 1, or the one after the newest checkpoint's."""
        args = self.args
        if not any(gather_objects(self.pipeline.gradient_here)):
            raise UserError("--freeze leaves nothing to train; name less")
        newest = newest_state(self.checkpoints)
        if newest and not args.resume:
            raise UserError(f"{args.out}: holds a run already; --resume goes on with it, or choose another --out")

        def make_folder() -> None:
            try:
                os.makedirs(self.checkpoints, exist_ok=True)
            except OSError as error:
                raise UserError(f"{args.out}: cannot be made ({error.strerror})") from None

        together(make_folder)
        if not newest:
            if args.resume:
                self.say(f"{args.out}: holds no whole checkpoint; the run starts from its beginning")
            return 1
        step = together(lambda: load_state(newest, self.optimizer, self.settings))
        self.say(f"resumed after step {step} from {newest}")
        return step + 1


# ------------------------------------------------------------------------------------------------- what is shown

LINE = "step {step}/{total}  loss {loss:.4f}  gradient norm {grad_norm:.4g}  {tokens_per_s:.0f} tokens/s  {left} left"

WIDTH, HEIGHT, MARGIN = 900, 500, 60  # of loss.png, in pixels


class Metrics:
    """`metrics.jsonl` in the folder `out`, one JSON object a line. Only one rank writes."""

    def __init__(self, out: str, after_step: int):
        """Lines after `after_step` are of steps that a resumed run takes again; they go."""
        self.path = os.path.join(out, "metrics.jsonl")
        self.lines = [line for line in read_lines(self.path) if line["step"] <= after_step]
        with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        os.replace(f"{self.path}.partial", self.path)

    def write(self, line: dict) -> None:
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def show(self, step: int, total: int) -> None:
        """The step that was just written, on stderr."""
        steps = [line for line in self.lines if "loss" in line][-20:]
        seconds = sum(line["step_s"] for line in steps) / len(steps) * (total - step)
        left = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else None
        print(LINE.format(**steps[-1], total=total, left=left or f"{seconds:.0f} s"), file=sys.stderr, flush=True)


def read_lines(path: str) -> list[dict]:
    """The whole lines of a file of JSON objects; the last may have been cut off with the process that wrote it."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def draw_loss(path: str, lines: list[dict]) -> None:
    """A picture of the loss (blue) and the validation loss (orange) by step."""
    curves = [
        ("loss", "#1f77b4", [(line["step"], line["loss"]) for line in lines if "loss" in line]),
        ("val_loss", "#ff7f0e", [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]),
    ]
    points = [point for _, _, curve in curves for point in curve]
    last = max(2, *(step for step, _ in points))
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    unit = 10 ** math.floor(math.log10(max(high - low, 1e-3)))  # of the grid
    unit *= next(k for k in (0.2, 0.5, 1, 2) if (high - low) / (k * unit) <= 7)
    low, high = math.floor(low / unit) * unit, (math.floor(high / unit) + 1) * unit

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - 1) / (last - 1) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for i in range(round((high - low) / unit) + 1):
        (left, y), (right, _) = place(1, low + i * unit), place(last, low + i * unit)
        draw.line((left, y, right, y), fill="#dddddd")
        draw.text((left - 8, y), f"{low + i * unit:.4g}", fill="black", anchor="rm")
    for step in sorted({1 + round(i * (last - 1) / 5) for i in range(6)}):
        draw.text((place(step, low)[0], HEIGHT - MARGIN + 8), str(step), fill="black", anchor="mt")
    draw.text((WIDTH / 2, HEIGHT - 20), "step", fill="black", anchor="mm")
    for i, (name, color, curve) in enumerate(curves):
        if curve:
            xy = [place(*point) for point in curve]
            draw.line(xy, fill=color, width=2)
            for x, y in xy if len(xy) < 40 else ():
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
            draw.text((WIDTH - MARGIN, 20 + 16 * i), name, fill=color, anchor="rm")
    image.save(f"{path}.partial", format="PNG")
    os.replace(f"{path}.partial", path)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    place = replace(find_place(args.tp, args.pp), sequence_parallel=args.sequence_parallel and args.tp > 1)
    Trainer(args, place).run()


if __name__ == "__main__":
    run_program(main)
