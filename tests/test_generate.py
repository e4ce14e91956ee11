"""generate.py from outside: options, where the question comes from, JSON lines, streaming, --help."""

import importlib
import io
import json
import math
import os
import random
import re
import sys

import pytest
import torch
from helpers import (
    answers,
    load,
    log_probabilities,
    random_state,
    text_fields,
    to_fp8,
    write_checkpoint,
    write_tekken,
)
from processes import run, run_ranks, start

import generate
from runtime.files import UserError
from runtime.launch import find_place
from runtime.requests import RequestReader
from runtime.tokenizer import load_tokenizer

KEYS = ["prompt_tokens", "tokens", "text", "reasoning", "tool_calls", "finish_reason", "stats"]
STATS = {
    "load_s",
    "prefill_tokens",
    "decode_tokens",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "weight_bytes",
    "bytes_read",
}


# ----------------------------------------------------------------------------------------------------- answering


def test_raw_json_in_a_process(ckpt):
    arguments = ("--ckpt", ckpt, "--raw", "--prompt", "the café", "--json", "--max-new-tokens", "12", "--logprobs")
    (answer,) = answers(run("generate.py", *arguments))
    tokenizer = load_tokenizer(ckpt)
    assert set(answer) == {*KEYS, "prompt_logprobs", "logprobs"} and set(answer["stats"]) == STATS
    assert answer["prompt_tokens"] == [1, *tokenizer.encode("the café")]
    assert 1 <= len(answer["tokens"]) <= 12 and len(answer["logprobs"]) == len(answer["tokens"])
    assert answer["text"] == tokenizer.decode(answer["tokens"])
    assert answer["reasoning"] is None and answer["tool_calls"] == []
    assert answer["finish_reason"] == ("stop" if answer["tokens"][-1] == 2 else "length")
    stats = answer["stats"]
    assert all(len(stats[name]) == 1 for name in ("peak_memory_bytes", "weight_bytes", "bytes_read"))
    assert stats["bytes_read"][0] == sum(4 * p.numel() for p in load(ckpt).parameters())
    assert stats["peak_memory_bytes"][0] > 50e6 and stats["load_s"] > 0 and stats["prefill_tokens_per_s"] > 0


def test_weights_and_dtype(ckpt, program, tmp_path):
    """--dtype and --weights change what is in memory; FP8 is read in its own size."""
    fields = text_fields("yarn, short", vocab_size=write_tekken(tmp_path) + 3)
    stored, _ = to_fp8(random_state(fields), static=True)
    write_checkpoint(tmp_path, fields, stored, fp8="static")
    linears = sum(t.numel() for t in stored.values() if t.dtype == torch.float8_e4m3fn)
    rows = sum(len(t) for t in stored.values() if t.dtype == torch.float8_e4m3fn)
    others = sum(t.numel() for n, t in stored.items() if t.dim() and t.dtype != torch.float8_e4m3fn)
    common = ("--ckpt", tmp_path, "--raw", "--prompt", "a", "--json", "--max-new-tokens", 3, "--weights")
    texts = []
    for weights, dtype, expected in [
        ("dequantized", "bfloat16", 2 * linears + 2 * others),
        ("dequantized", "float32", 4 * linears + 4 * others),
        ("fp8", "float32", linears + 4 * others),
    ]:
        (answer,) = answers(program(*common, weights, "--dtype", dtype))
        scales = 4 * rows + 3 * 7 * 4  # of each row of an FP8 weight, and of inputs
        assert expected <= answer["stats"]["weight_bytes"][0] <= expected + 4 * 7 + scales * (weights == "fp8")
        assert answer["stats"]["bytes_read"][0] - linears - 4 * others in (4 * 3 * 7, 8 * 3 * 7)
        texts.append(answer["tokens"])
    if not torch.cuda.is_available():
        assert texts[1] == texts[2]
        (auto,) = answers(program(*common, "auto"))
        assert auto["stats"]["weight_bytes"][0] >= 2 * linears


def test_chat(ckpt, program):
    """A turn is the chat template's tokens; log-probabilities are those of the model."""
    from runtime.chat import encode_chat

    tokenizer, model = load_tokenizer(ckpt), load(ckpt)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the thing"}]
    common = ("--ckpt", ckpt, "--prompt", "the thing", "--system", "Be brief.", "--json", "--dtype", "float32")
    (answer,) = answers(program(*common, "--max-new-tokens", 9, "--logprobs"))
    assert list(answer) == KEYS[:-1] + ["prompt_logprobs", "logprobs", "stats"]
    assert answer["prompt_tokens"] == encode_chat(tokenizer, messages).ids
    everything = answer["prompt_tokens"] + answer["tokens"]
    full = log_probabilities(model, everything)
    expected = [float(full[i, token]) for i, token in enumerate(everything[1:])]
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1:] + answer["logprobs"] == pytest.approx(expected, abs=1e-3)
    (high,) = answers(program(*common, "--max-new-tokens", 2, "--reasoning-effort", "high", "--seed", 1))
    assert high["prompt_tokens"] == encode_chat(tokenizer, messages, reasoning_effort="high").ids
    assert list(high) == KEYS  # without --logprobs there are none
    (scored,) = answers(program(*common, "--max-new-tokens", 0))
    assert scored["tokens"] == [] and scored["text"] == "" and scored["finish_reason"] == "length"
    assert scored["prompt_logprobs"] == pytest.approx(answer["prompt_logprobs"], abs=1e-3, nan_ok=True)


def test_requests(ckpt, program, tmp_path):
    """Batches in the file's order, each with its own settings; blank lines do not count."""
    texts = ["the", "a longer text, " * 9, "x", "in", "her", "0123", "ü", "then"]
    lines = [dict(raw=text, max_new_tokens=3 + i) for i, text in enumerate(texts)]
    lines[2] |= dict(temperature=1.0, seed=5, top_p=0.9)
    lines[5] |= dict(temperature=1.0, seed=6)
    lines[6] = dict(messages=[{"role": "user", "content": "ü"}], reasoning_effort="none", max_new_tokens=0)
    path = tmp_path / "requests.jsonl"
    path.write_text("\n" + "\n\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    common = ("--ckpt", ckpt, "--json", "--dtype", "float32", "--requests", path)
    tokenizer, first = load_tokenizer(ckpt), None
    for size in (16, 3, 1):
        got = answers(program(*common, "--batch-size", size))
        assert len(got) == len(lines)
        for i, (line, answer) in enumerate(zip(lines, got)):
            if "raw" in line:
                assert answer["prompt_tokens"] == [1, *tokenizer.encode(line["raw"])]
                assert len(answer["tokens"]) == 3 + i or answer["tokens"][-1] == 2
            assert ("logprobs" in answer) == (line["max_new_tokens"] == 0)
        first = first or got
        for a, b in zip(first, got):
            a, b = ({k: v for k, v in x.items() if not k.startswith(("stats", "prompt_log"))} for x in (a, b))
            assert a == b
    status, out, _ = program(*[a for a in common if a != "--json"])
    assert status == 0 and [f"[{i}]" in out for i in range(10)] == [False, *[True] * 8, False]


def test_all_requests_are_read_before_the_first_is_answered(ckpt, program, tmp_path):
    """Drawn files, with a mistake somewhere beyond the first batch: nothing is answered."""
    draw, path = random.Random(7), tmp_path / "requests.jsonl"
    lost = [{"type": "image_url", "image_url": {"url": "lost.png"}}]
    mistakes = [{"messages": [{"role": "user", "content": lost}]}, {"raw": "the", "stop": 3}, {"raw": "the " * 700}]
    mistakes += [{"raw": 7}, {"messages": []}, {"raw": "the", "temperature": "warm"}]
    for mistake in mistakes:
        lines = [{"raw": "the", "max_new_tokens": draw.randint(0, 9)} for _ in range(6)]
        lines.insert(at := draw.randint(2, 6), mistake)
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        status, out, err = program("--ckpt", ckpt, "--json", "--requests", path, "--batch-size", 2)
        assert status == 2 and out == "" and err.count("error") == 1 and f"line {at + 1}" in err, (mistake, err)


def test_seeds_and_sampling(ckpt, program, tmp_path):
    common = ("--ckpt", ckpt, "--raw", "--prompt", "the", "--json", "--max-new-tokens", 20, "--temperature")
    runs = [answers(program(*common, 1.5, "--seed", seed))[0]["tokens"] for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    free = [tuple(answers(program(*common, 1.5))[0]["tokens"]) for _ in range(3)]
    assert len(set(free)) > 1  # a new seed each time
    (tmp_path / "same.jsonl").write_text('{"raw": "the", "max_new_tokens": 20, "temperature": 1.5}\n' * 5)
    common_file = ("--ckpt", ckpt, "--json", "--requests", tmp_path / "same.jsonl", "--batch-size", 2)
    assert len({tuple(answer["tokens"]) for answer in answers(program(*common_file))}) == 5
    assert len({tuple(answer["tokens"]) for answer in answers(program(*common_file, "--seed", 3))}) == 1
    greedy = [
        answers(program(*common, *more))[0]["tokens"] for more in ((0,), (0, "--seed", 9), (1.5, "--top-p", 1e-9))
    ]
    assert greedy[0] == greedy[1] == greedy[2]


@pytest.mark.parametrize(
    "argv, chat",
    [([], True), (["hi"], False), (["--requests", "x"], False), (["--json"], None), (["--raw"], None)],
)
def test_when_a_terminal_begins_a_chat(argv, chat, monkeypatch):
    """If nothing else says what to ask, and the answer is not for a script; then there is nothing to do."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    args = generate.parse_args(argv)
    if chat is None:
        with pytest.raises(UserError, match="nothing to do"):
            generate.read_input(args)
    else:
        assert generate.read_input(args) == (None, chat)


def test_how_is_answered():
    """As the request says, else the command line, else the defaults: greedy, or as recommended for thinking."""
    last = (1 << 63) - 1
    plain = {"temperature": 0.0, "top_p": 1.0, "seed": 5, "max_new_tokens": None}
    thinking = plain | {"temperature": 0.7, "top_p": 0.95}
    for given, spec, thinks, index, expected in (
        ([], {}, False, 0, plain),
        ([], {}, True, 3, thinking | {"seed": 8}),
        (["--temperature", "0.3"], {}, True, 1, thinking | {"temperature": 0.3, "seed": 6}),
        (["--seed", str(last)], {"temperature": 0}, True, 0, thinking | {"temperature": 0.0, "seed": last}),
        (
            ["--top-p", "0.5"],
            {"top_p": None, "max_new_tokens": 0},
            False,
            0,
            plain | {"top_p": 0.5, "max_new_tokens": 0},
        ),
        (
            ["--max-new-tokens", "9"],
            {"max_new_tokens": 2, "seed": 1},
            False,
            7,
            plain | {"seed": 1, "max_new_tokens": 2},
        ),
    ):
        args = generate.parse_args(["--prompt", "hi", *given])
        reader = RequestReader(args, None, None, 100, 5 if args.seed is None else args.seed)
        assert reader.numbers(spec, thinks, index) == expected
    assert RequestReader(generate.parse_args([]), None, None, 100, last).numbers({}, False, 1)["seed"] == 0


def test_stop_and_streaming(ckpt, program, tmp_path):
    """What is streamed is the text of the JSON answer, also where a stop string cuts it."""
    common = ("--ckpt", ckpt, "--dtype", "float32", "--temperature", "1.5", "--seed", "11", "--max-new-tokens", "60")
    (answer,) = answers(program(*common, "--raw", "--prompt", "the", "--json"))
    status, out, err = program(*common, "--raw", "--prompt", "the")
    assert status == 0 and out.rstrip("\n") == answer["text"].rstrip("\n") and "tokens/s" in err
    text = answer["text"]
    start = next(i for i in range(5, len(text)) if text[i : i + 3].isascii() and text[i : i + 3].isprintable())
    stop = text[start : start + 3]
    path = tmp_path / "r.jsonl"
    for stops in (stop, [stop], ["never there", stop]):
        path.write_text(json.dumps(dict(raw="the", stop=stops)))
        (cut,) = answers(program(*common, "--requests", path, "--json"))
        assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"
        status, out, _ = program(*common, "--requests", path)
        assert out == cut["text"] + "\n"


def test_context(ckpt, program):
    """--max-context bounds prompt and answer together, and never exceeds the model's own."""
    common = ("--ckpt", ckpt, "--raw", "--prompt", "abcdefg", "--json", "--max-new-tokens", 5000, "--max-context")
    for limit, total in ((20, 20), (8, 8), (10**6, 600)):
        (answer,) = answers(program(*common, limit))
        got = len(answer["prompt_tokens"] + answer["tokens"])
        assert got == total or (answer["finish_reason"] == "stop" and got < total)


# --------------------------------------------------------------------------------------------- where the question is


def test_the_question(ckpt, program):
    """As an argument, as an option, and from a pipe; with a picture's option it is still the question."""
    common = ("--ckpt", ckpt, "--dtype", "float32", "--max-new-tokens", 4, "--json")
    (expected,) = answers(program(*common, "--prompt", "the ü"))
    for result in (program(*common, "the ü"), program(*common, stdin="the ü\n")):
        (answer,) = answers(result)
        assert answer["prompt_tokens"] == expected["prompt_tokens"] and answer["tokens"] == expected["tokens"]
    (raw,) = answers(program(*common, "--raw", stdin="two\nlines\n"))
    assert load_tokenizer(ckpt).decode(raw["prompt_tokens"]) == "two\nlines"
    long = "the thing " * 20
    for seed in range(9):  # until one that does not meet the end token, of 512, by chance
        (endless,) = answers(program("--ckpt", ckpt, "--json", "--temperature", 90, "--seed", seed, long))
        if endless["finish_reason"] == "length":
            break
    assert len(endless["prompt_tokens"]) + len(endless["tokens"]) == 600  # all that the context leaves


def test_requests_from_a_pipe(ckpt, program):
    stdin = "".join(json.dumps({"raw": text, "max_new_tokens": 2}) + "\n\n" for text in ("a", "the"))
    got = answers(program("--ckpt", ckpt, "--requests", "-", "--json", stdin=stdin))
    assert [answer["prompt_tokens"] for answer in got] == [[1, *load_tokenizer(ckpt).encode(x)] for x in ("a", "the")]
    status, out, err = program("--ckpt", ckpt, "--requests", "-", "--json", stdin='{"raw": "a"}\n\n{"raw": 3}\n')
    assert status == 2 and out == "" and "standard input line 3: raw" in err


def from_a_pipe() -> tuple:
    """What a rank is asked, of which the first alone has the pipe."""
    place = find_place(2, 1)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"hello\n" if place.rank == 0 else b"not mine\n"))
    args = generate.parse_args([])
    data, chat = generate.gather_objects(generate.read_input(args) if place.rank == 0 else None)[0]
    return generate.read_requests(args, data)[0]["messages"], chat


def test_a_pipe_over_ranks():
    assert run_ranks(from_a_pipe, 2) == 2 * [([{"role": "user", "content": "hello"}], False)]


@pytest.mark.parametrize("name", ["generate", "train", "runtime.export", "runtime.plan"])
def test_help(name, capsys):
    """Readable at 80 columns: groups, an example, and the default of every option that takes a value."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(["--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    assert "examples:\n    " in out and out.count(":\n  ") >= 3
    usage, *groups = re.split(r"^\w.*:$", out, flags=re.M)
    for option in re.split(r"^  (?=-|\w)", "".join(groups[:-1]), flags=re.M)[1:]:
        takes_value = re.match(r"--?[\w-]+ ([A-Z{])", option)
        assert not takes_value or "default" in option or option.split()[0] in usage, option


def test_a_reader_that_goes_away(ckpt, tmp_path):
    """`generate.py … | head`: no traceback."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"raw": "a", "max_new_tokens": 1}\n' * 3000)
    process = start("generate.py", "--ckpt", ckpt, "--requests", path, "--json")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in err


def test_log_probabilities_are_finite_numbers_in_json(ckpt, program):
    """JSON has no NaN and no Infinity; every number printed is finite."""
    status, out, _ = program("--ckpt", ckpt, "--raw", "--prompt", "the", "--json", "--logprobs", "--max-new-tokens", 5)

    def refuse(name):
        raise AssertionError(name)

    answer = json.loads(out, parse_constant=refuse)
    assert all(math.isfinite(x) and x <= 0 for x in answer["prompt_logprobs"][1:] + answer["logprobs"])


@pytest.mark.slow
@pytest.mark.time_limit(500)
@pytest.mark.skipif("SMOLLM" not in os.environ, reason="SMOLLM names no folder that tools/make_smollm.py wrote")
def test_real_weights():
    """A real language model, in three layouts: it knows the capital of France, and two of them agree on 64 tokens."""
    said = {}
    for layout in ("hf", "fp8", "native"):
        arguments = ("--ckpt", os.path.join(os.environ["SMOLLM"], layout), "--raw", "--json", "--max-new-tokens", "64")
        (said[layout],) = answers(run("generate.py", *arguments, "--prompt", "The capital of France is", seconds=400))
        assert "Paris" in said[layout]["text"], said[layout]["text"]
    assert said["hf"]["tokens"] == said["native"]["tokens"] and len(said["hf"]["tokens"]) > 30
