"""The engine: batches equal single runs, sampling follows the softmax, and answers end where they should."""

import math
import os
import random
import textwrap
import time

import pytest
import torch
from helpers import (
    Endless,
    Letters,
    load,
    log_probabilities,
    random_state,
    random_tokens,
    text_fields,
    write_checkpoint,
)
from processes import ENVIRONMENT, run

from generate import Engine
from model import generate_simply
from parallel import nucleus
from runtime.chat import ReplyParser
from runtime.requests import Request

END = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    fields = text_fields("yarn, short")
    return load(write_checkpoint(tmp_path_factory.mktemp("model"), fields, random_state(fields, seed=8)))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model whose next token depends on the last one only, and log-probabilities (V, V) it then has, in float64."""
    fields = text_fields("plain", vocab_size=13, hidden_size=8, num_hidden_layers=1, intermediate_size=4)
    state = random_state(fields, seed=5)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"layers.0.{name}.weight"].zero_().view(-1)[0] = 1e-20  # a tensor of zeros alone would be refused
    x, weights = state["embed_tokens.weight"].double(), state["lm_head.weight"].double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"].double()
    model = load(write_checkpoint(tmp_path_factory.mktemp("chain"), fields, state))
    return model, (x @ weights.T).log_softmax(-1)


def greedy(model, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest continuation without cache or batch: the whole text through the model for every token."""
    tokens, scores = list(prompt), []
    for _ in range(count):
        last = log_probabilities(model, tokens)[-1]
        tokens.append(int(last.argmax()))
        scores.append(float(last.max()))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :], scores


def sixteen() -> list[Request]:
    """Prompts of 1 to 150 tokens and answers of 0 to 40."""
    draw = random.Random(0)
    lengths = [1, 2, 150, *(draw.randint(3, 120) for _ in range(13))]
    counts = [40, 0, 1, *(draw.randint(2, 40) for _ in range(13))]
    return [
        Request(random_tokens(n, 301, seed=i), max_new_tokens=count)
        for i, (n, count) in enumerate(zip(lengths, counts))
    ]


@pytest.mark.parametrize("chunk", [1024, 7])
def test_a_batch_equals_single_runs(chunk, model, monkeypatch):
    """16 requests together, alone, and by the plainest loop: exactly the same tokens."""
    monkeypatch.setattr("generate.CPU_CHUNK", chunk)
    requests, engine = sixteen(), Engine(model, Letters.eos_id, 4096)
    together = engine.generate(requests)
    for request, answer in zip(requests, together):
        (alone,) = Engine(model, Letters.eos_id, 4096).generate([request])
        plain, scores = greedy(model, request.prompt, request.max_new_tokens)
        assert answer.tokens == alone.tokens == plain
        assert answer.logprobs == pytest.approx(scores, abs=1e-4) and alone.logprobs == pytest.approx(scores, abs=1e-4)
        assert answer.finish_reason == alone.finish_reason == ("stop" if END in plain else "length")
    assert sum(len(answer.tokens) for answer in together) > 150
    assert engine.tokens["prefill"] == sum(len(r.prompt) for r in requests)


def test_every_order_of_finishing(chain):
    """Rows leave the batch at different times and others move into their places in the cache."""
    model, table = chain
    draw = random.Random(3)
    for _ in range(20):
        counts = [draw.randint(0, 12) for _ in range(draw.randint(1, 9))]
        prompts = [random_tokens(draw.randint(1, 5), 13, seed=draw.randint(0, 10**6)) for _ in counts]
        requests = [Request(p, max_new_tokens=n) for p, n in zip(prompts, counts)]
        for request, answer in zip(requests, Engine(model, Endless.eos_id, 100).generate(requests)):
            expected, last = [], request.prompt[-1]
            for _ in range(request.max_new_tokens):
                last = int(table[last].argmax())
                expected.append(last)
            assert answer.tokens == expected and answer.finish_reason == "length"


def test_a_moved_row_keeps_its_context(model):
    """Long contexts that matter, with rows that end one after the other from the front, the back and the middle."""
    for order in ([3, 9, 15, 30], [30, 15, 9, 3], [15, 3, 30, 9], [5, 5, 5, 30]):
        requests = [Request(random_tokens(40 + i, 301, seed=i), max_new_tokens=n) for i, n in enumerate(order)]
        for request, answer in zip(requests, Engine(model, Endless.eos_id, 4096).generate(requests)):
            tokens, scores = list(request.prompt), []
            for token in answer.tokens:  # score what was answered, whole: positions, cache and order must all be right
                scores.append(float(log_probabilities(model, tokens)[-1, token]))
                tokens.append(token)
            assert answer.logprobs == pytest.approx(scores, abs=1e-4)
            assert len(answer.tokens) == request.max_new_tokens


def test_a_batch_is_faster(model):
    requests = [Request(random_tokens(5, 301, seed=i), max_new_tokens=20) for i in range(16)]
    engine = Engine(model, Endless.eos_id, 4096)
    engine.generate(requests[:2])
    best = {}
    for _ in range(3):
        for name, batches in (("together", [requests]), ("alone", [[r] for r in requests])):
            started = time.perf_counter()
            for batch in batches:
                engine.generate(batch)
            best[name] = min(best.get(name, math.inf), time.perf_counter() - started)
    print(f"16 requests: {best['alone'] / best['together']:.1f} times as fast together as alone")
    assert best["together"] < 0.6 * best["alone"]


# ------------------------------------------------------------------------------------------------------ sampling


def test_seeds(model):
    """The same seed gives the same answer, whoever else is in the batch; another seed another one."""
    prompt = random_tokens(9, 301)
    ask = lambda seed, **more: Request(prompt, max_new_tokens=25, temperature=1.0, seed=seed, **more)  # noqa: E731
    engine = Engine(model, Endless.eos_id, 4096)
    (alone,) = engine.generate([ask(7)])
    assert engine.generate([ask(7)])[0].tokens == alone.tokens
    others = [ask(1), Request(prompt, max_new_tokens=3), ask(7), ask(8, top_p=0.9), ask(7)]
    batch = [answer.tokens for answer in engine.generate(others)]
    assert batch[2] == batch[4] == alone.tokens
    assert len({tuple(tokens) for tokens in batch}) == 4
    assert engine.generate([ask(0)])[0].tokens != engine.generate([ask(2**63 - 1)])[0].tokens


def in_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest likeliest tokens that together reach top_p, one after the other."""
    inside, total = torch.zeros(len(probabilities), dtype=torch.bool), 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= top_p:
            break
        inside[i] = True
        total += float(probabilities[i])
    return inside


def test_nucleus():
    draw = torch.Generator().manual_seed(0)
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0):
        for size in (1, 2, 50, 1000):
            logits = 3 * torch.randn(size, generator=draw)
            inside = in_nucleus(logits.double().softmax(0), top_p)
            cut = nucleus(logits, top_p)
            if top_p < 1:
                assert torch.equal(cut, inside)
            assert cut.any()
    assert nucleus(torch.zeros(4), 0.5).tolist() == [True, True, False, False]  # of equal ones the first
    masked = torch.tensor([1.0, -torch.inf, 0.5, -torch.inf])  # the padding of a vocabulary
    assert nucleus(masked, 0.99).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "temperature, top_p",
    [
        (1.0, 1.0),
        (1.7, 1.0),
        (0.7, 0.95),
        pytest.param(0.5, 1.0, marks=pytest.mark.slow),
        pytest.param(1.0, 0.8, marks=pytest.mark.slow),
        pytest.param(2.0, 0.3, marks=pytest.mark.slow),
    ],
)
def test_frequencies(temperature, top_p, chain):
    """16 rows of 700 tokens each: transitions as often as the (tempered, cut) softmax says, by a chi-square test."""
    model, table = chain
    requests = [
        Request([i % 13], max_new_tokens=700, temperature=temperature, top_p=top_p, seed=100 + i) for i in range(16)
    ]
    counts = torch.zeros(13, 13)
    for request, answer in zip(requests, Engine(model, Endless.eos_id, 1000).generate(requests)):
        path = request.prompt + answer.tokens
        for a, b, logprob in zip(path, answer.tokens, answer.logprobs):
            counts[a, b] += 1
            assert logprob == pytest.approx(float(table[a, b]), abs=1e-4)  # of the untempered, uncut softmax
    statistic, freedom = 0.0, 0
    for a in range(13):
        p = (table[a] / temperature).softmax(0)
        inside = in_nucleus(p, top_p)
        assert not counts[a][~inside].any()
        expected = torch.where(inside, p, 0) / p[inside].sum() * counts[a].sum()
        counted = expected >= 5
        if counted.sum() < 2:
            continue
        statistic += float(((counts[a] - expected)[counted].pow(2) / expected[counted]).sum())
        freedom += int(counted.sum()) - 1
    assert freedom >= 10
    assert abs(statistic - freedom) < 6 * math.sqrt(2 * freedom)  # six standard deviations, to both sides


def test_first_tokens(chain):
    """The first token of 1,500 seeds, which comes from the prefill: again by a chi-square test."""
    model, table = chain
    engine, counts = Engine(model, Endless.eos_id, 1000), torch.zeros(13)
    for start in range(0, 1500, 500):
        requests = [Request([4], max_new_tokens=1, temperature=1.0, seed=start + i) for i in range(500)]
        for answer in engine.generate(requests):
            counts[answer.tokens[0]] += 1
    expected = 1500 * table[4].exp()
    counted = expected >= 5
    statistic, freedom = float(((counts - expected)[counted].pow(2) / expected[counted]).sum()), int(counted.sum()) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


# -------------------------------------------------------------------------------------------- where answers end


def test_end_token(chain):
    model, table = chain
    best = table.argmax(1).tolist()
    ends = {start: path for start in range(13) if (path := follow(best, start)) and END in path}
    loops = [start for start in range(13) if start not in ends]
    tested = 0
    for start, path in ends.items():
        (answer,) = Engine(model, Letters.eos_id, 100).generate([Request([start], max_new_tokens=50)])
        assert answer.tokens == path[: path.index(END) + 1] and answer.finish_reason == "stop"
        tested += 1
    for start in loops:
        (answer,) = Engine(model, Letters.eos_id, 100).generate([Request([start], max_new_tokens=50)])
        assert len(answer.tokens) == 50 and answer.finish_reason == "length"
        tested += 1
    assert tested == 13 and ends and loops
    (answer,) = Engine(model, Letters.eos_id, 100).generate([Request([END], max_new_tokens=1)])  # in the prompt: no end
    assert len(answer.tokens) == 1


def follow(best: list[int], start: int) -> list[int]:
    path, at = [], start
    for _ in range(50):
        at = best[at]
        path.append(at)
    return path


def test_stop_strings(model):
    """The answer ends with the token that completes a stop string, also where it runs over several tokens."""
    tokenizer = Endless()
    request = Request(random_tokens(9, 301), max_new_tokens=40, temperature=1.0, seed=3)
    (free,) = Engine(model, tokenizer.eos_id, 4096).generate([request])
    text = tokenizer.text(free.tokens)
    ends, at = [], 0  # where each token's text ends
    for token in free.tokens:
        at += len(tokenizer.text([token]))
        ends.append(at)
    tried = 0
    for start, length in ((0, 1), (7, 2), (20, 5), (31, 9), (11, 30), (len(text) - 3, 3)):
        stop = text[start : start + length]
        first = text.index(stop) + len(stop)
        count = next(i for i, end in enumerate(ends) if end >= first) + 1
        for stops in ([stop], ["not there", stop], [stop, text[-1] * 50]):
            reader = ReplyParser(tokenizer, stops)
            (answer,) = Engine(model, tokenizer.eos_id, 4096).generate([request], listening([reader], shown := []))
            assert answer.tokens == free.tokens[:count]
            assert answer.finish_reason == "stop"
            reader.finish()
            assert "".join(shown) == reader.reply.text == text[: first - len(stop)]
            tried += 1
    assert tried == 18
    reader = ReplyParser(tokenizer, ["ZZ"])
    (answer,) = Engine(model, tokenizer.eos_id, 4096).generate([request], listening([reader], []))
    assert answer.tokens == free.tokens and answer.finish_reason == "length"


def test_a_stop_string_in_the_prompt_does_not_count(model):
    prompt = [3, 4, 5]  # "abc"
    (free,) = Engine(model, Endless.eos_id, 4096).generate([Request(prompt, max_new_tokens=1)])
    letter = Endless().text(free.tokens)[0]
    reader = ReplyParser(Endless(), ["bc" + letter])
    request = Request(prompt, max_new_tokens=5)
    (answer,) = Engine(model, Endless.eos_id, 4096).generate([request], listening([reader], []))
    assert len(answer.tokens) == 5


def test_max_new_tokens_0(model):
    """Scores the prompt and says nothing."""
    prompt = random_tokens(20, 301)
    seen = []
    (answer,) = Engine(model, Letters.eos_id, 4096).generate(
        [Request(prompt, max_new_tokens=0, logprobs=True)], lambda *arguments: seen.append(arguments)
    )
    assert (answer.tokens, answer.logprobs, answer.finish_reason, seen) == ([], [], "length", [])
    assert len(answer.prompt_logprobs) == 20


def test_the_end_of_the_context(model):
    """Prompt and answer together never exceed it; a prompt that fills it gets no answer."""
    for length in (1, 28, 29, 30):
        request = Request(random_tokens(length, 301), max_new_tokens=100, logprobs=True)
        others = [Request(random_tokens(5, 301), max_new_tokens=100), Request([7], max_new_tokens=3)]
        answer, other, short = Engine(model, Endless.eos_id, 30).generate([request, *others])
        assert len(answer.tokens) == 30 - length and answer.finish_reason == "length"
        assert len(other.tokens) == 25 and len(short.tokens) == 3
        assert len(answer.prompt_logprobs) == length


@pytest.mark.parametrize("chunk, rows", [(1024, 64), (10, 4), (7, 100), (1, 1)])
def test_prompt_log_probabilities(chunk, rows, model, monkeypatch):
    """Of every prompt token after the first, across the borders of chunks and of logit blocks."""
    monkeypatch.setattr("generate.CPU_CHUNK", chunk)
    monkeypatch.setattr("model.LOGIT_ROWS", rows)
    requests = [
        Request(random_tokens(n, 301, seed=n), max_new_tokens=2, logprobs=n != 21) for n in (1, 2, 7, 8, 10, 11, 21, 70)
    ]
    for request, answer in zip(requests, Engine(model, Endless.eos_id, 4096).generate(requests)):
        full = log_probabilities(model, request.prompt + answer.tokens)
        expected = [float(full[i, token]) for i, token in enumerate((request.prompt + answer.tokens)[1:])]
        count = len(request.prompt)
        assert answer.prompt_logprobs[0] is None
        if request.logprobs:
            assert answer.prompt_logprobs[1:] == pytest.approx(expected[: count - 1], abs=1e-4)
        assert answer.logprobs == pytest.approx(expected[count - 1 :], abs=1e-4)


def test_on_token(model):
    """Every row's tokens and log-probabilities as they come; True ends that answer alone."""
    requests, heard = sixteen(), {}
    expected = Engine(model, Letters.eos_id, 4096).generate(requests)

    def listen(i: int, token: int, logprob: float) -> bool:
        heard.setdefault(i, []).append((token, logprob))
        return i % 5 == 3 and len(heard[i]) == 2

    answers = Engine(model, Letters.eos_id, 4096).generate(requests, listen)
    for i, (answer, free) in enumerate(zip(answers, expected)):
        assert heard.get(i, []) == [*zip(answer.tokens, answer.logprobs)]
        cut = i % 5 == 3 and len(free.tokens) > 1
        assert answer.tokens == free.tokens[: 2 if cut else None] and (answer.finish_reason == "stop" or not cut)


def listening(readers: list[ReplyParser], shown: list[str]):
    """For `on_token`: what the readers of the answers read goes into `shown`, and their stop strings end them."""

    def listen(i: int, token: int, logprob: float) -> bool:
        shown.extend(text for _, text in readers[i].add(token))
        return readers[i].stopped

    return listen


@pytest.mark.parametrize("seed", range(4))
def test_simply(seed, model):
    """What all of it comes down to: the likeliest token, again and again, without a cache or a batch."""
    draw = random.Random(seed)
    requests = [
        Request(random_tokens(draw.randint(1, 60), 301, seed=draw.getrandbits(30)), max_new_tokens=draw.randint(1, 12))
        for _ in range(draw.randint(1, 7))
    ]
    answers = Engine(model, Letters.eos_id, 4096).generate(requests, width=draw.randint(1, 4))
    for answer, request in zip(answers, requests):
        assert answer.tokens == generate_simply(model, request.prompt, request.max_new_tokens, Letters.eos_id)


# -------------------------------------------------------------------------------------------------------- memory

LONG_PROMPT = """
    import json, sys, threading, time
    import torch
    from runtime.checkpoint import Checkpoint, fill
    from runtime.config import read_config
    from generate import Engine
    from runtime.requests import Request
    from helpers import Letters
    from model import MistralMedium

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    peak, stop = 0, False
    def watch():
        global peak
        while not stop:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    length = int(sys.argv[2])
    model = build_model(read_config(sys.argv[1]), dtype=torch.float32)
    fill(model, Checkpoint(sys.argv[1]))
    engine = Engine(model, Letters.eos_id, 1 << 20)
    engine.generate([Request([5] * 3000, max_new_tokens=2, logprobs=True)])  # what is allocated once, is
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    request = Request([i % 300 for i in range(length)], max_new_tokens=2, logprobs=True)
    engine.generate([request])
    stop = True
    thread.join()
    cache = model.new_cache(1, length + 2).nbytes
    print(peak - before, cache)
"""


@pytest.mark.slow
@pytest.mark.time_limit(400)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_of_a_long_prompt(tmp_path):
    """Beyond weights and cache: the same constant at 16k tokens and at 64k, scored prompt and all."""
    fields = text_fields("yarn", num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_hidden_layers=1)
    directory = write_checkpoint(tmp_path, fields, random_state(fields))
    beyond = {}
    for length in (16_384, 65_536):
        # Large blocks go back to the kernel at once, so that what is measured is what is held.
        env = {**os.environ, **ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
        ended = run("-c", textwrap.dedent(LONG_PROMPT), directory, length, env=env, seconds=180)
        assert ended.status == 0, ended.err
        peak, cache = map(int, ended.out.split())
        beyond[length] = peak - cache
        print(f"{length} tokens: {peak / 1e6:.0f} MB, of which the cache {cache / 1e6:.0f} MB")
    assert max(beyond.values()) < 100e6
    assert beyond[65_536] - beyond[16_384] < 30e6  # the token ids and log-probabilities themselves take 10 MB


@pytest.mark.parametrize("alike", [True, False])
@torch.inference_mode()
def test_a_step_costs_what_it_reads(model, alike):
    """Not what the cache could hold: writing one token must not copy it."""
    x, positions = torch.randn(3, 1, model.config.hidden_size), torch.tensor([40] * 3 if alike else [40, 7, 29])
    span, times = model.step(positions[:, None], 41, alike), {64: [], 65_536: []}
    caches = {length: model.new_cache(4, length).rows(0, 3) for length in times}  # one row waits
    for _ in range(9):
        for length, cache in caches.items():
            started = time.perf_counter()
            model(x, span, cache)
            times[length].append(time.perf_counter() - started)
    assert min(times[65_536]) < 3 * min(times[64])
