"""The engine and its cache: steps that can be recorded, rows that are refilled, beginnings that are kept."""

import math
import random

import pytest
import torch
from draft_cases import Knows, key
from helpers import Endless, load, make_eyes, random_state, random_tokens, text_fields, write_checkpoint
from processes import run_ranks
from request_cases import assert_same, drawn_requests
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generate import Engine
from model import (
    KVCache,
    attend_step,
    flash_decoding,
    has_flash,
    has_flash_decoding,
    product_attention,
    segments_of,
)
from parallel import Place, VocabParallelHead, gumbel, nucleus
from runtime import requests
from runtime.checkpoint import Checkpoint, fill
from runtime.config import read_config
from runtime.draft import Guesses
from runtime.launch import find_place
from runtime.requests import Request
from vision import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    fields = text_fields("yarn, short")
    return write_checkpoint(tmp_path_factory.mktemp("model"), fields, random_state(fields, seed=8))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, fast=True)


def alone(model, request: Request) -> requests.Answer:
    return Engine(model, Endless.eos_id, 4096).generate([request])[0]


# ---------------------------------------------------------------------------------------------------- recorded steps


class Tape(TorchDispatchMode):
    """Records operations, as a CUDA graph does: replayed, they read and write the same memory as before."""

    def __init__(self, step):
        super().__init__()
        self.done = []
        saved = None
        with self:
            saved = step()
        assert saved is None

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert operation._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), "a GPU would be waited for"
        out = operation(*arguments, **(options or {}))
        self.done.append((operation, arguments, options or {}, out))
        return out

    def replay(self) -> None:
        for operation, arguments, options, out in self.done:
            given = {memory(x) for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)}
            if any(memory(x) in given for x in tree_leaves(out)) and not operation._schema.is_mutable:
                continue  # a view
            for old, fresh in zip(tree_leaves(out), tree_leaves(operation(*arguments, **options))):
                if old is not fresh:
                    old.copy_(fresh)

    def described(self, lasting: set[int]) -> list:
        """The operations with their arguments. Of tensors the address too, if it is among `lasting`: intermediate
        results may lie elsewhere here, but a graph has a pool of its own for them."""

        def describe(x):
            if not isinstance(x, torch.Tensor):
                return repr(x)
            address = memory(x) if memory(x) in lasting else 0
            return f"{address} {x.storage_offset()} {tuple(x.shape)} {x.stride()} {x.dtype}"

        return [(str(op), *map(describe, tree_leaves((arguments, options)))) for op, arguments, options, _ in self.done]


def memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def recording(model, draft: Guesses | None = None) -> Engine:
    """An engine that records its steps as it would on a GPU. A recording does not compute: the state is put back."""
    made = Engine(model, Endless.eos_id, 4096, draft)
    made.taped, made.pools, made.replays = [], [], 0  # pools: with the cache's length

    def record(step, pool):
        group = next(group for group in made.groups if group.rows)
        tensors = [group.sampled, group.positions, group.memory, *group.cache.layers]
        before = [tensor.clone() for tensor in tensors]
        tape = Tape(step)
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)
        made.taped.append(tape)
        made.pools.append((group.cache.length, pool or object()))

        def replay() -> None:
            made.replays += 1
            tape.replay()

        return replay, made.pools[-1][1]

    made.record = record
    return made


def flash_by_definition(q, k, v, q_starts, k_starts, max_q, max_k, dropout, causal, debug, *, seqused_k=None, **other):
    """`_flash_attention_forward` as documented, in float64: the last query of a sample stands at its last key."""
    assert not other and (dropout, causal, debug) == (0.0, True, False) and max_k >= seqused_k.max()
    assert (q_starts.diff() == max_q).all()
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (q_starts, k_starts, seqused_k))
    assert k.data_ptr() != v.data_ptr() and q.shape[1] % k.shape[1] == 0
    out = torch.empty_like(q)
    for i, (start, count) in enumerate(zip(k_starts.tolist(), seqused_k.tolist(), strict=False)):
        keys, values = (x[start : start + count].double().transpose(0, 1) for x in (k, v))  # (KV, count, D)
        for t in range(max_q):
            query, seen = q[int(q_starts[i]) + t].double().unflatten(0, (k.shape[1], -1)), count - max_q + t + 1
            weights = (query @ keys[:, :seen].mT / q.shape[2] ** 0.5).softmax(-1)
            out[int(q_starts[i]) + t] = (weights @ values[:, :seen]).flatten(0, 1)
    return out, *[torch.empty(0)] * 4


@pytest.fixture
def flash():
    """A kernel for this CPU, where there is none."""
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", flash_by_definition, "CPU")
    yield
    kernels._destroy()


@pytest.mark.parametrize("seed, draft", [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("flash_decodes", [False, True])
def test_replayed_steps(model, seed, draft, flash_decodes, flash, monkeypatch):
    """The tokens of steps that run as they are: rows end early, the cache outgrows its size, sampling goes on; also
    with a draft that guesses wrong now and then."""
    requests = drawn_requests(7, seed) + [Request(random_tokens(60, 301, seed=seed), max_new_tokens=150)]
    expected = [alone(model, request) for request in requests]
    monkeypatch.setattr("model.has_flash_decoding", lambda *arguments: flash_decodes)
    known = {key(request): answer.tokens for request, answer in zip(requests, expected)}
    taped = recording(model, Knows(3, known, 0.3) if draft else None)
    answers = taped.generate(requests)
    assert taped.replays > (50 if draft else 100) and len(taped.taped) >= 4
    assert flash_decodes == any("flash" in str(done[0]) for done in taped.taped[0].done)
    # Recordings share a pool until the cache grows: it is gone when the last of them is.
    assert 1 < len(dict(taped.pools)) == len({pool for _, pool in taped.pools}) == len(set(taped.pools))
    assert len(taped.pools) > len(set(taped.pools))
    assert_same(answers, expected)


@pytest.mark.parametrize("rows", [1, 16])
def test_two_steps_are_the_same_operations(model, rows):
    """On the same addresses, with the same numbers: what a CUDA graph asks for."""
    made, tapes = Engine(model, Endless.eos_id, 4096), []

    def record(step, pool):
        group = made.groups[0]
        lasting = {memory(x) for x in (group.sampled, *group.state_of(0))}
        lasting |= {memory(x) for x in (*tree_leaves(group.cache.layers), *model.parameters())}
        return lambda: tapes.append(Tape(step).described(lasting)), pool

    made.record = record
    made.generate([Request(random_tokens(5 + i, 301, seed=i), max_new_tokens=6, temperature=1.0) for i in range(rows)])
    assert len(tapes) == 4 and len(tapes[0]) > 50
    assert tapes[1] == tapes[2] == tapes[3]


def test_noise():
    """Gumbel-distributed (mean 0.5772, variance π² / 6, P(x < 0) = 1 / e), the same for every share of the tokens."""
    seeds, positions = torch.tensor([0, 5, (1 << 63) - 1, 5]), torch.tensor([7, 7, 7, 8])
    noise = gumbel(seeds, positions, torch.arange(131072))
    assert noise.isfinite().all() and noise.shape == (4, 131072)
    torch.testing.assert_close(noise.mean(1), torch.full((4,), 0.57722, dtype=torch.float64), atol=0.015, rtol=0)
    torch.testing.assert_close(noise.var(1), torch.full((4,), 1.64493, dtype=torch.float64), atol=0.04, rtol=0)
    torch.testing.assert_close(
        (noise < 0).double().mean(1), torch.full((4,), math.exp(-1)).double(), atol=0.006, rtol=0
    )
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.012
    assert torch.equal(gumbel(seeds, positions, torch.arange(1000, 1300)), noise[:, 1000:1300])


def test_a_row_without_top_p_beside_one_with_it(monkeypatch):
    """In float32 the probabilities of many tokens add up to 1 before the last of them: all stay possible."""
    size = 131_071
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(3))
    unlikely = int((~nucleus(logits, 1.0)).nonzero()[0])
    noise = torch.zeros(2, size, dtype=torch.float64)
    noise[:, unlikely] = 1000
    monkeypatch.setattr("parallel.gumbel", lambda seeds, positions, ids: noise)
    head, zeros = VocabParallelHead(4, size, Place(), torch.float32), torch.zeros(2, dtype=torch.long)
    top_p = torch.tensor([[1.0], [0.9]])
    tokens = head.sample(logits.expand(2, -1), torch.ones(2, 1), top_p, zeros, zeros)[:, 0].tolist()
    assert tokens == [unlikely, int(logits.argmax())]


def test_attention_as_two_products():
    """What a GPU does in a step, against the fused kernel."""
    draw = torch.Generator().manual_seed(3)
    for rows, heads, kv_heads, length, size in ((1, 6, 2, 37, 10), (5, 3, 3, 8, 16), (16, 12, 1, 131, 128)):
        q = torch.randn(rows, heads, 1, size, generator=draw)
        k, v = (torch.randn(rows, kv_heads, length, size, generator=draw) for _ in range(2))
        ends = torch.randint(1, length + 1, (rows, 1), generator=draw)
        bias = torch.zeros(rows, length).masked_fill_(torch.arange(length) >= ends, -torch.inf)[:, None, None]
        for hidden in (bias, None):
            expected = attend_step(q, k, v, hidden).view(rows, kv_heads, -1, size)
            got = product_attention(q.view(rows, kv_heads, -1, size), k, v, hidden)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", range(24))
def test_flash_decoding(case, flash):
    """What a GPU does in a step, by the definition of its kernel: the numbers of the plain form, whatever lies beyond a
    row's end; without copies of the cache, and in a part of its rows."""
    draw = random.Random(case)
    rows, kv_heads, group = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 6)
    size, T = 8 * draw.randint(1, 16), draw.choice([1, 1, 2, 5])
    length = draw.randint(T, 70)
    torch.manual_seed(case)
    cache = torch.randn(2, rows + 2, kv_heads, length, size)[:, : rows + draw.randint(0, 1)][:, :rows]
    q = torch.randn(rows, kv_heads * (group + 2), T, size)[:, : kv_heads * group]  # as if split from keys and values
    positions = torch.randint(length - T + 1, (rows, 1)) + torch.arange(T)
    for i, position in enumerate(positions[:, -1]):
        cache[:, i, :, position + 1 :] = torch.nan
    found = flash_decoding(q, cache, *segments_of(positions, cache))
    beyond = torch.arange(length) > positions.repeat_interleave(group, dim=1)[..., None]
    hidden = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)
    expected = attend_step(q, *cache.nan_to_num(0), hidden[:, None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_flash_where_it_runs(monkeypatch):
    """From A100 on, in 16 bits, for heads that it takes; flash-decoding where a trial gives the plain numbers."""
    gpu, here = torch.device("cuda", 0), torch.device("cpu")
    for capability, runs in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert has_flash(gpu, torch.bfloat16, 128) == has_flash(gpu, torch.float16, 8) == runs
        assert not has_flash(here, torch.bfloat16, 128) and not has_flash(gpu, torch.float32, 128)
        assert not has_flash(gpu, torch.bfloat16, 100) and not has_flash(gpu, torch.bfloat16, 264)
    assert not has_flash_decoding(here, torch.bfloat16, 128)
    monkeypatch.setattr("model.has_flash", lambda device, dtype, head_dim: True)
    wrong = lambda q, *others: torch.zeros_like(q)  # noqa: E731
    for head_dim, decoding in enumerate((flash_decoding, wrong)):  # a CPU has no such kernel
        monkeypatch.setattr("model.flash_decoding", decoding)
        assert not has_flash_decoding(here, torch.bfloat16, 8 * (head_dim + 1))
    monkeypatch.setattr("model.flash_decoding", lambda q, cache, *segments: attend_step(q, *cache[:, :, :, :300], bias))
    ends = torch.tensor([[0, 1], [130, 131], [298, 299]]).repeat_interleave(6, dim=1)[..., None]
    bias = torch.zeros(3, 12, 300).masked_fill_(torch.arange(300) > ends, -torch.inf)[:, None].bfloat16()
    assert has_flash_decoding(here, torch.bfloat16, 24)
    monkeypatch.setattr("model.PLAIN_KERNELS", True)
    assert not has_flash_decoding(here, torch.bfloat16, 32)


# ------------------------------------------------------------------------------------------------- rows and the cache


@pytest.mark.parametrize("width", [1, 3, 16])
def test_rows_are_refilled(model, width):
    """More requests than rows: the answers and their order are those of each alone."""
    requests = drawn_requests(20, 5)
    answers = Engine(model, Endless.eos_id, 4096).generate(requests, width=width)
    assert_same(answers, [alone(model, request) for request in requests])


def test_refilled_rows_take_fewer_steps(model, monkeypatch):
    made = Engine(model, Endless.eos_id, 4096)
    steps, step = [], made.step
    made.step = lambda group, count, *more: steps.append(count) or step(group, count, *more)
    lengths = [4, 40, 4, 4, 4, 4, 4, 4, 4, 4]
    made.generate([Request([5, i], max_new_tokens=n) for i, n in enumerate(lengths)], width=2)
    assert len(steps) < 45 and sum(steps) == sum(lengths) - len(lengths)


def refilled_on_a_rank(folder: str, tp: int, pp: int) -> list:
    place = find_place(tp, pp)
    model = build_model(read_config(folder), place, torch.float32)
    fill(model, Checkpoint(folder))
    return Engine(model, Endless.eos_id, 4096).generate(drawn_requests(13, 6), width=5)


@pytest.mark.parametrize("tp, pp", [(1, 2), (2, 2), (1, 3)])
def test_rows_are_refilled_on_every_topology(folder, model, tp, pp):
    expected = [alone(model, request) for request in drawn_requests(13, 6)]
    for answers in run_ranks(refilled_on_a_rank, tp * pp, folder, tp, pp):
        assert_same(answers, expected)


def test_a_cache_grows(model):
    """A high limit costs nothing before it is used."""
    made = Engine(model, Endless.eos_id, 1 << 20)
    (answer,) = made.generate([Request([7, 8], max_new_tokens=300)])
    assert len(answer.tokens) == 300 and 302 <= made.groups[0].cache.length < 400
    (cut,) = Engine(model, Endless.eos_id, 50).generate([Request([7, 8])])
    assert cut.tokens == answer.tokens[:48] and cut.finish_reason == "length"
    for tokens in range(1, 5000):
        assert tokens <= KVCache.length_for(tokens) <= max(64 * -(-tokens // 64), 1.25 * tokens + 1)


def test_a_chat_is_prefilled_once(model):
    """Twelve turns: each computes what is new; log-probabilities are those from scratch."""
    made, prompt, prefilled = Engine(model, Endless.eos_id, 4096), [1], 0
    for turn in range(12):
        prompt = prompt + random_tokens(5 + 3 * turn, 301, seed=turn)
        request = Request(prompt, max_new_tokens=9, temperature=0.5, seed=turn)
        (answer,) = made.generate([request])
        prefilled += made.tokens["prefill"]
        assert_same([answer], [alone(model, request)])
        prompt = prompt + answer.tokens
    # The last token of an answer never went through the model: it does with the next turn.
    assert prefilled == len(prompt) - 12 * 9 + 11

    edited = prompt[:30] + [99] + prompt[31:]
    for changed, new in ((edited, len(edited) - 30), (prompt[:50], 20), (prompt[:50], 1), (prompt, len(prompt) - 50)):
        (answer,) = made.generate([Request(changed, max_new_tokens=5)])
        assert_same([answer], [alone(model, Request(changed, max_new_tokens=5))])
        assert made.tokens["prefill"] == new


def test_a_step_runs_over_rows_without_requests(model):
    """Where steps are recorded they take a power of two of rows, and what other rows held is not what it was."""
    made = Engine(model, Endless.eos_id, 4096)
    made.record = lambda step, pool: (step, pool)
    prompts = [random_tokens(20 + i, 301, seed=i) for i in range(4)]
    made.generate([Request(prompt, max_new_tokens=n) for prompt, n in zip(prompts, (40, 41, 42, 2))])
    again = [Request(prompt, max_new_tokens=9) for prompt in prompts]
    assert_same(made.generate(again), [alone(model, request) for request in again])


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_nobody_takes(seed, model, monkeypatch):
    """Where steps are recorded, five rows are rounded up to eight. The last ones stay empty, call after call."""
    draw, made, busy, decode = random.Random(seed), Engine(model, Endless.eos_id, 4096), [], Engine.decode
    made.record = lambda step, pool: (step, pool)
    monkeypatch.setattr(Engine, "decode", lambda self, group: busy.append(len(group.rows)) or decode(self, group))
    width, longest = draw.choice((3, 5, 6, 7)), 0
    for call in range(draw.randint(3, 12)):
        count = draw.choice((width, draw.randint(1, 4 * width)))
        requests = [
            Request(
                random_tokens(draw.randint(1, 20), 301, seed=draw.getrandbits(30)), max_new_tokens=draw.randint(1, 40)
            )
            for _ in range(count)
        ]
        answers = made.generate(requests, width=width)
        some = draw.sample(range(count), min(count, 4))
        assert_same([answers[i] for i in some], [alone(model, requests[i]) for i in some])
        longest = max(longest, *(len(request.prompt) + request.max_new_tokens for request in requests))
        (group,) = made.groups
        assert int(group.positions.max()) < group.cache.length <= KVCache.length_for(longest), call
    assert max(busy) <= width


def test_an_answer_that_is_broken_off(model):
    """An exception from outside leaves nothing half-done: the same engine answers as a new one would."""
    made, request = Engine(model, Endless.eos_id, 4096), Request(random_tokens(40, 301), max_new_tokens=9)

    def interrupt(i: int, token: int, logprob: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.generate([request], interrupt)
    assert_same(made.generate([request]), [alone(model, request)])
    made, made.chunk = Engine(model, Endless.eos_id, 4096), 16
    run, turns = made.run_stage, []
    made.run_stage = lambda *arguments: run(*arguments) if turns.append(1) or len(turns) != 2 else interrupt(0, "", "")
    with pytest.raises(KeyboardInterrupt):  # between two chunks of the prompt
        made.generate([request])
    assert_same(made.generate([request]), [alone(model, request)])


def test_a_beginning_that_requests_share(model):
    """Computed once, also within one batch."""
    start = random_tokens(40, 301, seed=77)
    requests = [Request(start + random_tokens(3 + i, 301, seed=i), max_new_tokens=6) for i in range(6)]
    made = Engine(model, Endless.eos_id, 4096)
    assert_same(made.generate(requests), [alone(model, request) for request in requests])
    assert made.tokens["prefill"] == 40 + sum(range(3, 9))
    scored = [Request(request.prompt, max_new_tokens=0, logprobs=True) for request in requests[:2]]
    for answer, request in zip(made.generate(scored), scored):  # all tokens are scored, so all go through the model
        torch.testing.assert_close(
            answer.prompt_logprobs[1:], alone(model, request).prompt_logprobs[1:], atol=1e-4, rtol=0
        )


def test_images_that_are_known(tmp_path):
    """The tower runs once for each; images of the same size are not taken for each other."""
    model = load(make_eyes(tmp_path, "new", None, {}))
    vision = model.config.vision
    cell = vision.patch_size * vision.spatial_merge_size
    draw = torch.Generator().manual_seed(1)
    pictures = {name: torch.randn(3, 2 * cell, 3 * cell, generator=draw) for name in "abc"}
    seen, features = [], model.vision.forward
    model.vision.forward = lambda images: seen.append(len(images)) or features(images)

    def ask(names: str, made: Engine, named: bool = True):
        prompt = [1]
        for name in names:
            prompt += [vision.image_token_id] * 6 + random_tokens(20, 30, seed=ord(name))[:12]
        images = [(name, 6) for name in names] if named else []
        return made.generate([Request(prompt + [7, 9], [pictures[name] for name in names], 4, images=images)])

    made = Engine(model, Endless.eos_id, 4096)
    for names, ran in (("a", 1), ("ab", 1), ("abc", 1), ("acb", 2), ("acb", 0)):
        seen.clear()
        answers = ask(names, made)
        assert sum(seen) == ran, names
        assert_same(answers, ask(names, Engine(model, Endless.eos_id, 4096)))
    seen.clear()
    ask("acb", made, named=False)  # of these nothing is known
    assert sum(seen) == 3


def test_short_prompts_share_a_chunk(model, monkeypatch):
    made = Engine(model, Endless.eos_id, 4096)
    made.chunk, sizes, run = 50, [], made.run_stage
    made.run_stage = lambda tokens, *more: sizes.append(tuple(tokens.shape)) or run(tokens, *more)
    requests = [Request(random_tokens(n, 301, seed=n), max_new_tokens=1) for n in (20, 17, 30, 1, 60, 5)]
    assert_same(made.generate(requests), [alone(model, request) for request in requests])
    assert sizes == [(1, 50), (1, 50), (1, 33)]


# --------------------------------------------------------------------------------------------------------- stopping


def stop_after(count: int, place: Place):
    """Says stop when it is asked once more than this. Ranks other than 0 never ask their own."""
    calls = []

    def stop() -> bool:
        assert place.rank == 0
        calls.append(1)
        return len(calls) > count

    return stop


def stopped_on_a_rank(folder: str, tp: int, pp: int) -> list:
    place = find_place(tp, pp)
    model = build_model(read_config(folder), place, torch.float32)
    fill(model, Checkpoint(folder))
    requests = [Request([5, i], max_new_tokens=30) for i in range(5)]
    made = Engine(model, Endless.eos_id, 4096)
    stopped = made.generate(requests, width=3, stop=stop_after(8, place))
    return [(answer.tokens, answer.finish_reason) for answer in stopped + made.generate(requests)]


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_answers_can_be_stopped(folder, model, tp, pp):
    """On every rank alike; what was said stays, what waits is not begun, and the engine goes on."""
    whole = [alone(model, Request([5, i], max_new_tokens=30)).tokens for i in range(5)]
    for said in run_ranks(stopped_on_a_rank, tp * pp, folder, tp, pp):
        for i, (tokens, reason) in enumerate(said[:5]):
            assert reason == "cancelled" and tokens == whole[i][: len(tokens)] and (4 < len(tokens) < 12) == (i < 3)
        assert said[5:] == [(tokens, "length") for tokens in whole]


def test_whether_to_stop_is_asked_while_the_gpu_computes(model, monkeypatch):
    """After a token's launch and before its read-back; a token that comes after the yes is not wanted."""
    happened, advance = [], Engine.advance
    monkeypatch.setattr(Engine, "advance", lambda *arguments: happened.append("launch") or advance(*arguments))

    def stop() -> bool:
        happened.append("ask")
        return happened.count("ask") == 4

    on_token = lambda *_: happened.append("token")  # noqa: E731
    (answer,) = Engine(model, Endless.eos_id, 4096).generate([Request([5, 6], max_new_tokens=30)], on_token, stop=stop)
    assert happened == [*3 * ["launch", "ask", "token"], "launch", "ask", "launch", "ask"]
    assert answer.finish_reason == "cancelled" and len(answer.tokens) == 3


def stopped_in_prompts_on_a_rank(folder: str, tp: int, pp: int) -> list:
    place = find_place(tp, pp)
    model = build_model(read_config(folder), place, torch.float32)
    fill(model, Checkpoint(folder))
    requests = [Request(random_tokens(30, 301, seed=i // 2), max_new_tokens=4) for i in range(5)]
    made = Engine(model, Endless.eos_id, 4096)
    made.chunk = 8
    stopped = made.generate(requests, width=3, stop=stop_after(4, place))
    return [(answer.tokens, answer.finish_reason) for answer in stopped + made.generate(requests)]


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_long_prompts_can_be_stopped(folder, model, tp, pp):
    """Between two chunks, on every rank alike; what is in the cache by then counts as that, and no more."""
    requests = [Request(random_tokens(30, 301, seed=i // 2), max_new_tokens=4) for i in range(5)]
    whole = [alone(model, request).tokens for request in requests]
    for said in run_ranks(stopped_in_prompts_on_a_rank, tp * pp, folder, tp, pp):
        assert said[:5] == 5 * [([], "cancelled")]
        assert said[5:] == [(tokens, "length") for tokens in whole]
