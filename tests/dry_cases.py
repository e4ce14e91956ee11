"""The scenarios of the dry run: what a rank of the 128B does, and what was seen of it (see dry_run.py).

Each function is called in the process that pretends, and returns reports of `Watch`. With `layers` the model has fewer
of them, each at full size.
"""

import os
import re
import shlex
from dataclasses import replace

import torch
from dry_run import Watch, world
from processes import ROOT, read

import checkpoint
import train
from checkpoint import Stored, fill, is_quantized, layers_with_slices, scale_names
from config import Config, read_config
from model import MistralMedium
from optimizer import Optimizer
from parallel import Place, Slice
from pipeline import MicroBatch, Pipeline

CONFIG = os.path.join(ROOT, "tests", "data", "config.json")


def real_config(layers: int | None) -> Config:
    config = read_config(CONFIG)
    return replace(config, num_hidden_layers=layers) if layers else config


class Shelf(checkpoint.Checkpoint):
    """A checkpoint of the whole model whose files are never read: their tensors have no values."""

    def __init__(self, config: Config, fp8: bool):
        self.directory, self.native, self.bytes_read = "shelf", False, 0
        names = list(layers_with_slices(MistralMedium(config)))
        self.quantized = {name for name in names if fp8 and is_quantized(name)}
        names += [scale for name in self.quantized for scale in scale_names(name)]
        self.tensors = {name: Stored(self.shard(name), name) for name in names}

    def shard(self, name: str) -> str:
        """A file for each layer, and the head, the largest weight, in the last one: then all the others are there."""
        layer = re.match(r"layers\.(\d+)", name)
        return f"{'b' if layer else 'c' if 'lm_head' in name else 'a'}{int(layer[1]) if layer else 0:03d}"

    def file(self, path: str):
        return {}  # no tensors but those of the index

    def weight(self, name: str, part: Slice, config: Config):
        shape = list(part.local_shape)
        shape[part.dim] = part.length
        fp8 = name in self.quantized
        dtype = checkpoint.fp8.E4M3 if fp8 else torch.bfloat16
        return torch.empty(shape, dtype=dtype), self.scale(name) if fp8 else None

    def scale(self, name: str):
        return torch.ones(())

    def close(self) -> None:
        pass


def filling(watch: Watch, rank: int = 0, tp: int = 1, pp: int = 1, layers: int | None = None, keep_fp8: bool = True):
    """The whole FP8 checkpoint onto the GPU, kept or dequantized."""
    config = real_config(layers)
    with world(rank, tp, pp) as place, watch:
        watch.forget()
        model = MistralMedium(config, place, torch.bfloat16, keep_fp8)
        fill(model, Shelf(config, fp8=True))
        return watch.report()


# -------------------------------------------------------------------------------------------------------- training


def recipe() -> list[str]:
    """The options of the published fine-tune, as examples/medpix.sbatch gives them to train.py."""
    text = read(os.path.join(ROOT, "examples", "medpix.sbatch"))
    return shlex.split(re.search(r'--out "\$OUT"\n(.*?)\n\)', text, re.DOTALL)[1])


def training_step(
    watch: Watch,
    rank: int,
    micro_batches: int,
    images: bool = False,
    layers: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    more: list[str] = (),
):
    """A step of the published recipe with the options `more` besides; `tp` and `pp` in place of its own.

    Every sample has --max-length tokens, all of them targets. With `images` most of them are of one image each.
    """
    argv = ["--ckpt", "shelf", "--data", "chats.jsonl", "--val", "chats.jsonl", "--out", "run", *recipe(), *more]
    for flag, size in (("--tp", tp), ("--pp", pp)):
        argv += [flag, str(size)] if size else []
    args, config = train.parse_args(argv), real_config(layers)
    train.check_memory = lambda *arguments: None  # `plan.py` has its own tests
    with world(rank, args.tp, args.pp) as place, watch:
        place = replace(place, sequence_parallel=args.sequence_parallel)
        trainer = make_trainer(args, place, config)
        batches = [micro_batch(i, args.max_length, config, images and place.first_stage) for i in range(micro_batches)]
        watch.forget()
        trainer.step(1, (batches, batches, lambda: None))
        report = watch.report() | {"held": trainer.pipeline.most_held, "rank": rank}
    return report


def make_trainer(args, place: Place, config: Config) -> train.Trainer:
    """A Trainer but for its files: chats, tokenizer, states."""
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.args, trainer.place, trainer.config = args, place, config
    trainer.checkpoint = Shelf(config, fp8=bool(args.lora_rank))
    trainer.states, trainer.total, trainer.saved, trainer.signal = "states", 10, 0.0, 0
    trainer.model = trainer.build_model()
    decoupled = args.optimizer == "adamw"
    trainer.optimizer = Optimizer(trainer.model, args.betas, args.eps, args.weight_decay, decoupled)
    trained = bool(trainer.optimizer.buckets)
    trainer.pipeline = Pipeline(place, trainer.forward, config.hidden_size, trainer.model.dtype, trained)
    return trainer


def micro_batch(number: int, length: int, config: Config, image: bool) -> MicroBatch:
    tokens, cell = torch.zeros(1, length, dtype=torch.long), config.vision.patch_size * config.vision.spatial_merge_size
    side = int(length**0.5) - 2  # cells; a row ends with one token more
    pixels = [torch.zeros(3, side * cell, side * cell, dtype=torch.bfloat16)] if image else []
    return MicroBatch(tokens, torch.zeros_like(tokens), [number], [], length, pixels)
