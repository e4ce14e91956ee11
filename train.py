"""Supervised fine-tuning: chats in, a fine-tuned model out, on one process or many.

    python train.py --ckpt DIR --data FILE.jsonl --out DIR
    torchrun --nproc-per-node 8 train.py --tp 8 --ckpt DIR …      # on 8 GPUs

A step, on every rank:

1. split the step's samples into micro-batches (`runtime/data.py`), and these among the data-parallel replicas;
2. run forward and backward passes through the stages (`parallel.py`), summing gradients in FP32;
3. make gradients complete across ranks, measure and clip their norm, and let Adam take a step
   (`runtime/optimizer.py`).

The loss of a step is the mean over all N target tokens of its *global* batch. So a micro-batch doesn't average over its
own targets, of which another may have ten times as many: it contributes (the sum of its token losses) / N. These add up
to the mean however the batch was split, and so do their gradients. Every rank knows all samples, hence N in advance.

--out gets `metrics.jsonl`, a line per step and per validation; `checkpoints/step-N/`, from which --resume goes on, on
any topology: saved every ten minutes, at the end, and when a signal or an error stops the run; at the end `loss.png`
and `model/` in the HF layout. A finished run takes more steps if `model/` is moved away. With --lora-rank the model
stays frozen (in FP8, if it is stored so) and only adapters are trained: `adapters/` has them alone, `model/` has them
merged. With --draft-layers it is frozen, too, and only a head is trained that guesses its tokens (`runtime/draft.py`);
`draft/` has that. Defaults are those of the published fine-tune on MedPix-VQA.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import; `run_program` sets the rule

import argparse
import math
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from textwrap import shorten

import torch
import torch.distributed as dist

from generate import Engine
from model import Config, MistralMedium
from parallel import Pipeline, Place
from runtime.checkpoint import Checkpoint, fill, initialize
from runtime.config import read_config
from runtime.cpu import speed_up
from runtime.data import IGNORE, Chats, MicroBatch, Order, Sample, decode_images, micro_batches
from runtime.draft import Head, sizes_of_head
from runtime.files import UserError, digest_of, plural, require, within
from runtime.launch import COUNT, SIZE, Parser, Postponed, find_place, gather_objects, number, run_program, together
from runtime.lora import add_adapters, initialize_adapters
from runtime.memory import peak_memory
from runtime.optimizer import FREEZABLE, Optimizer, held_tensors, is_trained
from runtime.plan import Progress, check_memory
from runtime.requests import Request
from runtime.run import SAVE_SECONDS, RunFolder, newest_state
from runtime.tokenizer import load_tokenizer
from vision import build_model

Split = tuple[list[MicroBatch], list[MicroBatch], Callable[[], None]]  # see Trainer.split

SHOWN = 3  # answers of a validation

VALIDATE_AT_ONCE = 8  # micro-batches per replica whose images are in memory together


def learning_rate(step: int, total: int, lr: float, min_lr: float, warmup: int) -> float:
    """Of step s = 1, 2, …, S: first a straight rise, then half a cosine (arXiv:1608.03983) from `lr` towards `min_lr`.

        s <= w:  lr · s / w
        s > w:   min_lr + (lr - min_lr) · (1 + cos(π · (s - 1 - w) / (S - w))) / 2

    As in torch's CosineAnnealingLR, the first step after the warm-up has all of `lr`; step S + 1 would have `min_lr`.
    """
    if step <= warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup)))


def over_ranks(values: list[float], operation=dist.ReduceOp.SUM) -> list[float]:
    """Each value summed (or `operation`) over all ranks; on the CPU in float64."""
    values = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values.tolist()


def read_start(args: argparse.Namespace) -> tuple[Checkpoint | None, Config, object]:
    """What a run starts from: the checkpoint (None with --init), the model's sizes, the tokenizer."""
    checkpoint = Checkpoint(args.ckpt) if args.ckpt else None
    config = read_config(args.ckpt or args.init)
    if checkpoint:
        config = checkpoint.fit(config)
    longest = config.max_position_embeddings
    require(args.max_length <= longest, f"--max-length goes up to {longest} with this model")
    return checkpoint, config, load_tokenizer(args.ckpt or args.tokenizer, config)


# Options that a resumed run may change.
CHANGEABLE = "lr min_lr warmup_steps betas eps weight_decay max_grad_norm max_steps epochs".split()


class Trainer:
    """A run, as `args` describe it, on the rank at `place`: of the model, or of adapters in it."""

    result = "--ckpt {0}"  # how generate.py is told of what comes out

    def __init__(self, args: argparse.Namespace, place: Place, folder: RunFolder):
        self.args, self.place, self.folder, self.say = args, place, folder, folder.say
        self.checkpoint, self.config, self.tokenizer = together(lambda: read_start(args))
        self.data = self.read_chats(args.data)
        self.val = self.read_chats(args.val) if args.val else None
        epochs = args.epochs or (None if args.max_steps else 1)
        self.order = Order(len(self.data.samples), args.global_batch_size, epochs, args.seed, args.shuffle)
        self.total = min(args.max_steps or math.inf, self.order.steps)
        self.model = self.build_model()
        self.learner = self.build_learner()  # what has the parameters that are trained
        self.optimizer = Optimizer(self.learner, args.betas, args.eps, args.weight_decay, args.optimizer == "adamw")
        trained = bool(self.optimizer.parts)
        self.pipeline = Pipeline(place, self.forward, self.config.hidden_size, self.model.dtype, trained)
        self.thread = ThreadPoolExecutor(max_workers=1)  # decodes images while the model computes
        self.taken = 0  # steps that the optimizer has taken
        self.awaited: list[int] = []  # lines whose images are about to be decoded
        self.target_tokens = 0  # N, of the batch that is going through the pipeline
        self.losses: list[tuple[MicroBatch, torch.Tensor]] = []  # last stage: its micro-batches, sums (B,) per sample

    def read_chats(self, path: str) -> Chats:
        chats = Chats(path, self.tokenizer, self.config, self.args.max_length, self.place)
        tokens = sum(len(sample.ids) for sample in chats.samples)
        targets = sum(sample.target_tokens for sample in chats.samples)
        said = f"{plural(len(chats.samples), 'sample')}, {chats.dropped} dropped (--max-length)"
        self.say(f"{path}: {said}; {tokens:,} tokens, {targets:,} of them targets")
        return chats

    def build_model(self) -> MistralMedium:
        args, place = self.args, self.place
        frozen = args.lora_rank or args.draft_layers
        keep_fp8 = bool(frozen and self.checkpoint and self.checkpoint.is_fp8())  # frozen weights stay so
        self.planned = check_memory(self.config, place, args, keep_fp8)  # bytes
        model = together(lambda: build_model(self.config, place, getattr(torch, args.dtype), keep_fp8))
        if self.checkpoint:
            together(lambda: fill(model, self.checkpoint, Progress(self.checkpoint, place)))
        else:
            initialize(model, args.seed)
        for tensor in held_tensors(model):
            tensor.parameter.requires_grad_(is_trained(tensor.name, args.freeze))
        if args.lora_rank:
            add_adapters(model, args.lora_rank, args.lora_alpha)
            initialize_adapters(model, args.seed)
        speed_up(model, inference=False)
        model.activation_checkpointing = args.activation_checkpointing
        if self.config.vision is not None and place.first_stage:
            model.vision.vision_tower.activation_checkpointing = args.activation_checkpointing
        return model

    def build_learner(self) -> torch.nn.Module:
        return self.model

    def train(self) -> None:
        """Take the steps that are left to take, and leave the model in the run's folder."""
        args, folder = self.args, self.folder
        require(any(gather_objects(self.pipeline.gradient_here)), "--freeze leaves nothing to train; name less")
        first = folder.start(self.optimizer, self.settings(), self.total) + 1
        self.announce(first)
        with Postponed(tell=folder.say_stopping) as folder.signals:  # a step is always finished: see RunFolder.due
            try:
                self.take_steps(first)
            except UserError as error:  # all ranks raise it, and never in the middle of an update
                folder.rescue(self.taken, self.optimizer, error, self.awaited)
        folder.finish(self.learner)
        self.say("try it: python generate.py " + self.result.format(*map(shlex.quote, (folder.model, args.ckpt or ""))))

    def take_steps(self, first: int) -> None:
        folder, upcoming, self.taken = self.folder, self.upcoming(first), first - 1
        for step in range(first, self.total + 1):
            current, upcoming = upcoming, self.upcoming(step + 1)
            folder.record(self.step(step, current))
            if self.val and (step == self.total or step % (self.args.val_every or self.total) == 0):
                with within(f"validation after step {step}"):
                    line = self.validate(step)
                folder.record(line)
            if folder.due(step):
                folder.save(step, self.optimizer)

    def upcoming(self, step: int) -> Split | None:
        """The samples of `step`, split; None after the last step. The longest come first, for little padding."""
        if step > self.total:
            return None
        samples = sorted((self.data.samples[i] for i in self.order.batch(step)), key=lambda sample: -len(sample.ids))
        return self.split(samples, self.data, self.args.micro_batch_size)

    def split(self, samples: list[Sample], chats: Chats, size: int) -> Split:
        """(all micro-batches of `samples`, this replica's, a function that waits for the images of the latter)."""
        place = self.place
        batches = micro_batches(samples, size, self.tokenizer.pad_id or 0, place.token_parts)
        mine = batches[place.dp_rank :: place.dp_size]
        decode = (decode_images, mine, chats.base, self.config.vision, self.model.dtype)
        wait = self.thread.submit(*decode).result if place.first_stage else lambda: None

        def wait_together() -> None:  # one rank's broken image is an error of all ranks
            with within(chats.path):
                together(wait)

        # Without images there is nothing to agree on.
        return batches, mine, wait_together if any(batch.images for batch in batches) else wait

    def step(self, step: int, upcoming: Split) -> dict:
        """One optimizer step; returns its line for metrics.jsonl."""
        args, (batches, mine, wait) = self.args, upcoming
        started = time.perf_counter()
        self.awaited = [line for batch in batches for line in batch.lines]
        with within(f"step {step}"):
            wait()
        self.awaited = []
        self.losses, self.target_tokens = [], sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        self.optimizer.start()
        self.pipeline.train(mine)
        self.optimizer.reduce()
        loss, norm = self.totals(float(self.optimizer.squared_norm()))
        # One NaN would pass from a gradient into Adam's moments and the weights, for good. None hides from the norm, a
        # sum over all gradients, and all ranks have the same norm: they stop together, before Adam takes the step.
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.diverge(step, loss, norm, batches)
        lr = learning_rate(step, self.total, args.lr, args.min_lr, args.warmup_steps)
        # Clipping as torch.nn.utils.clip_grad_norm_ does it: all gradients shrink by the same factor.
        self.optimizer.step(lr, min(1.0, args.max_grad_norm / (norm + 1e-6)) if args.max_grad_norm else 1.0)
        self.taken = step
        (memory,) = over_ranks([peak_memory(self.place)], dist.ReduceOp.MAX)
        seconds, tokens = time.perf_counter() - started, sum(batch.length for batch in batches)
        line = dict(step=step, loss=loss, grad_norm=norm, lr=lr, target_tokens=self.target_tokens)
        return line | dict(tokens_per_s=tokens / seconds, step_s=seconds, peak_memory_bytes=int(memory))

    def forward(self, x: torch.Tensor | None, batch: MicroBatch) -> torch.Tensor:
        """This rank's part of the model, as the pipeline calls it.

        x: the previous stage's hidden states (B, T, C), None on the first. Returns this stage's, or on the last stage
        what `batch` contributes to the loss (0-d). With sequence parallelism stages exchange T / tp of the tokens.
        """
        x = self.model(self.embed(batch) if self.place.first_stage else x)
        if not self.place.last_stage:
            return x
        at, targets = self.targets(batch)
        logits = self.model.logits(x.flatten(0, 1)[at])  # (N, V / tp)
        return self.add_up(batch, at, self.model.lm_head.cross_entropy(logits, targets))

    def embed(self, batch: MicroBatch) -> torch.Tensor:
        """(B, T, C), with the features of images."""
        features = self.model.vision(batch.pixels) if batch.pixels else None
        batch.pixels = []  # not needed again: free them
        return self.model.embed(batch.tokens.to(self.place.device), features)

    def targets(self, batch: MicroBatch) -> torch.Tensor:
        """(2, N): where in B · T there is a target, and which.

        Logits, V = 131,072 numbers per token, are computed only there. These N positions are found on the CPU: a GPU
        would have to finish everything before it could say how many there are.
        """
        targets = batch.targets.flatten()
        at = (targets != IGNORE).nonzero()[:, 0]
        return torch.stack((at, targets[at])).to(self.place.device)

    def add_up(self, batch: MicroBatch, at: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """What the `losses` (N,) of the targets at `at` contribute to that of the step; notes them for each sample."""
        B, T = batch.shape
        sums = torch.zeros(B, device=self.place.device).index_add_(0, at // T, losses.detach())
        self.losses.append((batch, sums))
        return losses.sum() / self.target_tokens

    def totals(self, squared_norm: float = 0.0) -> tuple[float, float]:
        """(mean loss, gradient norm) over all ranks, from the losses collected and this rank's share of the norm."""
        place, loss = self.place, 0.0
        if self.losses and place.tp_rank == 0:  # on the last stage; its tensor-parallel ranks found the same losses
            loss = float(torch.cat([sums for _, sums in self.losses]).double().sum())
        loss, squared_norm = over_ranks([loss, squared_norm / place.dp_size])  # replicas have the same gradients by now
        return loss / self.target_tokens, math.sqrt(squared_norm)

    def diverge(self, step: int, loss: float, norm: float, batches: list[MicroBatch]) -> None:
        """Stop the run, and say which samples did it: those whose loss is not finite, else all of the step."""
        sums = [pair for batch, sums in self.losses for pair in zip(batch.lines, sums.tolist())]
        bad = {line for part in gather_objects(sums) for line, loss in part if not math.isfinite(loss)}
        lines = sorted(bad) or sorted(line for batch in batches for line in batch.lines)
        shown = ", ".join(map(str, lines[:8])) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
        what = f"the loss is {loss}" if bad or not math.isfinite(loss) else f"the gradient norm is {norm}"
        self.folder.keep(self.taken, self.optimizer)
        newest = newest_state(self.folder.states)
        rest = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        problem = f"step {step}: {what}, from {self.args.data} line {shown}; the step was not taken, {rest}"
        raise UserError(f"{problem}; look at these samples, or lower --lr", status=1)

    def validate(self, step: int) -> dict:
        """The mean loss over the file's target tokens, and the share of exact answers: a line for metrics.jsonl."""
        samples = self.val.samples
        self.losses, self.target_tokens = [], sum(sample.target_tokens for sample in samples)
        for _, mine in self.windows(samples, self.args.micro_batch_size):
            self.pipeline.evaluate(mine)
        line = {"step": step, "val_loss": self.totals()[0]}
        if self.args.val_generate or not self.place.sequence_parallel:  # under which a single token cannot be split
            asked = [sample for sample in samples if sample.targets[-1]]  # the last answer may have weight 0
            exact = self.exact_answers(asked[: None if self.args.val_generate else SHOWN * self.place.dp_size])
            line |= {"val_exact": exact / len(asked)} if self.args.val_generate and asked else {}
        return line

    def windows(self, every: list[Sample], size: int) -> Iterator[tuple[list[Sample], list[MicroBatch]]]:
        """Samples of the validation file, some at a time: (they, this replica's micro-batches of `size`)."""
        at_once = VALIDATE_AT_ONCE * self.place.dp_size * size
        for first in range(0, len(every), at_once):
            samples = every[first : first + at_once]
            _, mine, wait = self.split(samples, self.val, size)
            wait()
            yield samples, mine

    def exact_answers(self, samples: list[Sample]) -> int:
        """How many of these chats the model ends with the very tokens of the file, decoding greedily; shows a few."""
        place, exact, shown = self.place, 0, 0
        engine = Engine(self.model, self.tokenizer.eos_id, self.config.max_position_embeddings)
        for some, batches in self.windows(samples, 1):  # a chat each
            splits = [sample.split_answer() for sample in some[place.dp_rank :: place.dp_size]]
            requests = [Request(prompt, batch.pixels, len(answer)) for (prompt, answer), batch in zip(splits, batches)]
            answers = engine.generate(requests) if requests else []
            for answer, (_, expected) in zip(answers, splits):
                exact += answer.tokens == expected
                if (shown := shown + 1) <= SHOWN:
                    texts = (shorten(self.tokenizer.decode(ids), 100) for ids in (expected, answer.tokens))
                    self.say("  expected {!r}\n  answered {!r}".format(*texts))
        return int(over_ranks([exact])[0]) // (place.tp_size * place.pp_size)  # all ranks of a replica counted them

    def settings(self) -> dict:
        """What a resumed run must not change; and "options", which it may, and then says so."""
        same = ("seed", "shuffle", "global_batch_size", "optimizer")
        files = {stored.file for stored in self.checkpoint.tensors.values()} if self.checkpoint else ()
        return {name: getattr(self.args, name) for name in same} | {
            "data": self.data.fingerprint(),
            "pictures": self.data.pictures(self.place),
            "weights": gather_objects(together(lambda: self.place.rank == 0 and digest_of(files)))[0],
            "options": {name: getattr(self.args, name) for name in CHANGEABLE},
            "freeze": sorted(set(self.args.freeze)),
            "lora": [self.args.lora_rank, self.args.lora_alpha],
            "draft_layers": self.args.draft_layers,
        }

    def announce(self, first: int) -> None:
        """Say what the run will do."""
        args, modules = self.args, {self.model, self.learner}
        owned = [t for module in modules for t in held_tensors(module) if t.owner and self.place.dp_rank == 0]
        trained = sum(t.parameter.numel() for t in owned if t.parameter.requires_grad)
        trained, every = over_ranks([trained, sum(t.parameter.numel() for t in owned)])
        batch, count = args.global_batch_size, len(self.data.samples)
        epochs = min(self.total * batch / count, self.order.epochs or math.inf)
        each = f"{plural(batch, 'sample')} each: {epochs:.3g} times through the data"
        self.say(f"steps {first} to {self.total}, {each}")
        memory = f"; by the plan this takes at most {self.planned / 1e9:.2g} GB" if self.planned else ""
        self.say(f"trains {trained:,.0f} of {every:,.0f} parameters{memory}")
        often = plural(args.save_every, "step") if args.save_every else plural(SAVE_SECONDS // 60, "minute")
        states = self.folder.states
        self.say(f"saves its state every {often} in {states}, the newest {args.keep} stay; Ctrl-C stops after a step")


class DraftTrainer(Trainer):
    """Trains a draft's head on the states of the frozen model, of which there is one stage."""

    result = "--ckpt {1} --draft {0}"

    def build_learner(self) -> Head:
        args = self.args
        self.model.requires_grad_(False)
        head = Head(sizes_of_head(self.config, args.draft_layers), self.place, self.model.dtype)
        initialize(head, args.seed)
        speed_up(head, inference=False)
        head.activation_checkpointing = args.activation_checkpointing
        return head

    def forward(self, x: None, batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad():
            embeddings = self.embed(batch)
            states = self.model.norm(self.model(embeddings))
        at, _ = self.targets(batch)
        losses, agree = self.learner.losses(self.model, embeddings, states, at)
        if not torch.is_grad_enabled():
            self.agreed.append(agree.sum())
        return self.add_up(batch, at, losses)

    def validate(self, step: int) -> dict:
        """With the share of targets at which the head's likeliest token is the model's."""
        self.agreed = []
        line = super().validate(step)
        (agreed,) = over_ranks([sum(map(int, self.agreed)) / self.place.tp_size])  # whose ranks counted the same ones
        return line | {"val_agreed": agreed / self.target_tokens}


# What an option takes, in argparse's words.
DIR, CHATS, FLAG = {"metavar": "DIR"}, {"metavar": "FILE.jsonl"}, {"action": "store_true"}
N = {"metavar": "N", "type": SIZE}
RATE, POSITIVE = ({"metavar": "F", "type": number(float, low, 1e9)} for low in (0, 1e-30))
BETAS = {"metavar": ("A", "B"), "type": number(float, 0, 1), "nargs": 2}

OPTIONS = {  # of each group: (flag, what it takes, default, help)
    "from what to what": [
        ("--ckpt", DIR, None, "start from this checkpoint, any layout"),
        ("--init", {"metavar": "CONFIG.json"}, None, "or from random weights of this shape"),
        ("--tokenizer", DIR, None, "with --init: the folder of the tokenizer"),
        ("--data", CHATS | {"required": True}, None, "one chat a line; image paths relative to the file"),
        ("--max-length", N, 2048, "longer samples are dropped, in tokens"),
        ("--out", DIR | {"required": True}, None, "metrics.jsonl, checkpoints/, loss.png and model/ go here"),
        ("--export", {"choices": ["bfloat16", "fp8"]}, "bfloat16", "precision of model/"),
    ],
    "steps": [
        ("--global-batch-size", N, 64, "samples a step, over all ranks"),
        ("--max-steps", N, None, "default: as many as --epochs takes"),
        ("--epochs", N, None, "default 1, or as many as --max-steps takes"),
        ("--shuffle", {"action": argparse.BooleanOptionalAction}, True, "a new order each epoch; default: yes"),
        ("--seed", {"metavar": "N", "type": number(int, 0, (1 << 31) - 1)}, 0, "of order, --init and adapters"),
    ],
    "optimizer": [
        ("--optimizer", {"choices": ["adam", "adamw"]}, "adam", "adamw decays weights apart from gradients"),
        ("--lr", RATE, 1e-5, "the highest learning rate"),
        ("--min-lr", RATE, 1e-6, "where the cosine ends"),
        ("--warmup-steps", {"metavar": "N", "type": COUNT}, 0, "steps in which the learning rate rises to --lr"),
        ("--betas", BETAS, [0.9, 0.999], "Adam's"),
        ("--eps", POSITIVE, 1e-8, "Adam's"),
        ("--weight-decay", RATE, 0.0, "on every trained weight"),
        ("--max-grad-norm", RATE, 1.0, "longer gradients are scaled down; 0: never"),
    ],
    "what is trained": [
        ("--freeze", {"metavar": "NAME", "nargs": "+", "choices": sorted(FREEZABLE)}, [], ", ".join(FREEZABLE)),
        ("--lora-rank", N, None, "train adapters of this rank on the decoder's linears, only these"),
        ("--lora-alpha", POSITIVE, None, "adapters count alpha / rank times; default 4 times the rank"),
        ("--draft-layers", N, None, "train a head of this many layers that guesses tokens, only this"),
    ],
    "processes and memory": [
        ("--tp", N, 1, "tensor-parallel size"),
        ("--pp", N, 1, "pipeline-parallel size; the rest is data-parallel"),
        ("--sequence-parallel", FLAG, False, "split norms and residuals along the tokens inside --tp ranks"),
        ("--micro-batch-size", N, 1, "samples that go through the model together"),
        ("--activation-checkpointing", FLAG, False, "keep layers' inputs only: less memory, more time"),
        ("--dtype", {"choices": ["bfloat16", "float32"]}, "bfloat16", "of weights and activations"),
        ("--timeout", {"metavar": "S", "type": number(float, 5, 1e9)}, 300, "a rank silent for this long is gone"),
    ],
    "saving and validating": [
        ("--save-every", N, None, "steps between saved states; default: ten minutes"),
        ("--keep", N, 2, "how many saved states are kept, the newest"),
        ("--resume", FLAG, False, "go on from the newest state in --out, if there is one"),
        ("--val", CHATS, None, "chats to validate with"),
        ("--val-every", N, None, "steps between validations; default: one after the last step"),
        ("--val-generate", FLAG, False, "answer the validation chats too, and count exact answers"),
    ],
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s --data FILE.jsonl --out DIR [options]")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, takes, default, text in options:
            group.add_argument(flag, default=default, help=text, **takes)
    args = parser.parse_args(argv)
    started = (args.ckpt is None) != (args.init is None) and (args.init is None) == (args.tokenizer is None)
    require(started, "start from --ckpt DIR, or from --init CONFIG.json with --tokenizer DIR")
    validates = args.val_every or args.val_generate
    require(args.val or not validates, "--val-every and --val-generate need --val FILE.jsonl")
    split = args.val_generate and args.sequence_parallel
    require(not split, "--val-generate does not go with --sequence-parallel: a new token cannot be split")
    require(args.lora_rank or not args.lora_alpha, "--lora-alpha goes with --lora-rank N")
    require(max(args.betas) < 1, "--betas must lie below 1")
    whole = ("init", "freeze", "lora_rank", "pp", "sequence_parallel") if args.draft_layers else ()
    others = [f"--{name.replace('_', '-')}" for name in whole if getattr(args, name) != parser.get_default(name)]
    require(
        not others, f"--draft-layers trains beside a checkpoint, over --tp and replicas; leave out {', '.join(others)}"
    )
    lower = args.min_lr <= args.lr
    require(lower, f"--min-lr must not exceed --lr: {args.min_lr:g} is more than {args.lr:g}")
    args.lora_alpha = args.lora_alpha or 4.0 * (args.lora_rank or 0)
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    place = find_place(args.tp, args.pp)
    place = replace(place, sequence_parallel=args.sequence_parallel and args.tp > 1)
    with RunFolder(args, place) as folder:
        if folder.finished:
            folder.say_finished()
        else:
            (DraftTrainer if args.draft_layers else Trainer)(args, place, folder).train()


if __name__ == "__main__":
    run_program(main)
