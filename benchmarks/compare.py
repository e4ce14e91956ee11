"""Speed against transformers (and llama.cpp, where `llama_cpp` and `gguf` can be imported), on the same weights.

    python benchmarks/compare.py CKPT [--only decode prefill …] [--rounds 5] [--dtype bfloat16]

CKPT is a text checkpoint in the HF layout that both can load. The sides take turns in one process, so that a machine
whose speed drifts drifts for all; the median over rounds is printed, and the median of the rounds' ratios. What a CPU
could do at best is measured between the rounds: bytes per second of a sum over more than any cache holds (decoding
reads each weight once per step), operations per second of a product of large matrices. Pictures go to `examples/tiny`.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, StoppingCriteria

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), os.path.join(ROOT, "examples")]
from helpers import write_tekken  # noqa: E402

import train  # noqa: E402
from generate import Engine  # noqa: E402
from model import MistralMedium  # noqa: E402
from runtime.checkpoint import Checkpoint, fill  # noqa: E402
from runtime.config import read_config  # noqa: E402
from runtime.cpu import speed_up  # noqa: E402
from runtime.data import IGNORE  # noqa: E402
from runtime.launch import find_place  # noqa: E402
from runtime.requests import Request  # noqa: E402
from vision import build_model  # noqa: E402

TINY = os.path.join(ROOT, "examples", "tiny")
PICTURE = os.path.join(TINY, "picture.png")
Seconds = tuple[float, float]  # of a call: before the first token, and from there to the last


# --------------------------------------------------------------------------------------------------------- the sides


def load(folder: str, dtype: torch.dtype) -> MistralMedium:
    """The model as generate.py loads it."""
    checkpoint = Checkpoint(folder)
    model = build_model(checkpoint.fit(read_config(folder)), dtype=dtype)
    fill(model, checkpoint)
    speed_up(model)
    return model


class Ours:
    def __init__(self, folder: str, dtype: torch.dtype):
        self.model = load(folder, dtype)
        self.engine = Engine(self.model, -1, self.model.config.max_position_embeddings)  # no answer ends early

    def generate(self, prompts: list[list[int]], count: int, pixels: list[torch.Tensor] = ()) -> Seconds:
        engine = self.engine
        engine.groups.clear()  # else it would know the prompts from the last round
        answers = engine.generate([Request(prompt, list(pixels), max_new_tokens=count) for prompt in prompts])
        assert all(len(answer.tokens) == count for answer in answers)
        self.last = [answer.tokens for answer in answers]
        return engine.seconds["prefill"], engine.seconds["decode"]


class Clock(StoppingCriteria):
    """Notes the time of every token."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def __call__(self, ids, scores, **kwargs) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


class Theirs:
    def __init__(self, folder: str, dtype: torch.dtype):
        images = read_config(folder).vision is not None
        kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, dtype=dtype).eval()
        self.dtype = dtype

    def generate(self, prompts: list[list[int]], count: int, pixels: list[torch.Tensor] = ()) -> Seconds:
        ids, clock, more = torch.tensor(prompts), Clock(), {}
        if pixels:
            sizes = torch.tensor([image.shape[1:] for image in pixels])
            more = {"pixel_values": torch.stack(list(pixels)).to(self.dtype), "image_sizes": sizes}
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            stopping_criteria=[clock], **more,
        )  # fmt: skip
        assert out.shape[1] == len(prompts[0]) + count
        self.last = out[:, len(prompts[0]) :].tolist()
        return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]


# -------------------------------------------------------------------------------------------------------- the measure


class Table:
    """Lines of medians: a side's figure is what it did per second, or what something took."""

    def __init__(self, rounds: int):
        self.rounds = rounds

    def measure(self, unit: str, runs: dict[str, Callable[[], dict[str, float]]]) -> dict[str, float]:
        """`runs` maps sides to functions that return {what: figure}; ours is first. Returns its medians."""
        found: dict[str, dict[str, list[float]]] = {}
        for turn in range(self.rounds + 1):
            for side, run in runs.items():
                gc.collect()
                for what, figure in run().items():
                    if turn:  # the first round warms up
                        found.setdefault(what, {}).setdefault(side, []).append(figure)
        for what, sides in found.items():
            ours, theirs, *_ = sides.values()
            better = (lambda a, b: a / b) if unit.endswith("/s") else (lambda a, b: b / a)
            ratio = statistics.median(map(better, ours, theirs))
            shown = ", ".join(f"{side} {statistics.median(values):.4g}" for side, values in sides.items())
            print(f"{what}: {shown} {unit}; ratio {ratio:.2f}", flush=True)
        return {what: statistics.median(next(iter(sides.values()))) for what, sides in found.items()}


def machine(dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches: GB/s that a sum reads, and 10^9 operations/s of matrix products."""
    many = torch.ones(1 << 26)
    x, y = torch.randn(1024, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
    wide = [t.float() for t in (x, y)]

    def best(run: Callable, work: float) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return work / min(times) / 1e9

    products = (best(lambda pair=pair: F.linear(*pair), 2 * 1024 * 1536 * 1536) for pair in ((x, y), wide))
    return {"GB/s": best(many.sum, many.nbytes), "GFLOP/s": max(products)}


def generation(args: argparse.Namespace, sides: dict, only: Callable, table: Table) -> None:
    """Prefill and decoding of texts."""
    config, draw = sides["ours"].model.config, torch.Generator().manual_seed(0)
    texts = lambda rows, size: torch.randint(100, config.vocab_size - 100, (rows, size), generator=draw).tolist()  # noqa: E731
    for rows, size, count, names in (
        (1, 16, 64, (None, "decode")),
        (1, 1024, 2, ("prefill 1024", None)),
        (1, 4000, 32, ("prefill 4000", "decode after 4000")),
        (16, 20, 32, ("prefill 16 x 20", "decode 16 rows")),
    ):
        wanted = [name if name and only(name) else None for name in names]
        if not any(wanted):
            continue
        limits = []

        def run(side, prompts=texts(rows, size), count=count, names=wanted, limits=limits) -> dict[str, float]:
            prefill, decode = side.generate(prompts, count)
            if side is sides["ours"]:
                limits.append(machine(getattr(torch, args.dtype)))
            figures = (len(prompts) * len(prompts[0]) / prefill, len(prompts) * (count - 1) / decode)
            return {name: figure for name, figure in zip(names, figures) if name}

        able = {name: side for name, side in sides.items() if rows == 1 or name != "llama.cpp"}
        found = table.measure("tokens/s", {name: lambda side=side: run(side) for name, side in able.items()})
        layers, head = products(config)
        each = {key: statistics.median(limit[key] for limit in limits) for key in limits[0]}
        for name, figure in found.items():
            if name.startswith("decode"):
                part = figure / rows * (layers + head) * getattr(torch, args.dtype).itemsize / 1e9 / each["GB/s"]
                print(f"    {name}: reads weights at {part:.0%} of {each['GB/s']:.1f} GB/s", flush=True)
            else:  # the head sees the last token alone
                part = figure * 2 * layers / 1e9 / each["GFLOP/s"]
                print(f"    {name}: multiplies with weights at {part:.0%} of {each['GFLOP/s']:.0f} GFLOP/s", flush=True)


def products(config) -> tuple[int, int]:
    """Elements of the weights that a token is multiplied with: of the decoder's layers, and of the head."""
    D, C, heads = config.head_dim, config.hidden_size, config.num_attention_heads
    attention = 2 * C * D * (heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * C * config.intermediate_size), C * config.vocab_size


def picture(args: argparse.Namespace, table: Table) -> None:
    """A question about a picture, of random pixels as large as the model takes them: first token."""
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        run_quietly("fp8.py", TINY, folder, "--to", "bfloat16")  # transformers cannot dequantize on a CPU
        sides = {"ours": Ours(folder, dtype), "theirs": Theirs(folder, dtype)}
    config = sides["ours"].model.config
    vision, size = config.vision, config.vision.image_size
    cell = vision.patch_size * vision.spatial_merge_size
    row = [vision.image_token_id] * (size // cell)
    row_end, end = 12, 13  # [IMG_BREAK], [IMG_END]
    prompt = [1, 3] + [id for _ in range(size // cell) for id in (*row, row_end)][:-1] + [end, *range(300, 320), 4]
    pixels = [torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))]
    for name, count in (("picture: first token", 1), ("picture: an answer of 16 tokens", 16)):
        runs = {
            side: lambda model=model, name=name, count=count: {name: sum(model.generate([prompt], count, pixels))}
            for side, model in sides.items()
        }
        table.measure("s", runs)
        assert sides["ours"].last[0][0] == sides["theirs"].last[0][0]


OURS = """
import sys, generate
Engine = generate.Engine
generate.Engine = lambda model, eos_id, *more: Engine(model, -1, *more)  # no answer ends early
generate.main(sys.argv[1:])
"""

THEIRS = """
import sys, time, torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import AutoModelForCausalLM
folder, dtype, count, *prompts = sys.argv[1:]
tokenizer = Tekkenizer.from_file(folder + "/tekken.json")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
started, count = time.perf_counter(), int(count)
ids = torch.tensor([tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts])
out = model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
)
for row in out[:, ids.shape[1]:].tolist():
    tokenizer.decode(row)
print(time.perf_counter() - started)
"""


def commands(args: argparse.Namespace, count: int, prompts: list[str], folder: str) -> dict[str, list[str]]:
    """Of both sides: a Python program that answers each of `prompts` with `count` tokens, as a user starts it."""
    requests = os.path.join(folder, "requests.jsonl")
    with open(requests, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"raw": prompt}) + "\n" for prompt in prompts)
    options = ["--json", "--ckpt", args.ckpt, "--dtype", args.dtype, "--max-new-tokens", str(count)]
    return {
        "ours": ["-c", OURS, *options, "--requests", requests],
        "theirs": ["-c", THEIRS, args.ckpt, args.dtype, str(count), *prompts],
    }


def start(args: argparse.Namespace, table: Table) -> None:
    """A whole process: seconds to the first token, and its peak of memory."""
    peaks: dict[str, list[int]] = {"ours": [], "theirs": []}

    def run(side: str) -> dict[str, float]:
        started = time.perf_counter()
        peaks[side].append(run_quietly(*sides[side])[0])
        return {"start to first token": time.perf_counter() - started}

    with tempfile.TemporaryDirectory() as folder:
        sides = commands(args, 1, ["Hello you"], folder)
        table.measure("s", {side: lambda side=side: run(side) for side in sides})
    ours, theirs = (statistics.median(values) for values in peaks.values())
    print(f"peak memory of that: ours {ours / 1e6:.0f}, theirs {theirs / 1e6:.0f} MB; ratio {theirs / ours:.2f}")


def answers(args: argparse.Namespace, only: Callable, table: Table) -> None:
    """A whole process but its loading, of one answer or of 16 together: what it has to prepare is in it."""
    prompts = [f"{i} stories for children: once upon a time there was" for i in range(10, 26)]  # of as many tokens each
    for rows, count in ((1, 32), (1, 64), (1, 128), (1, 256), (16, 32), (16, 128)):
        if not only(name := f"answer of {count} tokens" if rows == 1 else f"{rows} answers of {count} tokens"):
            continue

        def run(side: str, name=name, count=count) -> dict[str, float]:
            printed = run_quietly(*sides[side])[1].splitlines()
            if side == "theirs":
                return {name: float(printed[-1])}
            results = [json.loads(line) for line in printed]
            assert all(len(result["tokens"]) == count for result in results)
            stats = results[-1]["stats"]
            return {name: sum(stats[f"{x}_tokens"] / stats[f"{x}_tokens_per_s"] for x in ("prefill", "decode"))}

        with tempfile.TemporaryDirectory() as folder:
            sides = commands(args, count, prompts[:rows], folder)
            table.measure("s", {side: lambda side=side, run=run: run(side) for side in sides})


def refill(args: argparse.Namespace, table: Table) -> None:
    """64 requests with answers of 4 to 256 tokens, 16 at a time: in four batches, and refilled as rows end."""
    model = load(args.ckpt, getattr(torch, args.dtype))
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(4, 257, (64,), generator=draw).tolist()
    prompts = torch.randint(100, model.config.vocab_size - 100, (64, 20), generator=draw).tolist()
    requests = [Request(prompt, max_new_tokens=count) for prompt, count in zip(prompts, counts)]

    def run(batches: list[list[Request]]) -> dict[str, float]:
        engine, started = Engine(model, -1, 512), time.perf_counter()
        answers = [answer for batch in batches for answer in engine.generate(batch, width=16)]
        assert [len(answer.tokens) for answer in answers] == counts
        return {"64 requests, 16 at a time": time.perf_counter() - started}

    fixed = [requests[i : i + 16] for i in range(0, 64, 16)]
    table.measure("s", {"refilled": lambda: run([requests]), "in four batches": lambda: run(fixed)})


def run_quietly(*command: str) -> tuple[int, str]:
    """A Python program, from the repository's root; returns its peak memory in bytes, and what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, command
        out.seek(0)
        return usage.ru_maxrss * 1024, out.read()


# ---------------------------------------------------------------------------------------------------------- training


def training(args: argparse.Namespace, what: str, dtype: str, images: bool, table: Table) -> None:
    """Optimizer steps of 32 samples: forward, backward, clipping, Adam. transformers has torch's, and as large
    micro-batches.

    transformers computes logits for all tokens, train.py for those only that an assistant wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        ckpt, data = os.path.join(folder, "ckpt"), os.path.join(folder, "chats.jsonl")
        if images:
            run_quietly("fp8.py", TINY, ckpt, "--to", "bfloat16")
            options = "--chats 400 --review 0 --held-out 1".split()
            run_quietly("examples/shapes.py", os.path.join(folder, "shapes"), *options)
            data = os.path.join(folder, "shapes", "train.jsonl")
        else:
            write_chats(data, 32 * (args.rounds + 1))
            shutil.copytree(args.ckpt, ckpt, copy_function=os.symlink)
            os.remove(os.path.join(ckpt, "tekken.json"))
            write_tekken(ckpt)  # one that has the tokens of chats
        argv = ["--ckpt", ckpt, "--data", data, "--out", os.path.join(folder, "out"), "--dtype", dtype]
        argv += ["--micro-batch-size", "8", "--global-batch-size", "32", "--min-lr", "1e-5"]
        args, place = train.parse_args(argv), find_place(1, 1)
        ours = train.Trainer(args, place, train.RunFolder(args, place))
        kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
        theirs = kind.from_pretrained(ckpt, dtype=getattr(torch, dtype)).train()
        optimizer, pad = torch.optim.Adam(theirs.parameters(), lr=1e-5), ours.tokenizer.pad_id or 0
        steps = [[], []]
        losses = [[], []]

        def batches(side: int) -> tuple[int, tuple]:
            steps[side].append(len(steps[side]) + 1)
            return steps[side][-1], ours.upcoming(steps[side][-1])

        def our_step() -> dict[str, float]:
            line = ours.step(*batches(0))
            losses[0].append(line["loss"])
            return {what: line["tokens_per_s"]}

        def their_step() -> dict[str, float]:
            _, (every, mine, wait) = batches(1)
            wait()
            started, total = time.perf_counter(), 0.0
            count = sum(int((batch.targets != IGNORE).sum()) for batch in every)
            for batch in mine:
                # transformers shifts the labels itself, so it gets the last token too.
                ids, labels = F.pad(batch.tokens, (0, 1), value=pad), F.pad(batch.targets, (1, 0), value=IGNORE)
                ids = torch.where(labels == IGNORE, ids, labels)
                labels = labels.masked_fill(labels == IGNORE, -100)
                more = {}
                if batch.pixels:
                    sizes = torch.tensor([image.shape[1:] for image in batch.pixels])
                    height, width = sizes.amax(0).tolist()
                    padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in batch.pixels]
                    more = {"pixel_values": torch.stack(padded), "image_sizes": sizes}
                out = theirs(
                    input_ids=ids, attention_mask=(ids != pad).long(), labels=labels, num_items_in_batch=count, **more
                )
                out.loss.backward()
                total += out.loss.item()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[1].append(total)
            return {what: sum(batch.length for batch in every) / (time.perf_counter() - started)}

        (speed,) = table.measure("tokens/s", {"ours": our_step, "theirs": their_step}).values()
        samples = ours.data.samples
        apart = max(abs(a - b) / b for a, b in zip(*losses))
        print(f"    losses at most {apart:.1e} apart, from {losses[0][0]:.3f} to {losses[0][-1]:.3f}")
        if not images:  # forward once, backward twice as much; logits only where there is a target
            layers, head = products(ours.config)
            work = 6 * (layers + head * sum(s.target_tokens for s in samples) / sum(len(s.ids) for s in samples))
            limit = machine(getattr(torch, dtype))["GFLOP/s"]
            print(f"    multiplies with weights at {speed * work / 1e9 / limit:.0%} of {limit:.0f} GFLOP/s", flush=True)


def write_chats(path: str, count: int) -> None:
    """Chats of a question of 15 words and an answer of 3: a sixth of the tokens are targets."""
    draw = torch.Generator().manual_seed(0)
    words = "the a of heart scan shows left right image patient what is seen in with and large small mass lung".split()
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            picks = torch.randint(len(words), (18,), generator=draw).tolist()
            texts = " ".join(words[i] for i in picks[:15]), " ".join(words[i] for i in picks[15:])
            roles = zip(("user", "assistant"), texts)
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in roles]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names; default: everything")
    args = parser.parse_args()
    only = lambda name: any(name.startswith(part) for part in args.only)  # noqa: E731
    table, dtype = Table(args.rounds), getattr(torch, args.dtype)
    amx = torch.cpu._is_amx_tile_supported()
    kind = f"{torch.backends.cpu.get_cpu_capability()}{', AMX' if amx else ''}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kind}")
    if only("start"):  # first: a child's peak counts what its parent had when it was forked
        start(args, table)
    answers(args, only, table)
    if any(name.startswith(("decode", "prefill")) or not name for name in args.only):
        sides = {"ours": Ours(args.ckpt, dtype), "theirs": Theirs(args.ckpt, dtype)}
        with tempfile.TemporaryDirectory() as scratch:
            try:
                from llama import LlamaCpp

                sides["llama.cpp"] = LlamaCpp(args.ckpt, scratch)
            except ImportError as error:
                print(f"without llama.cpp: {error}")
            generation(args, sides, only, table)
        del sides
    if only("picture"):
        picture(args, table)
    if only("refill"):
        refill(args, table)
    for dtype in ("float32", "bfloat16"):
        for kind in ("text", "images"):
            if only(what := f"training step, {dtype}, {kind}"):
                training(args, what, dtype, kind == "images", table)


if __name__ == "__main__":
    main()
