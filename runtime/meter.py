"""What a GPU would do, counted without one: memory, operations and messages of the real code on tensors that have only
shapes.

A tensor on `meta` runs what every device runs. `Meter` watches the operations; `train_on_shapes` and `infer_on_shapes`
run a few layers of a rank's part of the model under it, which stand for all of them. `plan.py` makes a table of it.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fp8
from model import LOGIT_ROWS, Config
from parallel import Pipeline, Place
from runtime.lora import add_adapters
from runtime.optimizer import held_tensors, is_trained
from vision import PATCHES_AT_ONCE, build_model


@dataclass(frozen=True)
class Gpu:
    """Published peaks: operations/s of dense products, bytes/s of memory and, in one direction, of the links."""

    bf16: float
    fp8: float  # 0: it has none
    memory: float
    nvlink: float  # inside a node of 8
    network: float  # between nodes, per GPU: HDR or NDR InfiniBand
    gigabytes: float


GPUS = {
    "a100": Gpu(312e12, 0, 2.039e12, 300e9, 25e9, 80),
    "h100": Gpu(989e12, 1979e12, 3.35e12, 450e9, 50e9, 80),
    "h200": Gpu(989e12, 1979e12, 4.8e12, 450e9, 50e9, 141),
}

PRODUCTS, COPIES, LINKS = 0.7, 0.8, 0.7  # what is reached of them

KERNEL, MESSAGE = 3e-6, 15e-6  # seconds that each takes at least


class Meter(TorchDispatchMode):
    """Counts what operations on `meta` tensors would do on a GPU. `with Meter(…) as meter:` around them, and the model.

    peak: the most bytes that were alive at once, in blocks of 512 as CUDA's allocator cuts them; now: at this moment.
    kernels: of each its products' operations, whether they are in FP8, and the bytes that it reads and writes.
    messages: of each the bytes that a rank sends, and whether they go to another stage or replica.

    A tensor on `meta` runs what every device runs, but for three things, which are replaced meanwhile: the fused
    kernels of attention and RMSNorm, which keep less than the composed ones; products in FP8; and messages, which need
    neither groups nor peers here.
    """

    def __init__(self, tp: int = 1, fp8_products: bool = True, timed: bool = False):
        super().__init__()
        self.timed, self.tp, self.now, self.peak, self.alive = timed, tp, 0, 0, set()
        self.kernels: list[tuple[float, bool, int]] = []
        self.messages: list[tuple[float, bool]] = []
        moved = (tp - 1) / tp  # a ring sends every part of a tensor but one, twice to sum up
        sums, parts = self.message(lambda x, _: 2 * moved * x.nbytes), self.message(self.flat)
        send, nothing = self.message(lambda x, _: x.nbytes), self.message(lambda x, _: 0)
        size, rank = (lambda group=None: tp), (lambda group=None: 0)
        talk = dict(all_reduce=sums, all_gather=parts, reduce_scatter=parts, isend=send, recv=nothing, broadcast=send)
        self.replaced = [
            mock.patch.multiple(dist, get_world_size=size, get_rank=rank, **talk),
            mock.patch.object(F, "scaled_dot_product_attention", flash_attention),
            mock.patch.object(F, "rms_norm", FusedNorm.instead),
            mock.patch("torch.nn.attention.bias.CausalBias", lambda *sizes: "no tensor"),
            mock.patch.object(fp8, "has_fp8_matmul", lambda device: fp8_products),
        ]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports its compiler first, only to keep it out of here: seconds
        return False

    def __enter__(self):
        for each in self.replaced:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        for each in self.replaced:
            each.stop()
        return super().__exit__(*error)

    def message(self, size: Callable):
        """A function of torch.distributed that sends `size(…)` bytes."""

        def talk(x, other=None, group=None, **options):
            if nbytes := size(x, other):
                self.messages.append((nbytes, group != "tp"))
            return SimpleNamespace(wait=lambda: None)

        return talk

    def flat(self, a, b) -> float:
        """Bytes of an all-gather or a reduce-scatter; NCCL copies the list of parts to or from one buffer."""
        parts, one = (a, b) if isinstance(a, list) else (b, a)
        one.new_empty(len(parts) * one.numel())
        return (len(parts) - 1) * one.nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.removeprefix("aten::")
        out = quick(function, name, args, kwargs)
        out = function(*args, **kwargs) if out is None else out
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device.type == "meta"]
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self.alive:
                size = -(-storage.nbytes() // 512) * 512
                self.alive.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, key, size)
        if self.timed and outputs and not (function.is_view or name in ("detach", "_unsafe_view") or "empty" in name):
            self.kernels.append(self.kernel(function, name, args, kwargs, out, outputs))
        return out

    def freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def seconds(self, gpu: Gpu, pp: int) -> tuple[float, float]:
        """(floor, estimate) of what was counted, with so many stages. Nodes have 8 GPUs."""
        floor = estimate = 0.0
        for operations, in_fp8, nbytes in self.kernels:
            compute, memory = operations / (gpu.fp8 if in_fp8 else gpu.bf16), nbytes / gpu.memory
            floor += max(compute, memory) if operations else 0
            estimate += max(compute / PRODUCTS, memory / COPIES, KERNEL)
        for nbytes, across in self.messages:
            far = (self.tp * pp if across else self.tp) > 8
            estimate += MESSAGE + nbytes / (gpu.network if far else gpu.nvlink) / LINKS
        return floor, estimate

    def kernel(self, function, name: str, args, kwargs, out, outputs: list[torch.Tensor]) -> tuple[float, bool, int]:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        sizes = [min(x.nbytes, x.untyped_storage().nbytes()) for x in (*inputs, *outputs)]  # the latter if it repeats
        if name.startswith(("embedding", "index", "gather", "_index_put")):  # reads or writes some rows of a table
            sizes = [2 * min(sizes)] if len(sizes) < 3 else [2 * size for size in sorted(sizes)[:-1]]
        operations = 0
        if count := flop_registry.get(function._overloadpacket):
            operations = count(*(x for x in args if not isinstance(x, torch.dtype)), **kwargs, out_val=out)
            named = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
            if named.get("is_causal"):  # query i of T sees S - T + i keys of S
                operations *= 1 - named["query"].shape[2] / named["key"].shape[2] / 2
        return operations, name == "_scaled_mm", sum(sizes)


def quick(function, name: str, args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The results of the most frequent functions: what torch does on `meta` is Python, too, and much slower."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if not tensors or tensors[0].device.type != "meta" or kwargs.keys() - {"alpha", "approximate"}:
        return None
    x = max(tensors, key=torch.Tensor.numel)
    if name == "nonzero":  # values are not known: take all of them
        return x.new_empty(x.numel(), x.dim(), dtype=torch.long)
    if name == "mm":
        return x.new_empty(len(args[0]), args[1].shape[1])
    if torch.Tag.pointwise in function.tags and function._schema.returns[0].alias_info:  # in place
        return args[0]
    if name in ("add", "mul", "sub", "div", "pow", "rsqrt", "silu", "silu_backward"):
        if all(y.shape in (x.shape, x.shape[-1:], ()) for y in tensors):
            dtypes = [y.dtype for y in tensors if y.dim() or y is x]
            return x.new_empty(x.shape, dtype=functools.reduce(torch.promote_types, dtypes))
    return None


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> torch.Tensor:
    """What CUDA takes for scaled_dot_product_attention: no matrix of scores, a logarithm of their sum per query."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal or attn_mask is not None)[0]


class FusedNorm(torch.autograd.Function):
    """The memory and traffic of CUDA's fused RMSNorm: it keeps its input and one float32 number per row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return grad * x, None if weight is None else torch.empty_like(weight)

    @staticmethod
    def instead(x, shape, weight=None, eps=None):
        return FusedNorm.apply(x, weight)


class _Unbuilt(torch.autograd.Function):
    """x, and what layers that were not built would keep for the backward pass: `nbytes`, as long as the graph lives."""

    @staticmethod
    def forward(ctx, x, nbytes):
        ctx.memory = x.new_empty(nbytes, dtype=torch.uint8)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def small(config: Config, place: Place, layers: int = 2) -> tuple[Config, Place]:
    """A model with at most so many layers per stage and in the tower, and the place in it that stands for `place`: at
    the same end of the pipeline, if at one, and holding as many micro-batches, but at most three."""
    layers = min(layers, len(place.layers(config.num_hidden_layers)))
    rank, behind = min(1, place.pp_rank), min(3, place.pp_size - place.pp_rank)
    here = replace(place, pp_rank=rank, pp_size=rank + behind, device=torch.device("meta"))
    here = replace(here, rank=0, tp_rank=0, tp_group="tp" if place.tp_size > 1 else None)
    vision = config.vision and replace(config.vision, num_hidden_layers=min(2, config.vision.num_hidden_layers))
    return replace(config, num_hidden_layers=layers * here.pp_size, vision=vision), here


@functools.cache
def train_on_shapes(
    config: Config, place: Place, rows, m: int, checkpointing, freeze, lora_rank, keep_fp8, dtype, unbuilt, timed=False
) -> tuple[Meter, int, int]:
    """The passes of a training step on the rank at `place`, with `m` micro-batches of `rows` (B, T).

    `unbuilt` layers of the stage and of the tower keep as much as the last that is built. Returns what was counted, the
    bytes at the worst moment, and those that one more held micro-batch adds.
    """
    (B, T), device = rows, place.device
    with Meter(place.tp_size, timed=timed) as meter:
        model = build_model(config, place, dtype, keep_fp8)
        for tensor in held_tensors(model):
            tensor.parameter.requires_grad_(is_trained(tensor.name, freeze))
        if lora_rank:
            add_adapters(model, lora_rank, 1.0)
        for parameter in model.parameters():  # optimizer.py adds a gradient to its FP32 sum at once
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        model.activation_checkpointing = checkpointing
        kept, begun = Counter(), {}  # bytes when a layer begins; what lives more when it has ended is what it keeps

        def begin(*_) -> None:
            if "layer" not in begun:  # else it is computed once more, in a backward pass
                begun.update(layer=meter.now, peak=meter.peak)
                meter.peak = meter.now

        [*model.layers.values()][-1].register_forward_pre_hook(begin)
        if sees := config.vision is not None and place.first_stage and not timed:
            model.vision.vision_tower.activation_checkpointing = checkpointing
            layers = model.vision.vision_tower.transformer["layers"]
            layers[0].register_forward_pre_hook(lambda *_: begun.update(tower=meter.now))
            # Once for every group of images:
            layers[-1].register_forward_pre_hook(lambda *_: kept.update(tower=meter.now - begun["tower"]))
        marks: list[int] = []

        def forward(x: torch.Tensor | None, batch) -> torch.Tensor:  # as Trainer.forward, with every token a target
            marks.append(meter.now)
            kept.clear(), begun.clear()
            if place.first_stage:
                features = model.vision([picture(config, T)] * B) if sees else None
                if sees and features.requires_grad:
                    features = _Unbuilt.apply(features, unbuilt[1] * kept["tower"])
                x = model.embed(torch.empty(B, T, dtype=torch.long, device=device), features)
            y = model(x)
            joined = y.nbytes * (1 - 1 / place.token_parts) if place.last_stage else 0  # by the model's last act
            others = unbuilt[0] * int(meter.now - begun["layer"] - joined) * y.requires_grad
            meter.peak = max(begun["peak"], meter.peak + others)  # they came before the last
            x = _Unbuilt.apply(y, others)
            del y
            if not place.last_stage:
                return x
            at = torch.empty(B * T, dtype=torch.long, device=device)
            losses = model.lm_head.cross_entropy(model.logits(x.flatten(0, 1)[at]), at)
            return losses.sum() / len(at)

        alone = replace(place, device=torch.device("cpu"))  # it asks its peers, by a tensor with a value
        pipeline = Pipeline(alone, forward, config.hidden_size, dtype, True)
        pipeline.down.device = pipeline.up.device = device
        pipeline.gradient_up = place.pp_rank > 0
        start = meter.peak = meter.now
        meter.kernels.clear()
        pipeline.train([SimpleNamespace(shape=rows)] * m)
        return meter, meter.peak - start, marks[2] - marks[1] if len(marks) > 2 else 0


def picture(config: Config, tokens: int) -> torch.Tensor:
    """An image of so many tokens, all in one row."""
    cell = config.vision.patch_size * config.vision.spatial_merge_size
    return torch.empty(3, cell, cell * tokens, device="meta")


@functools.cache
def infer_on_shapes(
    config: Config, place: Place, start: int, tokens: int, keep_fp8: bool, dtype, fp8_products: bool, timed=False
) -> tuple[Meter, int]:
    """A chunk of `tokens` from position `start` on, through the rank at `place`; for one token, with the next sampled.

    Nothing but hidden states goes from layer to layer. As many images come first as go through the tower at a time;
    where time is counted, none. Returns what was counted, and the bytes at the worst moment.
    """
    with Meter(place.tp_size, fp8_products, timed) as meter, torch.no_grad():
        model = build_model(config, place, dtype, keep_fp8)
        model.join()
        static = torch.empty((), device="meta") if config.activation_scheme == "static" else None
        for layer in model.modules():
            if joined := getattr(layer, "joined", None):
                joined.rows_of(joined.layers[0], place.device)
            if getattr(layer, "weight_scale", None) is not None:
                layer.activation_scale = static
        model.pack()
        cache, features = model.new_cache(1, start + tokens), None
        begin = meter.peak = meter.now
        for part in (part for layer in model.layers.values() for part in (layer.self_attn, layer.mlp)):
            if part.joined and keep_fp8:
                part.joined.read_scales()  # in the first step: their memory counts in all of them, their time in none
        meter.kernels.clear()
        if place.first_stage:
            if config.vision is not None and not timed:
                v = config.vision
                most = max(PATCHES_AT_ONCE, (v.image_size // v.patch_size) ** 2) // v.spatial_merge_size**2
                features = model.vision([picture(config, min(start + tokens, most))])
            x = model.embed(torch.empty(1, tokens, dtype=torch.long, device="meta"), features)
        else:
            x = torch.empty(1, tokens, config.hidden_size, dtype=dtype, device="meta")
        at = torch.empty(1, dtype=torch.long, device="meta")
        x = model(x, model.step_span(at, start + 1) if tokens == 1 else start, cache)
        if place.last_stage:
            logits = model.logits(x[0, -LOGIT_ROWS:])
            model.lm_head.log_probabilities(logits, torch.empty(len(logits), dtype=torch.long, device="meta"))
        else:
            dist.isend(x)
        return meter, meter.peak - begin
