"""Draft and verify: the same tokens as without a draft, whatever it guesses; and what an EAGLE head guesses."""

import json
import random
import re

import pytest
import torch
from draft_cases import END, IMG, Knows, draft_fields, key, make_draft, make_model, play, play_with_all
from helpers import (
    SIZES,
    answers,
    formula,
    load,
    random_state,
    random_tokens,
    text_fields,
    write_checkpoint,
    write_tekken,
)
from processes import run_on_ranks, run_ranks
from request_cases import assert_same

from generate import Engine
from runtime.draft import EAGLE, Eagle, read_draft
from runtime.files import UserError
from runtime.launch import find_place
from runtime.requests import Request


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    make_draft(folder, seed=3)
    return str(folder)


def check(found: dict[str, list[tuple]], expected: list[tuple]) -> int:
    for name, played in found.items():
        assert [request for request, _ in played] == [request for request, _ in expected], name
        assert_same([answer for _, answer in played], [answer for _, answer in expected])
        for (_, one), (_, other) in zip(played, expected):
            assert one.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-4)
    return len(expected)


@pytest.mark.parametrize("seed, count", [(1, 3), pytest.param(2, 1, marks=pytest.mark.slow), (3, 5)])
def test_the_same_answers(ckpt, draft, seed, count):
    """Chats that go on, are taken back and share beginnings, with pictures; batches of 1 to 16, refilled; stops."""
    found = play_with_all(ckpt, draft, seed, 5, count)
    assert check(found, found.pop("none")) > 10


@pytest.mark.slow
@pytest.mark.time_limit(2400)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_same_answers_of_300_requests(ckpt, draft, tp):
    asked, seed, turns = 0, 100 * tp, 10 // tp
    while asked < 300:
        seed += 1
        count = random.Random(seed).randint(1, 6)
        found = play_with_all(ckpt, draft, seed, turns, count)
        expected = found.pop("none")
        if tp > 1:
            found = run_ranks(on_a_rank, tp, ckpt, draft, seed, turns, count, seconds=900)[tp - 1]
        asked += check(found, expected)


def on_a_rank(ckpt: str, draft: str, seed: int, turns: int, count: int) -> dict[str, list[tuple]]:
    return play_with_all(ckpt, draft, seed, turns, count, find_place(None, None))


def test_two_ranks(ckpt, draft):
    expected = play_with_all(ckpt, draft, 7, 2, 2)["none"]
    for found in run_ranks(on_a_rank, 2, ckpt, draft, 7, 2, 2):
        check(found, expected)


def test_steps_are_saved(ckpt):
    """One that knows the answer takes a (K + 1)th of the steps."""
    model, requests = load(ckpt), [Request(random_tokens(9, 37, seed=i), max_new_tokens=33) for i in range(3)]
    plain = Engine(model, -1, 400)
    known = {key(request): answer.tokens for request, answer in zip(requests, plain.generate(requests))}
    engine = Engine(model, -1, 400, Knows(3, known, 0.0))
    engine.generate(requests)
    assert plain.row_steps == 3 * 32 and engine.row_steps == 3 * 8
    assert plain.tokens["decode"] == engine.tokens["decode"] == 3 * 32
    # The cache is known to hold all but the last step's tokens, and a next turn computes no others.
    first = next(request for request in requests if IMG not in known[key(request)])
    (answer,) = engine.generate([first])
    engine.generate([Request(first.prompt + answer.tokens + [5], max_new_tokens=0)])
    assert engine.tokens["prefill"] == 5


# ------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("fp8, whole_fp8, kept", [
    (None, False, False), ("static", False, False), ("dynamic", True, False), ("static", False, True),
    ("dynamic", True, True), (None, False, True),
])  # fmt: skip
def test_the_head_equals_the_formula(ckpt, tmp_path, fp8, whole_fp8, kept):
    """In float64, and in its layout: rotary pairs, scales and names. `kept`: the model's weights stay FP8."""
    meant = make_draft(tmp_path, seed=11, fp8=fp8, whole_fp8=whole_fp8)
    model, fields = load(ckpt), draft_fields()
    model.keep_fp8 = kept
    head = read_draft(str(tmp_path), model)
    assert (head.eagle_linear.weight.dtype == torch.float8_e4m3fn) == (kept and whole_fp8)
    assert (head.layers["0"].mlp.down_proj.weight.dtype == torch.float8_e4m3fn) == (kept and fp8 is not None)
    C, T = fields["hidden_size"], 23
    e, h = torch.randn(2, 1, T, C, generator=torch.Generator().manual_seed(4))
    x = torch.cat((e, h), dim=-1)[0].double() @ meant.pop(EAGLE).double().T
    # Tokens 0, 1, … whose embeddings are what enters the layers, and a head that shows the states themselves.
    state = meant | {"embed_tokens.weight": x, "lm_head.weight": torch.eye(C)}
    expected = torch.from_numpy(formula(fields, state, list(range(T))))
    with torch.inference_mode():
        found = head.predict(e, h)[0].double().log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_head_equals_transformers(ckpt, tmp_path):
    """Its layers around a concatenation, with the model's embeddings."""
    transformers = pytest.importorskip("transformers")
    meant = make_draft(tmp_path, seed=12)
    model, fields = load(ckpt), draft_fields()
    linear = meant.pop(EAGLE)
    config = transformers.Ministral3Config(**{k: v for k, v in fields.items() if k != "vision_config"})
    theirs = transformers.Ministral3Model(config).float().eval()
    theirs.load_state_dict(meant | {"embed_tokens.weight": model.embed_tokens.weight})
    ids = torch.tensor([random_tokens(31, 37, seed=2)])
    h = torch.randn(1, 31, fields["hidden_size"], generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        x = torch.cat((theirs.embed_tokens(ids), h), dim=-1) @ linear.T
        expected = theirs(inputs_embeds=x).last_hidden_state
        found = read_draft(str(tmp_path), model).predict(model.embed_tokens(ids), h)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def guessed_by_formula(head, model, request: Request, answer: list[int], count: int) -> list[int]:
    """What is guessed after `answer`: everything anew, without a cache, with the noise of each place."""
    features = model.vision(request.pixels) if request.pixels else None
    embeddings = model.embed(torch.tensor([request.prompt]), features)
    embeddings = torch.cat((embeddings, model.embed(torch.tensor([answer]))), dim=1)
    states = model.norm(model(embeddings[:, :-1]))
    temperature, top_p = torch.tensor([[request.temperature]]), torch.tensor([[request.top_p]])
    place, seed = torch.tensor([embeddings.shape[1]]), torch.tensor([request.seed])
    embeddings, guesses = embeddings[:, 1:], []
    for i in range(count):
        out = head.predict(embeddings, states)[:, -1:]
        sampled = model.lm_head.sample(model.lm_head(out[:, 0]), temperature, top_p, seed, place + i)
        guesses.append(int(sampled[0, 0]))
        embeddings = torch.cat((embeddings, model.embed(torch.tensor([guesses[-1:]]))), dim=1)
        states = torch.cat((states, out), dim=1)
    return guesses


class Watched(Eagle):
    """Compares its guesses with those of the formula."""

    compared = 0

    def propose(self, group, part, length, choose):
        guesses = super().propose(group, part, length, choose)
        for row, found in zip(group.rows, guesses.tolist()):
            assert found == guessed_by_formula(self.head, self.model, row.request, row.answer.tokens, self.count)
            self.compared += 1
        return guesses


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_what_the_head_guesses(ckpt, draft, seed):
    """Through chunks, kept beginnings, moved rows and rejected tokens: what it would guess from the whole text."""
    model = load(ckpt)
    watched = Watched(read_draft(draft, model), model, 3)
    engine = Engine(model, END, 400, watched)
    engine.chunk = 29
    play(engine, 40 + seed, 4)
    assert watched.compared > 200


# --------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(hidden_size=48), "hidden_size is 48, but the model's is 40"),
        (dict(vocab_size=40), "vocab_size is 40, but the model's is 37"),
    ],
)
def test_a_head_of_another_model(ckpt, tmp_path, changes, named):
    make_draft(tmp_path, **changes)
    with pytest.raises(UserError, match=named):
        read_draft(str(tmp_path), load(ckpt))


def test_what_is_no_head(ckpt):
    with pytest.raises(UserError, match=f"holds no {EAGLE}"):
        read_draft(ckpt, load(ckpt))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint with a tokenizer, and a head for it."""
    root = tmp_path_factory.mktemp("pair")
    (root / "model").mkdir()
    sizes = dict(vocab_size=write_tekken(root / "model"), max_position_embeddings=600)
    fields = text_fields("yarn, short", **sizes)
    write_checkpoint(root / "model", fields, random_state(fields, seed=6))
    make_draft(root / "draft", **{name: fields[name] for name in (*SIZES, *sizes) if name in fields})
    return str(root / "model"), str(root / "draft")


@pytest.mark.parametrize("name, tokens", [("head", 2), ("lookup", 4)])
def test_the_option(pair, program, tmp_path, name, tokens):
    ckpt, draft = pair
    requests = tmp_path / "requests.jsonl"
    specs = [{"raw": "abc" * i, "max_new_tokens": 30, "temperature": i % 2, "seed": i} for i in range(1, 6)]
    requests.write_text("".join(json.dumps(spec | {"stop": ["q"]}) + "\n" for spec in specs))
    common = ("--ckpt", ckpt, "--requests", requests, "--dtype", "float32", "--json")
    plain = answers(program(*common))
    option = ("--draft", draft if name == "head" else name, "--draft-tokens", tokens)
    drafted = answers(program(*common, *option))
    for one, other in zip(plain, drafted, strict=True):
        assert one["tokens"] == other["tokens"] and one["finish_reason"] == other["finish_reason"]
        assert "tokens_per_step" not in one["stats"] and 1 <= other["stats"]["tokens_per_step"] <= tokens + 1
    status, out, err = program("--ckpt", ckpt, "--prompt", "hi", "--max-new-tokens", 30, *option)
    assert status == 0 and re.search(r"[\d.]+ new tokens/s, [\d.]+ a step\n$", err)


def test_no_pipeline(pair):
    ckpt, draft = pair
    ranks = run_on_ranks(2, "generate.py", "--ckpt", ckpt, "--prompt", "hi", "--pp", 2, "--draft", draft)
    assert [ended.status for ended in ranks] == [2, 2] and "leave out --pp" in ranks[0].err
