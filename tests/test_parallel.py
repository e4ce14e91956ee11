"""Every topology gives one process's answers: text and images, batches, sampling, FP8, both layouts."""

import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from helpers import EYES, Tokens, make_eyes, random_tokens
from processes import run_ranks

import generate
import parallel
from generate import Engine
from parallel import Place, VocabParallelHead
from runtime.checkpoint import Checkpoint, fill
from runtime.config import read_config
from runtime.launch import find_place
from runtime.requests import Request
from vision import build_model

TOPOLOGIES = [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]
# name -> layout, FP8 scheme on disk, whether the weights stay FP8, whether the fields differ from SIZES
CASES = {
    "shared key/value heads": ("new", None, False, {}),
    "own key/value heads, tied, native": ("native", None, False, dict(num_key_value_heads=8, tie_word_embeddings=True)),
    "fp8 dequantized": ("new", "static", False, dict(num_key_value_heads=4)),
    "fp8 kept, native": ("native", "static", True, {}),
    "fp8 kept, text only": ("text", "dynamic", True, dict(num_key_value_heads=8, vocab_size=17, vision_config=None)),
}


def requests(vocab_size: int, images: bool) -> list[list[Request]]:
    """Batches: of different lengths, of samplers, of images between text, and a single request."""

    def text(count: int, seed: int) -> list[int]:
        return [11 + token % (vocab_size - 11) for token in random_tokens(count, 1 << 20, seed)]  # no image token

    def ask(count: int, new: int, **more) -> Request:
        return Request(text(count, count), max_new_tokens=new, **more)

    batches = [
        [ask(17, 6, logprobs=True), ask(3, 9, logprobs=True), ask(1, 1), ask(30, 0, logprobs=True), ask(8, 4)],
        [
            ask(5, 8, temperature=1.0, seed=3),
            ask(5, 8, temperature=0.7, top_p=0.6, seed=4),
            ask(9, 8),
            ask(4, 8, temperature=2.0, top_p=0.95, seed=5, logprobs=True),
        ],
        [ask(12, 5, logprobs=True)],
    ]
    if images:
        draw = torch.Generator().manual_seed(1)

        def look(*grids: tuple[int, int]) -> Request:
            prompt, pixels = text(3, 5), []
            for rows, columns in grids:
                for row in range(rows):
                    prompt += [10] * columns + [12 if row < rows - 1 else 13]
                prompt += text(4, rows)
                pixels.append(torch.randn(3, rows * 6, columns * 6, generator=draw))
            return Request(prompt, pixels, max_new_tokens=5, logprobs=True)

        batches.append([look((2, 3)), ask(6, 5, logprobs=True), look((1, 1), (3, 2))])
    return batches


def answer(cases: list[tuple[str, bool, bool]], place: Place) -> list:
    """(tokens, log-probabilities, those of the prompt) of every request of every batch of every case."""
    answers = []
    for directory, keep_fp8, images in cases:
        config = read_config(directory)
        model = build_model(config, place, torch.float32, keep_fp8)
        fill(model, Checkpoint(directory))
        batches = requests(config.vocab_size, images)
        results = [Engine(model, Tokens.eos_id, 64).generate(batch) for batch in batches]
        answers += [(a.tokens, a.logprobs, a.prompt_logprobs[1:]) for batch in results for a in batch]
    return answers


def answer_on_a_rank(cases, tp: int, pp: int) -> list:
    generate.CPU_CHUNK = 7  # so that chunks cut prompts and images
    return answer(cases, find_place(tp, pp))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The checkpoints, and one process's answers."""
    made = []
    for i, (layout, fp8, keep_fp8, changes) in enumerate(CASES.values()):
        directory = make_eyes(tmp_path_factory.mktemp("case"), layout, fp8, changes, seed=i)
        made.append((directory, keep_fp8, changes.get("vision_config", EYES) is not None))
    expected = answer(made, Place())
    assert len({tuple(tokens) for tokens, *_ in expected}) > 40
    return made, expected


@pytest.mark.time_limit(300)
@pytest.mark.parametrize(
    "tp, pp", [t if t in ((2, 1), (1, 2), (2, 2)) else pytest.param(*t, marks=pytest.mark.slow) for t in TOPOLOGIES]
)
def test_a_topology_equals_one_process(tp, pp, cases):
    made, expected = cases
    ranks = run_ranks(answer_on_a_rank, tp * pp, made, tp, pp, seconds=280)
    for rank in ranks:
        assert rank == ranks[0]
    for got, want in zip(ranks[0], expected, strict=True):
        assert got[0] == want[0]
        assert got[1] == pytest.approx(want[1], abs=1e-4) and got[2] == pytest.approx(want[2], abs=1e-4)


# ------------------------------------------------------------------------------------------------ symmetric memory


def sum_on_a_rank(broken: str) -> list:
    """Whether there is a buffer, and what `summed_at_once` gives, with a kernel that is as its documentation says."""
    place, kernels = find_place(3, 1), torch.library.Library("symm_mem", "IMPL")

    def add(buffer, x, op, name):
        assert op == "sum" and buffer.shape == x.shape
        buffer.copy_(x)
        out = buffer.clone()
        dist.all_reduce(out, group=dist.distributed_c10d._resolve_process_group(name))
        return out + (broken == "sums" and place.rank == 1)

    def meet(buffer, name):
        if broken == "rendezvous" and place.rank == 2:
            raise RuntimeError("no peer access")

    os.environ["LOCAL_WORLD_SIZE"] = "2" if broken == "nodes" else "6"
    symmetric.empty, symmetric.rendezvous = torch.empty, meet
    kernels.impl("one_shot_all_reduce_copy", add, "CPU")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        buffer = parallel.symmetric_buffer(place.tp_group, dtype, place.device)
        x = torch.arange(40).view(2, 20).to(dtype) + place.rank
        total = None if buffer is None else parallel.summed_at_once(x, buffer, place.tp_group)
        found.append(total is not None and torch.equal(total, 3 * torch.arange(40).view(2, 20).to(dtype) + 3))
    return found


@pytest.mark.parametrize("broken", ["", "sums", "nodes", "rendezvous"])
def test_sums_in_symmetric_memory(broken):
    """Used by all ranks or by none."""
    assert run_ranks(sum_on_a_rank, 3, broken) == [[not broken] * 2] * 3


# ------------------------------------------------------------------------------------------- sampling at the edge

DRAWS = 6000


@pytest.mark.parametrize("seed", range(12))
def test_every_temperature_samples_from_the_softmax(seed):
    """Over the whole range that is accepted: a chi-square test against float64; below 1e-6 the likeliest token."""
    draw, size = random.Random(seed), 23
    generator = torch.Generator().manual_seed(seed)
    logits = draw.choice((1, 8, 30)) * torch.randn(size, generator=generator)
    tiny = [1e-45, 1e-44, 1e-40, 1e-38, 1e-20, 1e-7]
    wide = [10 ** draw.uniform(-3, 2) for _ in range(3)]
    for temperature in [draw.choice(tiny), *wide]:
        head = VocabParallelHead(4, size, Place(), torch.float32)
        column = torch.full((DRAWS, 1), temperature)
        seeds, positions = torch.arange(DRAWS) + 10_000 * seed, torch.zeros(DRAWS, dtype=torch.long)
        tokens = head.sample(logits.expand(DRAWS, -1), column, None, seeds, positions)[:, 0].long()
        if temperature < 1e-6:
            assert (tokens == logits.argmax()).all(), temperature
            continue
        expected = DRAWS * (logits.double() / column[0].double()).softmax(0)
        counts = torch.bincount(tokens, minlength=size).double()
        often = expected >= 5  # the rest together, as the test asks for
        observed = torch.cat((counts[often], counts[~often].sum()[None]))
        wanted = torch.cat((expected[often], expected[~often].sum()[None]))
        statistic = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).where(wanted > 1e-3, observed).sum())
        freedom = int(often.sum())
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10, (temperature, statistic, freedom)


@pytest.mark.parametrize("tp, size", [(2, 10), (4, 23), (3, 7), (8, 9)])
def test_every_token_is_scored_by_one_rank(tp, size):
    """Tokens at the borders of the slices, and past the vocabulary's end where it is padded."""
    counts = torch.zeros(size, dtype=torch.long)
    for rank in range(tp):
        head = VocabParallelHead(4, size, Place(tp_rank=rank, tp_size=tp), torch.float32)
        width = head.parts[0].slice.local_shape[0]
        targets = torch.arange(size)
        scores = head.log_probabilities(torch.randn(size, width), targets)
        here = (targets >= rank * width) & (targets < (rank + 1) * width)
        assert torch.equal(scores.isfinite(), here)
        counts += scores.isfinite()
    assert (counts == 1).all()
