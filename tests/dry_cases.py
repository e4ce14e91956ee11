"""The scenarios of the dry run: what a rank of the 128B does, and what was seen of it (see dry_run.py).

Each function is called in the process that pretends, and returns reports of `Watch`. With `layers` the model has fewer
of them, each at full size.
"""

import argparse
import os
import re
import shlex
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dry_run import Watch, world
from processes import ROOT, read

import generate
import train
from generate import Engine
from model import Config, attend
from parallel import Pipeline, Place, Slice, parts_of
from runtime import checkpoint
from runtime.checkpoint import Stored, fill, is_quantized, scale_names
from runtime.config import read_config
from runtime.data import MicroBatch
from runtime.draft import Eagle, Head
from runtime.optimizer import Optimizer
from runtime.requests import Request
from vision import build_model

sys.path.append(os.path.join(ROOT, "benchmarks"))
generate.record = lambda step, pool: (step, pool)  # there are no CUDA graphs here; what one would replay is counted
CONFIG = os.path.join(ROOT, "tests", "data", "config.json")


def real_config(layers: int | None, sizes: dict | None = None) -> Config:
    """With `layers` the decoder has this many of them, and the tower two. `sizes` replaces others, "vision" some of the
    tower's, or the whole tower by None."""
    config, sizes = read_config(CONFIG), dict(sizes or {})
    tower = sizes.pop("vision", {})
    config = replace(config, **sizes, vision=None if tower is None else replace(config.vision, **tower))
    if layers is None:
        return config
    return replace(
        config, num_hidden_layers=layers, vision=config.vision and replace(config.vision, num_hidden_layers=2)
    )


class Shelf(checkpoint.Checkpoint):
    """A checkpoint of the whole of `model` whose files are never read: their tensors have no values."""

    def __init__(self, model: torch.nn.Module, fp8: bool):
        self.title, self.native, self.bytes_read, self.passed_over = "shelf", False, 0, set()
        names = list(parts_of(model))
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
        model = build_model(config, place, torch.bfloat16, keep_fp8)
        fill(model, Shelf(build_model(config), fp8=True))
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
    sizes: dict | None = None,
    instead: list[str] | None = None,
    fp8: bool = True,
):
    """A step of the published recipe with the options `more` besides; `tp` and `pp` in place of its own. `instead`: all
    options, in place of the recipe's. `sizes`: see `real_config`. `fp8`: what LoRA or a draft's head starts from.

    Every sample has --max-length tokens, all of them targets. With `images` all of them are of one image each.
    """
    argv = ["--ckpt", "shelf", "--data", "chats.jsonl", "--val", "chats.jsonl", "--out", "run"]
    argv += [*(recipe() if instead is None else instead), *more]
    for flag, size in (("--tp", tp), ("--pp", pp)):
        argv += [flag, str(size)] if size else []
    args, config = train.parse_args(argv), real_config(layers, sizes)
    train.check_memory = lambda *arguments: None  # `plan.py` has its own tests
    with world(rank, args.tp, args.pp) as place, watch:
        place = replace(place, sequence_parallel=args.sequence_parallel)
        trainer = make_trainer(args, place, config, fp8 and bool(args.lora_rank or args.draft_layers))
        shape = args.micro_batch_size, args.max_length
        batches = [micro_batch(i, shape, config, images and place.first_stage) for i in range(micro_batches)]
        watch.forget()
        trainer.step(1, (batches, batches, lambda: None))
        report = watch.report() | {"held": trainer.pipeline.most_held, "rank": rank}
    return report


def make_trainer(args, place: Place, config: Config, fp8: bool) -> train.Trainer:
    """A Trainer but for its files: chats, tokenizer, states."""
    kind = train.DraftTrainer if args.draft_layers else train.Trainer
    trainer = kind.__new__(kind)
    trainer.args, trainer.place, trainer.config = args, place, config
    trainer.checkpoint = Shelf(build_model(config), fp8)
    trainer.total = 10
    trainer.model = trainer.build_model()
    trainer.learner = trainer.build_learner()
    decoupled = args.optimizer == "adamw"
    trainer.optimizer = Optimizer(trainer.learner, args.betas, args.eps, args.weight_decay, decoupled)
    trained = bool(trainer.optimizer.buckets)
    trainer.pipeline = Pipeline(place, trainer.forward, config.hidden_size, trainer.model.dtype, trained)
    return trainer


def micro_batch(number: int, shape: tuple[int, int], config: Config, image: bool) -> MicroBatch:
    """B samples of T tokens; with an image each, which is as long as the sample: nobody looks at its tokens' values."""
    (B, T), tokens = shape, torch.zeros(shape, dtype=torch.long)
    pixels = [picture(config, 1, T) for _ in range(B)] if image else []
    return MicroBatch(tokens, torch.zeros_like(tokens), [number] * B, [], [], B * T, pixels)


def picture(config: Config, rows: int, columns: int) -> torch.Tensor:
    """An image of rows × columns tokens."""
    cell = config.vision.patch_size * config.vision.spatial_merge_size
    return torch.zeros(3, rows * cell, columns * cell, dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------------- inference


def answering(
    watch: Watch,
    rank: int,
    tp: int,
    pp: int,
    prompts: list[int],
    keep_fp8: bool = True,
    layers: int | None = None,
    images: bool = False,
    temperature: float = 0.0,
    tokens: int = 4,
    logprobs: bool = False,
    draft_tokens: int = 0,
    flash_decoding: bool = True,
    units: bool = True,
) -> list[list]:
    """`Engine.generate` for prompts of so many tokens, all together: [phase, report] of each of the engine's calls.

    Phases are "prefill" and "decode", methods of the engine, and "rest", what lies between them. `units`: whether the
    GPU has units for FP8. With `draft_tokens` a head of two layers guesses so many a step.
    """
    checkpoint.fp8.has_fp8_matmul = lambda device: units
    config, seen, watch.flash_decoding = real_config(layers), [], flash_decoding
    with world(rank, tp, pp) as place, watch:
        model = build_model(config, place, torch.bfloat16, keep_fp8)
        fill(model, Shelf(build_model(config), fp8=keep_fp8))
        model.eval()
        draft = None
        if draft_tokens:
            head = Head(replace(config, num_hidden_layers=2, vision=None), place, torch.bfloat16, keep_fp8)
            fill(head, Shelf(head, fp8=keep_fp8))
            draft = Eagle(head.eval(), model, draft_tokens)
        engine = Engine(model, 2, config.max_position_embeddings, draft)

        def phase(name: str) -> None:
            """What was seen since the last call belongs to `name`."""
            seen.append([name, watch.report()])
            watch.forget()

        def marked(name: str, method):
            def call(*arguments, **options):
                phase("rest")
                result = method(*arguments, **options)
                phase(name)
                return result

            return call

        for name in ("prefill", "decode"):
            setattr(engine, name, marked(name, getattr(engine, name)))
        requests = [request(config, n, images and place.first_stage, temperature, tokens) for n in prompts]
        for each in requests:
            each.logprobs = logprobs
        watch.forget()
        engine.generate(requests)
        phase("rest")
    return seen


def request(config: Config, length: int, image: bool, temperature: float, tokens: int) -> Request:
    """A prompt of `length` tokens, most of them of one image, if there is one."""
    prompt, pixels = [1] * length, []
    if image:
        side = int(length**0.5) - 2  # a row ends with one token more
        pixels = [picture(config, side, side)]
        prompt[1 : 1 + side * side] = [config.vision.image_token_id] * side * side
    return Request(prompt, pixels, tokens, temperature)


def flagship(watch: Watch, layers: int) -> dict:
    """benchmarks/flagship.py from end to end, with so many layers."""
    import flagship as program

    torch.cuda.get_device_name = lambda *device: "a GPU that is none"
    program.count_kernels, program.RUNS = lambda action, device: action() and 0, 1  # a profiler would see nothing
    sizes = argparse.Namespace(matrix=1024, copied=1 << 20, prompt=5000, decode_at=512, new_tokens=4, length=256)
    with world(0, 8, 1) as place, watch:
        watch.forget()
        rows = program.benchmark(real_config(None), place, layers, sizes)
        return watch.report() | {"rows": rows}


# ---------------------------------------------------------------------------------------------------- what is wrong


def mistakes(watch: Watch) -> dict[str, dict]:
    """One small mistake of each kind, and what was seen of it."""
    seen = {}

    def product(a_shape, b_shape, scale_a, scale_b, a_stride=None, out_dtype=torch.bfloat16, spread=False):
        K, N = b_shape
        a = torch.empty_strided(a_shape, a_stride or (K, 1), dtype=checkpoint.fp8.E4M3, device="cuda")
        b = torch.empty(N, K, dtype=checkpoint.fp8.E4M3, device="cuda").t()
        scales = (torch.empty(() if spread else shape, device="cuda").expand(shape) for shape in (scale_a, scale_b))
        torch._scaled_mm(a, b, *scales, out_dtype=out_dtype)

    with world(0, 2, 1) as place, watch:
        x, host = torch.empty(4, 64, device="cuda"), torch.empty(4, 64)
        query = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16, device="cuda")
        mask = torch.ones(4, 4, dtype=torch.bool, device="cuda")
        kinds = {
            "right": lambda: product((32, 64), (64, 48), (), ()),
            "right, by rows": lambda: product((32, 64), (64, 48), (32, 1), (1, 48)),
            "right, one row": lambda: product((1, 64), (64, 48), (1, 1), (1, 48)),
            "devices": lambda: x + host,
            "group": lambda: dist.all_gather([host, host], x, group=place.tp_group),
            "sizes": lambda: product((32, 72), (72, 48), (), ()),
            "layout": lambda: product((32, 64), (64, 48), (), (), a_stride=(1, 32)),
            "scales": lambda: product((32, 64), (64, 48), (), (1, 48)),
            "scale's shape": lambda: product((32, 64), (64, 48), (1, 32), (1, 48)),
            "scale's stride": lambda: product((1, 64), (64, 48), (1, 1), (1, 48), spread=True),
            "result": lambda: product((32, 64), (64, 48), (32, 1), (1, 48), out_dtype=torch.float32),
            "item": lambda: float(x.sum()),
            "truth": lambda: bool((x > 0).all()),
            "list": lambda: x[0].tolist(),
            "nonzero": lambda: (x > 0).nonzero(),
            "bool": lambda: x[x > 0],
            "to the host": lambda: x.cpu(),
            "to the GPU": lambda: host.to("cuda"),
            "from a list": lambda: torch.tensor([1, 2], device="cuda"),
            "mask": lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask),
            "lower right": lambda: attend(query[:, :, :2], query, query),
            "not square": lambda: F.scaled_dot_product_attention(query[:, :, :2], query, query, is_causal=True),
            "float32": lambda: F.scaled_dot_product_attention(*[query.float()] * 3),
        }
        for name, make in kinds.items():
            watch.forget()
            try:
                make()
                seen[name] = watch.report()
            except Exception as error:
                seen[name] = watch.report() | {"raised": str(error)}
    return seen
