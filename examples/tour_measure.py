"""What the tour shows, measured while the project's own modules run: hooks watch them, and nothing is a second model.

The one thing that has to be formed again is attention's weights, since the fused kernels do not return them: they are
the softmax of the very queries and keys that went into the kernel. What only several processes can show comes from four
that are forked from this one and work while it measures the rest.
"""

import heapq
import inspect
import multiprocessing
import os
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fp8
import model as decoder
from generate import Engine, Session
from model import Config, MistralMedium, rope_frequencies
from parallel import Pipeline, Place, Slice, TopologyError, nucleus, parts_of
from runtime import tokenizer as tokenizer_module
from runtime.checkpoint import Checkpoint, hf_name, scale_names
from runtime.draft import Guesses
from runtime.files import UserError
from runtime.launch import find_place, gather_objects
from runtime.plan import parse_args, places, plan_rank
from vision import build_model

LAYERS, HEADS = 6, 6  # at most so many of each have their attention shown
MAPS = 250_000  # attention weights in the page, of tower and decoder each: large pictures have fewer patches shown
DRAWS, TEMPERATURE, TOP_P = 8, 0.7, 0.95  # what sampling would have done: seeds 0 to 7, settings for reasoning
RANKS, NAP, MICRO_BATCHES = 4, 0.04, 8  # of the timetable; seconds of a forward pass, twice as many of a backward pass
BINS, ROWS = 121, 1 << 22  # of a weight's histogram; of a large weight, elements that are looked at
GAPS, LONGEST = 9, 1024  # distances to which the question is moved, if it has at most so many tokens
# Where the input of a linear is seen, by the name of the module -> such a linear: what a static scale is for.
INPUTS = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}
INPUTS |= {name: name for name in ("self_attn.o_proj", "mlp.down_proj")}


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly spread, with the first and the last."""
    return sorted({round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most))})


def attention_rows(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    """q (H, Q, D) and k (KV, S, D) -> the weights (H, Q, S) with which Q queries look at S keys, float32."""
    k = k.float().repeat_interleave(len(q) // len(k), 0)
    return (q.float() @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + bias).softmax(-1).cpu()


class Watch:
    """Looks on while the engine answers one request. A step is what leads to one token; of each it keeps, at the last
    position: `states` (layers, C) after every layer; `norms` (layers, 4) of the residual stream, of what attention and
    MLP add to it, and of the sum; `rows` of attention (layers shown, heads shown, S); `logits` (V,)."""

    def __init__(self, model: MistralMedium, limits: dict[str, float]):
        self.model, self.limits = model, limits
        self.steps: list[SimpleNamespace] = []
        self.shapes: dict[str, list] = {}  # what went in and out of a module at its first call
        self.tower: list[tuple[torch.Tensor, torch.Tensor]] = []  # queries and keys of each layer, (H, N, D)
        self.inputs = defaultdict(lambda: [0.0, 0, 0])  # of linears: the largest, how many beyond the limit, how many
        self.layers = spread(model.config.num_hidden_layers, LAYERS)
        self.heads = spread(model.config.num_attention_heads, HEADS)
        self.layer: int | None = None  # of the decoder, which comes after the tower

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            m.register_forward_hook(partial(self.done, name.removeprefix("vision.")))
            for name, m in self.model.named_modules()
            if name
        ]
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            watched = ((self.model, "attention"), (decoder, "attend_step"), (F, "scaled_dot_product_attention"))
            for owner, name in watched:
                call = partial(self.kernel if owner is F else self.attend, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, call))
            yield

    def done(self, name: str, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """A module of this name has turned `inputs` into `output`."""
        x = inputs[0][0] if isinstance(inputs[0], list) else inputs[0]
        self.shapes.setdefault(name, [list(x.shape), list(output.shape)])
        first, layer, part = (*name.split(".", 2), "", "")[:3]
        if name == "lm_head":
            self.now.logits = output[-1].float()
            self.steps.append(self.now)
        if first != "layers":
            return
        if part == "input_layernorm":
            self.layer = int(layer)
            if self.layer == 0:  # what a chunk of the prompt left behind that did not lead to a token is dropped
                self.now = SimpleNamespace(states=[], norms=[], rows=[])
            self.now.norms.append([x[0, -1].float().norm().item()])
        if part in ("self_attn", "mlp", ""):
            self.now.norms[-1].append(output[0, -1].float().norm().item())
        if part == "":
            self.now.states.append(output[0, -1])
        if part in INPUTS:
            x = (output if part.endswith("norm") else x).abs()
            found, limit = self.inputs[name], self.limits.get(name, torch.inf)
            found[:] = max(found[0], x.amax().item()), found[1] + int((x > limit).sum()), found[2] + x.numel()

    def attend(self, call: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias) -> torch.Tensor:
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.shapes.setdefault(f"layers.{self.layer}.self_attn: {name}", [None, list(x.shape)])
        if self.layer in self.layers:
            hidden = 0.0 if bias in ((), (None,)) else bias[0][0].float()
            self.now.rows.append(attention_rows(q[0, :, -1:], k[0], hidden)[self.heads, 0])
        return call(q, k, v, *bias)

    def kernel(self, call: Callable, q: torch.Tensor, k: torch.Tensor, *more, **options) -> torch.Tensor:
        if self.layer is None:
            self.tower.append((q[0].float(), k[0].float()))
        return call(q, k, *more, **options)


@torch.inference_mode()
def speech(model: MistralMedium, steps: list[SimpleNamespace], tokens: list[int], start: int) -> list[dict]:
    """For each token of an answer that begins at position `start`: the five likeliest, what sampling would have done,
    and what the model would have said after each layer (the logit lens)."""
    said = []
    for position, (step, token) in enumerate(zip(steps, tokens), start):
        logits, seeds = step.logits.expand(DRAWS, -1), torch.arange(DRAWS, device=step.logits.device)
        settings = (logits.new_full((DRAWS, 1), value) for value in (TEMPERATURE, TOP_P))
        drawn = model.lm_head.sample(logits, *settings, seeds, torch.full_like(seeds, position))[:, 0]
        top, early = step.logits.softmax(-1).topk(5), model.logits(torch.stack(step.states)).softmax(-1)  # (layers, V)
        best = early.max(-1)
        said.append({
            "id": token, "norms": step.norms, "top": [*zip(top.indices.tolist(), top.values.tolist())],
            "drawn": Counter(drawn.long().tolist()).most_common(),
            "inside": int(nucleus(step.logits[None] / TEMPERATURE, TOP_P).sum()),
            "lens": [*zip(best.indices.tolist(), best.values.tolist(), early[:, token].tolist())],
        })  # fmt: skip
    return said


def drafted(session: Session, draft: Guesses, spec: dict) -> dict:
    """The question `spec` once more, by an engine with `draft`: the answer's `tokens`, and of each of its `steps` the
    tokens guessed and those that the model said, up to and with the first that was not guessed. The last step may go
    beyond the end of the answer."""
    steps, engine = [], Engine(session.model, session.tokenizer.eos_id, session.max_context, draft)
    engine.record = None  # steps that are replayed call no Python

    def accept(call: Callable, group, part: slice, guessed: torch.Tensor, sampled: torch.Tensor, *states) -> None:
        call(group, part, guessed, sampled, *states)
        said = sampled[0, :, 0].long()
        steps.append((guessed[0].tolist(), said[said >= 0].tolist()))

    with patch.object(draft, "accept", partial(accept, draft.accept)), patch.object(session, "engine", engine):
        (answer,) = session.answer([spec])
    return {"tokens": answer["tokens"], "steps": steps}


def tower_maps(tower: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """Where chosen patches look, in chosen layers and heads: `maps` (layers, heads, patches chosen, N)."""
    heads, patches = tower[0][0].shape[:2]
    layers, heads = spread(len(tower), LAYERS), spread(heads, HEADS)
    chosen = spread(patches, max(1, MAPS // (len(layers) * len(heads) * patches)))
    maps = [attention_rows(q[heads][:, chosen], k[heads]) for q, k in (tower[i] for i in layers)]
    return {"layers": layers, "heads": heads, "patches": chosen, "maps": torch.stack(maps)}


def merges(tokenizer: tokenizer_module.Tekken, text: str) -> list[dict]:
    """Of each different word of `text`, what `Tekken._merge` does to it: where the pieces end after every merge."""
    words, taken = {}, []

    def merge(word: str) -> list[int]:
        taken.clear()
        ids, ends, steps = tokenizer._merge(word), [*range(len(word.encode()) + 1)], []
        for rank, start, stop in taken:  # a pair that came out of the heap is merged if it still is two whole pieces
            if {start, stop} <= {*ends} and len(inside := [end for end in ends if start < end < stop]) == 1:
                ends.remove(inside[0])
                steps.append([rank, ends[1:]])
        words[word] = {"word": word, "ids": ids, "steps": steps}
        return ids

    spy = SimpleNamespace(**{**vars(heapq), "heappop": lambda heap: taken.append(heapq.heappop(heap)) or taken[-1]})
    with patch.object(tokenizer_module, "heapq", spy), patch.object(tokenizer, "_merge_cached", merge):
        tokenizer.encode(text)
    return list(words.values())


@torch.inference_mode()
def positions(model: MistralMedium, prompt: list[int], tokens: list[int], pixels: list[torch.Tensor]) -> dict:
    """Rotary frequencies with and without YaRN, and how likely the answer `tokens` still is when the prompt's second
    part (with a picture, all behind it) stands far from the first, up to the end of the context."""
    rope, size, usual = model.config.rope, model.config.max_position_embeddings, model.frequencies
    plain = rope_frequencies(replace(rope, yarn=False), model.config.head_dim).to(usual)
    found, ids = {"plain": plain.tolist(), "used": usual.tolist(), "far": []}, prompt + tokens
    if len(ids) > min(LONGEST, size // 2):
        return found
    picture = model.config.vision.image_token_id if pixels else None
    cut = max((i + 1 for i, id in enumerate(prompt) if id == picture), default=len(prompt) // 2)
    features = model.vision(pixels) if pixels else None
    x, y = model.embed(torch.tensor([ids], device=usual.device), features), torch.tensor(tokens, device=usual.device)
    for i in range(GAPS):
        gap = round((size - len(ids)) ** (i / (GAPS - 1))) if i else 0
        found["far"].append([gap])
        positions = torch.arange(len(ids), device=usual.device)
        positions[cut:] += gap
        for model.frequencies in (usual, plain) if rope.yarn else (usual,):
            states = model(x, decoder.Whole(*model.tables(positions[None])))
            logits = model.logits(states[0, len(prompt) - 1 : -1])
            found["far"][-1].append(model.lm_head.log_probabilities(logits, y).mean().exp().item())
    model.frequencies = usual
    return found | {"cut": cut}


def input_limits(checkpoint: Checkpoint, layers: int) -> dict[str, float]:
    """The largest input of a linear that its static FP8 scale can express, by the name of the module it is seen at."""
    seen_at = {
        f"layers.{i}.{seen}": f"layers.{i}.{name}.weight" for i in range(layers) for seen, name in INPUTS.items()
    }
    scales = {seen: checkpoint.scale(scale_names(name)[1]) for seen, name in seen_at.items()}
    return {seen: scale.item() * fp8.E4M3_MAX for seen, scale in scales.items() if scale is not None}


def weights(checkpoint: Checkpoint, model: MistralMedium) -> list[dict]:
    """The matrices of a layer in the middle, and the head: what FP8 made, or would make, of their numbers."""
    config, middle, found = model.config, f"layers.{model.config.num_hidden_layers // 2}.", []
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for name in (*(name for name in parts_of(model) if name.startswith(middle) and "_proj" in name), head):
        _, (rows, columns) = checkpoint.stored(name)
        # In whole heads, because a native checkpoint has the rows of a head in another order.
        some = max(1, ROWS // columns // config.head_dim) * config.head_dim
        stored, scale = checkpoint.weight(name, Slice((rows, columns), 0, 0, min(rows, some)), config)
        entry, before = {"name": hf_name(name, config), "shape": [rows, columns], "rows": len(stored)}, None
        if scale is None:  # this is what export.py would do
            before, scale = stored.float(), fp8.scale_of(stored.abs().amax())
            stored = fp8.quantize(before, scale)
        after, most = fp8.dequantize(stored, scale, torch.float32), scale.item() * fp8.E4M3_MAX
        entry |= {"scale": scale.item(), "most": most, "codes": len(stored.view(torch.uint8).unique())}
        entry["after"] = after.histc(BINS, -most, most).int().tolist()
        if before is not None:
            error, size = (after - before).double(), before.double().square().mean().sqrt().item()
            entry |= {"before": before.histc(BINS, -most, most).int().tolist(), "worst": error.abs().max().item()}
            entry |= {"rms": (rms := error.square().mean().sqrt().item()), "relative": rms / size}
        found.append(entry)
    return found


def held(config: Config, *topologies: tuple[int, int]) -> dict:
    """By the plan of a fine-tune, what each rank holds: bytes of weights, gradients and optimizer; parameters; slices
    (tensor, dimension, from, to, whole shape), where the first layer stands for all, of the tower's too. With the first
    of `topologies` (tp, pp) that divides the model, if any."""
    vision = config.vision and replace(config.vision, num_hidden_layers=1)
    for tp, pp in topologies:
        args = parse_args(["--plan", "--config", "-", "--tp", str(tp), "--pp", str(pp), "--max-length", "2048"])
        one, ranks = replace(config, num_hidden_layers=pp, vision=vision), []  # a layer for each stage
        with suppress(TopologyError):
            for place in (place for stage in places(tp, pp) for place in stage):
                plan, _ = plan_rank(config, place, args, False)
                rank = {"tp": place.tp_rank, "pp": place.pp_rank, "layers": plan.layers, "parameters": plan.parameters}
                rank |= {"memory": [plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes], "slices": []}
                for name, (_, part) in parts_of(build_model(one, place)).items():
                    name = name.replace(f"layers.{place.pp_rank}.", f"layers.{plan.layers[0]}.")
                    part = part.slice
                    rank["slices"].append((name, part.dim, part.start, part.start + part.length, part.shape))
                ranks.append(rank)
            return {"sizes": (tp, pp), "ranks": ranks}
    return {"sizes": None, "ranks": []}


def start(*work_for: object) -> Connection:
    """Start the ranks, each with `work(rank, …, *work_for)`. The connection will bring what each of them found."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # CUDA cannot be forked
    mine, theirs = context.Pipe(duplex=False)
    for rank in range(RANKS):
        context.Process(target=work, args=(rank, port, theirs, *work_for), daemon=True).start()
    return mine


def work(rank: int, port: int, pipe: Connection, args, spec: dict, sizes: tuple[int, int] | None) -> None:
    """A rank: the timetable, and with `sizes` (tp, pp) prompt and first token of the question `spec`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = {"events": timetable(find_place(1, RANKS)), "messages": [], "bytes_read": None}
    if sizes:
        try:
            session = Session(args, find_place(*sizes))
        except UserError:
            return  # the process that started this one meets the same mistake, and says so
        record(found["messages"], session)
        session.answer([{**spec, "max_new_tokens": 2}])
        found["bytes_read"] = session.bytes_read
    everything = gather_objects(found)
    if rank == 0:
        pipe.send(everything)
    dist.barrier()  # rank 0 holds the store in which the others meet
    dist.destroy_process_group()


def receive(pipe: Connection) -> list[dict]:
    with suppress(EOFError):
        while len(multiprocessing.active_children()) == RANKS or pipe.poll():
            if pipe.poll(0.1):
                return pipe.recv()
    raise UserError("the four processes ended early; is there memory for them?")


def timetable(place: Place) -> list[tuple[str, int, float, float]]:
    """(F or B, micro-batch, beginning, end) of what this stage did in a step, by the clock that processes share. Its
    passes sleep: computing would need a core for each, while sleeping shows a schedule's waiting on any machine."""
    weight, events = torch.ones(1, requires_grad=True), []

    def nap(kind: str, number: int, seconds: float) -> None:
        began = time.monotonic()
        time.sleep(seconds)
        events.append((kind, number, began, time.monotonic()))

    def stage(x, batch):
        x = (torch.zeros(1, 1, 8) if x is None else x) * weight
        nap("F", batch.number, NAP)
        x.register_hook(lambda grad: nap("B", batch.number, 2 * NAP))  # called in the backward pass
        return x.sum() if place.last_stage else x

    pipeline = Pipeline(place, stage, 8, torch.float32, True)
    for count in (2, MICRO_BATCHES):  # the first step makes the connections
        events.clear()
        dist.barrier()
        pipeline.train([SimpleNamespace(shape=(1, 1), number=i) for i in range(count)])
    return events


def record(messages: list, session: Session) -> None:
    """From here on note every message: (what, among whom, bytes, whose, while, file:line, the code there)."""
    names, place = {m: name.removeprefix("vision.") for name, m in session.model.named_modules()}, session.place
    groups = {place.answer_group: "answer", place.pp_group: "pp", place.tp_group: "tp"}

    def watched(name: str, call: Callable, x, *rest, **options):
        # The sender is the nearest object up the stack; functions such as `summed` work on its behalf.
        frame, size = sys._getframe(1), sum(t.nbytes for t in ([x] if torch.is_tensor(x) else x))
        while "self" not in frame.f_locals:
            frame = frame.f_back
        who, at = frame.f_locals["self"], inspect.getframeinfo(frame)
        at = f"{os.path.relpath(at.filename, os.path.dirname(fp8.__file__))}:{at.lineno}", at.code_context[0].strip()
        while frame.f_code.co_name not in ("prefill", "step", "post", "generate"):  # of the engine
            frame = frame.f_back
        who, when = names.get(who, type(who).__name__), frame.f_code.co_name
        messages.append((name, groups[options["group"]], size, who, when, *at))
        return call(x, *rest, **options)

    for name in ("all_reduce", "all_gather", "broadcast", "isend", "recv"):
        setattr(dist, name, partial(watched, name, getattr(dist, name)))
