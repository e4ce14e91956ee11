"""Write a checkpoint in the HF layout, in FP8 or BF16: from the ranks of a training run, or from another checkpoint.

    python fp8.py IN OUT --calibrate CHATS.jsonl
    python fp8.py IN OUT --to bfloat16

Either way the tensors come as a stream, one shard in memory at a time. FP8 weights get one float32 scale each. With
--calibrate the model runs over some chats first (all of it in memory, in BF16), and the largest input that each linear
saw becomes its static activation scale. Without, scales that are there stay, or activations are scaled dynamically.
"""

import glob
import json
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import fp8
from model import Config, MistralMedium
from parallel import Place, Slice, parts_of
from runtime.checkpoint import Checkpoint, check_names, fill, hf_name, is_quantized, scale_names
from runtime.config import read_config
from runtime.data import Chats, MicroBatch, decode_images, micro_batches
from runtime.files import flush_to_disk, lock, new_folder, remove, require, write_json, writing
from runtime.launch import Parser, all_or_none, gather_objects
from runtime.lora import merged
from runtime.memory import cpu_memory
from runtime.native import interleaved, native_name, to_params
from runtime.optimizer import held_tensors
from runtime.tokenizer import load_tokenizer
from vision import build_model

SHARD_BYTES = 4_000_000_000  # a file written is at most about this large

# How the names of the decoder's linears end, as peft and SGLang find them; those of the vision tower end otherwise.
PEFT_TARGETS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]

# What an export takes along from its source. Other files may be weights in other formats, or tell of another model.
COMPANIONS = "tekken.json tokenizer*.json *.model *.model.v* special_tokens_map.json added_tokens.json"
COMPANIONS += " vocab.json vocab.txt merges.txt preprocessor_config.json processor_config.json generation_config.json"
COMPANIONS += " chat_template.jinja chat_template.json SYSTEM_PROMPT.txt"


@contextmanager
def staged(path: str, rank: int = 0, advice: str = "make room, or choose another place") -> Iterator[str]:
    """A new folder for all ranks to write into; it takes the name `path` when it is whole and on the disk.

    All ranks come here: what stops one of them in the block stops all, and nothing is left behind. If `path` holds
    files already, those of the same names are replaced and the others stay; a link is replaced, too, and not followed.
    Raises UserError, on all ranks.
    """
    # In containers process ids repeat, so the name is random, and rank 0's is everyone's.
    unfinished = gather_objects(f"{path.rstrip('/')}.partial-{secrets.token_hex(4)}")[0]
    with ExitStack() as stack:
        with all_or_none(), writing(path, advice):
            if rank == 0:
                stack.enter_context(new_folder(unfinished))
        with all_or_none(), writing(path, advice):
            yield unfinished
        with all_or_none(), writing(path, advice):
            if rank == 0:
                put_in_place(unfinished, path)


def put_in_place(folder: str, path: str) -> None:
    """Write `folder` to the disk, and let it, or in a folder that is there its files, take their names."""
    # A model counts as whole as soon as its config is there, a saved state with its index.
    names = sorted(os.listdir(folder), key=lambda name: (name in ("config.json", "params.json"), name))
    for name in ("", *names):
        flush_to_disk(os.path.join(folder, name))
    if os.path.islink(path):
        remove(path)
    if os.path.isdir(path) and os.listdir(path):
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(path, name))
            flush_to_disk(path)  # one by one, so that the last name is not on the disk before the others
    else:
        os.rename(folder, path)
    flush_to_disk(os.path.dirname(os.path.abspath(path)))


def save(directory: str, config: Config, weights: Iterable, source: str | None) -> None:
    """Write a checkpoint into a new folder, which appears under its name when it is whole; see `write_model`."""
    with new_model(directory) as folder:
        write_model(folder, config, weights, source)


@contextmanager
def new_model(path: str) -> Iterator[str]:
    """`staged`, for one process and a `path` that is free: absent, or an empty folder.

    What could not take the name at the end is refused at the beginning: a mount point, a link, ".", and a folder into
    which another process is writing already.
    """
    check_free(path)
    with staged(path) as folder, ExitStack() as stack:
        lock(folder, stack)
        yield folder
        # Where there are no locks: `staged` would replace what another process wrote meanwhile.
        is_free = not os.path.isdir(path) or not os.listdir(path)
        require(is_free, f"{path}: another process wrote there meanwhile; choose a new folder")


def check_free(path: str) -> None:
    """Raises UserError unless a folder can be renamed to `path`, which is tried with an empty one."""
    name = path.rstrip("/") or path
    require(not os.path.islink(name), f"{path}: is a link; choose a new folder, or remove the link")
    was_there = os.path.isdir(name)
    is_free = not os.listdir(name) if was_there else not os.path.exists(name)
    require(is_free, f"{path}: already exists; choose a new folder or remove it")
    with ExitStack() as stack, writing(path):
        for other in glob.glob(f"{glob.escape(name)}.partial-*"):
            lock(other, stack)
    parent = os.path.dirname(os.path.abspath(name))
    with writing(path, "choose a new folder"):
        os.makedirs(parent, exist_ok=True)
        with TemporaryDirectory(dir=parent) as folder:
            os.mkdir(probe := os.path.join(folder, "probe"))
            os.rename(probe, name)
        if not was_there:
            os.rmdir(name)


def write_model(folder: str, config: Config, weights: Iterable, source: str | None) -> None:
    """Write a checkpoint in the HF layout: sharded safetensors with an index, `config.json`, and the tokenizer's files.

    `weights` yields (canonical name, whole tensor of any dtype), followed by its scale if it is FP8 already, and by its
    input's static scale if there is one; see `stored`. `config` decides what is written: with `config.fp8` the
    decoder's linears in E4M3, all else in BF16. `source` is the directory from which COMPANIONS come along.
    """
    shards, total = [], 0  # the names in each file
    for tensors in in_shards(stored(config, *weight) for weight in weights):
        write_tensors(os.path.join(folder, str(len(shards))), tensors)
        shards.append(list(tensors))
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        os.rename(os.path.join(folder, str(number)), os.path.join(folder, file))
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(os.path.join(folder, "model.safetensors.index.json"), index)
    write_json(os.path.join(folder, "config.json"), to_hf(config))
    for pattern in COMPANIONS.split() if source else ():
        for path in filter(os.path.isfile, glob.glob(os.path.join(glob.escape(source), pattern))):
            shutil.copyfile(path, os.path.join(folder, os.path.basename(path)))


def in_shards(stream: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of `stream`, joined to dictionaries of at most SHARD_BYTES; what is larger stays alone."""
    shard, filled = {}, 0
    for tensors in stream:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shard and filled + size > SHARD_BYTES:
            yield shard
            shard, filled = {}, 0
        shard |= tensors
        filled += size
    yield shard


def write_tensors(path: str, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    save_file(tensors, path, metadata={"format": "pt"} | metadata)
    # save_file makes it readable for its owner alone. The umask has decided for whom the new folder is.
    os.chmod(path, os.stat(os.path.dirname(path)).st_mode & 0o666)


def stored(
    config: Config, name: str, weight: torch.Tensor, scale=None, input_scale=None, spell: Callable = hf_name
) -> dict[str, torch.Tensor]:
    """What a weight becomes in the file: one tensor in BF16, or E4M3 with its scales. By name, in the HF layout.

    A weight that is FP8 already has a `scale` (0-d float32) and stays as it is; where there is none, it is measured.
    """
    if not (config.fp8 and is_quantized(name)):
        weight = weight.bfloat16() if scale is None else fp8.dequantize(weight, scale, torch.bfloat16)
        return {spell(name, config): weight.contiguous()}
    if scale is None:
        scale = fp8.scale_of(weight.abs().amax())
        weight = fp8.quantize(weight, scale)
    tensors = zip((name, *scale_names(name)), (weight.contiguous(), scale, input_scale))
    return {spell(key, config): tensor for key, tensor in tensors if tensor is not None}


def to_hf(config: Config) -> dict:
    """The `config.json` of an export: what was read, with the precision and the head that the model has by now."""
    raw = json.loads(json.dumps(config.raw))
    raw.pop("quantization_config", None)
    for section in filter(None, (raw, raw.get("text_config"), raw.get("vision_config"))):
        section.pop("torch_dtype", None)
        section["dtype"] = "bfloat16"
    for section in filter(None, (raw, raw.get("text_config"))):
        section["tie_word_embeddings"] = config.tie_word_embeddings
    if config.fp8:
        raw["quantization_config"] = dict(
            quant_method="fp8",
            activation_scheme=config.activation_scheme,
            weight_block_size=None,
            dequantize=False,
            modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
    return raw


def export(directory: str, model: nn.Module, precision: str, source: str) -> None:
    """Write the trained model in the HF layout, `precision` "bfloat16" or "fp8"; all ranks call this together.

    Adapters are merged on the way. FP8 has one scale per tensor and none for activations (they are scaled dynamically).
    The tokenizer comes from `source`.
    """
    config = replace(model.config, fp8=precision == "fp8", activation_scheme="dynamic")
    export_by(directory, model, lambda folder, stream: write_model(folder, config, stream, source))


def export_by(directory: str, model: nn.Module, write: Callable[[str, Iterator], None]) -> None:
    """`write(folder, stream)`, on rank 0, into a folder that becomes `directory`; the stream is that of `collect`."""
    stream = collect(model, adapters=False)
    with staged(directory, model.place.rank) as folder:
        try:
            if model.place.rank == 0:
                write(folder, stream)
        finally:
            for _ in stream:  # the other ranks send here; rank 0 receives the rest after an error
                pass


def export_draft(directory: str, head: nn.Module, precision: str) -> None:
    """Write a draft's `head` as it is published, in Mistral's own layout; all ranks call this together.

    `precision` is "bfloat16" or "fp8": of the layers' linears.
    """
    config = replace(head.config, fp8=precision == "fp8")

    def write(folder: str, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
        tensors = {}
        for name, weight in stream:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = interleaved(weight, config.head_dim)
            tensors |= stored(config, name, weight, spell=lambda name, config: native_name(name))
        write_tensors(os.path.join(folder, "consolidated.safetensors"), tensors)
        write_json(os.path.join(folder, "params.json"), to_params(config))

    export_by(directory, head, write)


def collect(model: nn.Module, adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors (or its adapters') on rank 0: (name, whole BF16 tensor on the CPU), one at a time.

    All ranks go through this together. The others only send their parts.
    """
    place, layers = model.place, parts_of(model)
    owned = [t for t in held_tensors(model) if t.owner and place.dp_rank == 0 and (".adapter." in t.name) == adapters]
    holders = gather_objects({t.name: t.part for t in owned})  # of every rank, the parts that come from it
    for name in dict.fromkeys(chain(*holders)):
        parts = {rank: held[name] for rank, held in enumerate(holders) if name in held}
        own = merged(*layers[name], model.dtype).cpu().contiguous() if place.rank in parts else None
        if place.rank == 0:
            yield name, assemble(own, parts, model.dtype)
        elif own is not None:
            dist.send(own, dst=0)


def assemble(own: torch.Tensor | None, parts: dict[int, Slice], dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor on rank 0, in BF16, from its `own` part and what other ranks send; `parts` are by rank."""
    whole = torch.empty(next(iter(parts.values())).shape, dtype=torch.bfloat16)
    for rank, part in parts.items():
        piece = own if rank == 0 else torch.empty(part.local_shape, dtype=dtype)
        if rank > 0:
            dist.recv(piece, src=rank)
        whole.narrow(part.dim, part.start, part.length).copy_(piece.narrow(part.dim, 0, part.length))
    return whole


def export_adapters(directory: str, model: nn.Module, rank: int, alpha: float, base: str) -> None:
    """Write the adapters in the form that the peft library reads: adapter_model.safetensors and its config.

    `rank` and `alpha` are the adapters' own, `base` is the checkpoint beside which they were trained; all ranks call
    this together.
    """
    tensors = list(collect(model, adapters=True))
    with staged(directory, model.place.rank) as folder:
        if model.place.rank == 0:
            inside = "model.language_model." if model.config.vision is not None else "model."
            renamed = {f"base_model.model.{inside}{name.replace('.adapter.', '.')}": t for name, t in tensors}
            config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0)
            config |= dict(bias="none", inference_mode=True, target_modules=PEFT_TARGETS)
            config |= dict(base_model_name_or_path=os.path.abspath(base))
            write_tensors(os.path.join(folder, "adapter_model.safetensors"), renamed)
            write_json(os.path.join(folder, "adapter_config.json"), config)


def convert(source: str, target: str, to_fp8: bool, chats: str | None) -> None:
    """Rewrite the checkpoint in `source` as `target`, in the HF layout; one shard is in memory at a time.

    The decoder's linears become E4M3 with a float32 scale (those that are FP8 already keep weight and scales), or BF16;
    everything else becomes BF16. Raises UserError.
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.fit(read_config(source))
    model = build_model(config)
    check_names(checkpoint, model)
    for path in {at.file for at in checkpoint.tensors.values()}:
        checkpoint.pass_over(checkpoint.unlisted(path))
    check_free(target)
    parts = {name: part.slice for name, (_, part) in parts_of(model).items()}
    quantized = [name for name in parts if to_fp8 and is_quantized(name)]
    inputs = {} if chats else {name: checkpoint.scale(scale_names(name)[1]) for name in quantized}
    if any(scale is None for scale in inputs.values()):
        inputs = {}  # a config calls all linears static or all dynamic: one without a scale makes them dynamic

    def weights() -> Iterator[tuple]:  # asked for once the folder is there: what takes hours is not for nothing
        scales = calibrate(source, chats, config, checkpoint) if chats else inputs
        for name, part in parts.items():
            yield name, *checkpoint.weight(name, part, config), scales.get(name)

    scheme = "static" if chats or inputs else "dynamic"
    save(target, replace(config, fp8=to_fp8, activation_scheme=scheme), weights(), source)


def measure_inputs(model: MistralMedium, batches: list[MicroBatch], base: str) -> dict[str, torch.Tensor]:
    """Static activation scales: the largest input of every decoder linear over `batches`, over 448. By weight name.

    Image paths are relative to `base`.
    """
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        amax = inputs[0].abs().amax().float()
        largest[name] = torch.maximum(largest.get(name, amax), amax)

    quantized = [(name, layer) for name, (layer, _) in parts_of(model).items() if is_quantized(name)]
    handles = [layer.register_forward_pre_hook(partial(watch, name)) for name, layer in quantized]
    with torch.inference_mode():
        for batch in batches:
            decode_images([batch], base, model.config.vision, torch.bfloat16)
            features = model.vision(batch.pixels) if batch.pixels else None
            model(model.embed(batch.tokens, features))
            batch.pixels = []
    for handle in handles:
        handle.remove()
    return {name: fp8.scale_of(amax) for name, amax in largest.items()}


def calibrate(directory: str, chats_file: str, config: Config, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Run the checkpoint, dequantized to BF16, over the chats of a file; see `measure_inputs`."""
    model = build_model(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    room = cpu_memory()
    sizes = f"the weights take {size / 1e9:.1f} GB, but {room / 1e9:.1f} GB are free"
    require(size <= room, f"{sizes}: no --calibrate here")
    chats = Chats(chats_file, load_tokenizer(directory, config), config, config.max_position_embeddings, Place())
    fill(model, checkpoint)
    return measure_inputs(model, micro_batches(chats.samples, 1, 0), chats.base)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, prog="fp8.py", usage="%(prog)s IN OUT [options]")
    parser.add_argument("source", metavar="IN", help="folder of a checkpoint, any layout")
    parser.add_argument("target", metavar="OUT", help="a new folder, for the HF layout")
    parser.add_argument("--to", choices=["fp8", "bfloat16"], default="fp8", help="of the decoder's linears")
    parser.add_argument("--calibrate", metavar="FILE.jsonl", help="chats that measure static activation scales")
    args = parser.parse_args(argv)
    wanted = args.to == "fp8" or not args.calibrate
    require(wanted, "--calibrate measures scales for FP8; leave it out with --to bfloat16")
    convert(args.source, args.target, args.to == "fp8", args.calibrate)
    size = sum(os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(args.target), "*.safetensors")))
    what = f"wrote {args.target}: {args.to}, {size / 1e9:.2g} GB; try it"
    with suppress(OSError):  # nobody reads it: no reason to say that what is there was not written
        print(f"{what}: python generate.py --ckpt {shlex.quote(args.target)}", file=sys.stderr, flush=True)
