"""generate.py from outside: options, JSON lines, streaming, the interactive chat, and every mistake in one line."""

import io
import json
import math
import os
import pty
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from helpers import (
    load,
    log_probabilities,
    random_state,
    text_fields,
    to_fp8,
    write_checkpoint,
    write_json,
    write_tekken,
)
from ranks import run_ranks

import generate
import launch
from launch import find_place
from tokenizer import load_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEYS = ["prompt_tokens", "tokens", "text", "reasoning", "tool_calls", "finish_reason", "stats"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # a tiny model gains nothing from more, least on a busy machine
STATS = {"load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", "weight_bytes", "bytes_read"}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """A tiny checkpoint with a tokenizer of this model's version."""
    root = tmp_path_factory.mktemp("ckpt")
    vocab_size = write_tekken(root)
    fields = text_fields("yarn, short", vocab_size=vocab_size + 3, max_position_embeddings=600)
    return write_checkpoint(root, fields, random_state(fields, seed=6))


def start(*arguments, stdin: str | bytes = b"", **options) -> subprocess.CompletedProcess:
    """`python generate.py` in a process of its own."""
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, os.path.join(ROOT, "generate.py"), *arguments]
    options.setdefault("env", ONE_THREAD)
    return subprocess.run(command, input=stdin, capture_output=True, timeout=400, **options)


@pytest.fixture
def program(monkeypatch, capsys):
    """The same program in this process: (exit status, stdout, stderr) of some arguments."""

    def run(*arguments, stdin: str = ""):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            launch.run_program(generate.main)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines(True) if not line.startswith("loading:")]  # on a busy machine
        return end.value.code, out, "".join(lines)

    return run


def answers(result) -> list[dict]:
    """The JSON lines of a run that went well; stdout holds nothing else."""
    status, out, err = result
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


# ----------------------------------------------------------------------------------------------------- answering


def test_raw_json_in_a_process(ckpt):
    done = start("--ckpt", ckpt, "--raw", "--prompt", "the café", "--json", "--max-new-tokens", "12", "--logprobs")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 1
    answer, tokenizer = json.loads(lines[0]), load_tokenizer(ckpt)
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
    others = sum(t.numel() for n, t in stored.items() if t.dim() and t.dtype != torch.float8_e4m3fn)
    common = ("--ckpt", tmp_path, "--raw", "--prompt", "a", "--json", "--max-new-tokens", 3, "--weights")
    texts = []
    for weights, dtype, expected in [
        ("dequantized", "bfloat16", 2 * linears + 2 * others),
        ("dequantized", "float32", 4 * linears + 4 * others),
        ("fp8", "float32", linears + 4 * others),
    ]:
        (answer,) = answers(program(*common, weights, "--dtype", dtype))
        assert expected <= answer["stats"]["weight_bytes"][0] <= expected + 4 * 7 + 3 * 7 * 8  # scales, frequencies
        assert answer["stats"]["bytes_read"][0] - linears - 4 * others in (4 * 3 * 7, 8 * 3 * 7)
        texts.append(answer["tokens"])
    if not torch.cuda.is_available():
        assert texts[1] == texts[2]
        (auto,) = answers(program(*common, "auto"))
        assert auto["stats"]["weight_bytes"][0] >= 2 * linears


def test_chat(ckpt, program):
    """A turn is the chat template's tokens; log-probabilities are those of the model."""
    from chat import encode_chat

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


def test_seeds_and_sampling(ckpt, program):
    common = ("--ckpt", ckpt, "--raw", "--prompt", "the", "--json", "--max-new-tokens", 20, "--temperature")
    runs = [answers(program(*common, 1.5, "--seed", seed))[0]["tokens"] for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    free = [tuple(answers(program(*common, 1.5))[0]["tokens"]) for _ in range(3)]
    assert len(set(free)) > 1  # a new seed each time
    greedy = [
        answers(program(*common, *more))[0]["tokens"] for more in ((0,), (0, "--seed", 9), (1.5, "--top-p", 1e-9))
    ]
    assert greedy[0] == greedy[1] == greedy[2]


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


# --------------------------------------------------------------------------------------------------- interactive


@pytest.mark.time_limit(300)
def test_interactive(ckpt):
    """A chat over a pipe: commands, history, and the same answers as asked alone."""
    common = ("--ckpt", ckpt, "--dtype", "float32", "--max-new-tokens", "6")
    lines = ["the one", "/clear", "the one", "/system Be brief.", "/effort none", "", "/nonsense", "/clear", "the one"]
    done = start(*common, "--interactive", stdin="\n".join([*lines, "/exit", "never asked"]) + "\n")
    err = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in err
    assert "/nonsense" in err
    plain = start(*common, "--prompt", "the one").stdout.decode()
    system = start(*common, "--prompt", "the one", "--system", "Be brief.").stdout.decode()
    assert plain != system
    assert done.stdout.decode() == plain + plain + system


def lines_on_a_rank() -> tuple[list, int]:
    """What this rank reads from rank 0's terminal, where someone thinks before typing; and how often it was woken."""
    place, woken, broadcast = find_place(2, 1), [], dist.broadcast_object_list
    generate.HEARTBEAT = 0.05
    dist.broadcast_object_list = lambda objects, src: woken.append(1) or broadcast(objects, src=src)
    if place.rank == 0:
        keyboard, screen = pty.openpty()
        sys.stdin = open(screen, encoding="utf-8", closefd=False)
        for wait, keys in ((0.5, b"hello\n"), (1.0, b"\x04")):
            threading.Timer(wait, os.write, (keyboard, keys)).start()
    return [generate.read_line(place), generate.read_line(place)], len(woken)


def test_a_chat_over_ranks_outlives_pauses():
    """Nobody waits longer than a heartbeat: the collectives' timeout never comes near."""
    for lines, woken in run_ranks(lines_on_a_rank, 2):
        assert lines == ["hello", None] and 10 < woken < 30


def test_interactive_history_and_mistakes(ckpt, program, monkeypatch):
    """History reaches the model; what cannot be answered is said, and the chat goes on."""
    asked = []
    request = generate.Session.request
    monkeypatch.setattr(
        generate.Session, "request", lambda self, spec, base="": asked.append(spec) or request(self, spec, base)
    )
    long = "word " * 700
    lines = ["one", long, "two", "/effort high", "three", "/effort absurd", "four", "/effort", "/clear", "five"]
    status, out, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", 2, stdin="\n".join(lines))
    assert status == 0  # at the end of the input
    roles = [[m["role"] for m in spec["messages"]] for spec in asked]
    pair = ["user", "assistant"]
    assert roles[0] == ["user"] and roles[1] == roles[2] == [*pair, "user"]
    assert roles[3] == [*pair, *pair, "user"]
    assert asked[-1]["messages"] == [{"role": "user", "content": "five"}]
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 2 and "context" in errors[0] and "effort" in errors[1] and "Traceback" not in err
    assert asked[3]["reasoning_effort"] == "high" and asked[-1]["reasoning_effort"] is None


def test_interactive_needs_no_flag_in_a_terminal(ckpt):
    """On a terminal, chatting is what happens without a prompt."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "generate.py"), "--ckpt", ckpt, "--max-new-tokens", "2"],
        stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD,
    )  # fmt: skip
    os.write(parent, b"the\n/exit\n")
    out, err = process.communicate(timeout=60)
    os.close(parent)
    os.close(child)
    assert process.returncode == 0 and b"Traceback" not in err and b"/exit" in err


# ------------------------------------------------------------------------------------------------------ mistakes


def refused(result, *named: str) -> str:
    """Exit status 2, one line on stderr that says what is wrong, nothing on stdout."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for name in named:
        assert name in err, err
    return err


@pytest.mark.parametrize("arguments, named", [
    (["--temperature", "-0.5"], "--temperature"), (["--temperature", "nan"], "--temperature"),
    (["--temperature", "inf"], "--temperature"), (["--temperature", "warm"], "--temperature"),
    (["--top-p", "0"], "--top-p"), (["--top-p", "1.01"], "--top-p"), (["--top-p", "-1"], "--top-p"),
    (["--seed", "-1"], "--seed"), (["--seed", "1.5"], "--seed"), (["--seed", str(1 << 64)], "--seed"),
    (["--max-new-tokens", "-1"], "--max-new-tokens"), (["--max-new-tokens", "many"], "--max-new-tokens"),
    (["--batch-size", "0"], "--batch-size"), (["--max-context", "0"], "--max-context"),
    (["--dtype", "float16"], "--dtype"), (["--weights", "int4"], "--weights"), (["--weights", "fp8"], "fp8"),
    (["--reasoning-effort", "maximal"], "--reasoning-effort"), (["--unknown"], "--unknown"), 
    (["--max-new", "3"], "--max-new"),
    (["--interactive"], "--interactive"), (["--requests", "x.jsonl"], "--requests"), (["--tp", "2"], "--tp"),
    (["--tp", "0"], "--tp"), (["--pp", "2"], "--pp"), (["--image", "nowhere.png"], "image"),
    (["--raw", "--system", "x"], "--raw"), (["--max-context", "2"], "context"), (["--ckpt", "/nowhere"], "/nowhere"),
    (["--ckpt", ""], "--ckpt"), (["stray"], "stray"), (["--seed"], "--seed"),
])  # fmt: skip
def test_bad_options(arguments, named, ckpt, program):
    if arguments == ["--ckpt", ""] and os.path.isdir(generate.TINY):
        pytest.skip("an empty --ckpt is the default one")
    refused(program("--ckpt", ckpt, "--prompt", "hi", *arguments), named)


def test_nothing_to_do(ckpt, program):
    refused(program("--ckpt", ckpt), "nothing to do")
    refused(program("--ckpt", ckpt, "--json"), "nothing to do")
    refused(program("--ckpt", ckpt, "--interactive", "--json"), "--interactive")


USER = {"role": "user", "content": "hi"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("line, named", [
    ("{", "not JSON"), ("nonsense", "not JSON"), ('{"raw": "a"} x', "not JSON"), ("[" * 100_000, "not JSON"),
    ('{"raw": "\xff"}'.encode("latin-1"), "not JSON"), (b"\xff\xfe", "not JSON"), ("[]", "object"), ("3", "object"),
    ('"raw"', "object"), ("null", "object"), ("{}", "messages"), (dict(raw="a", messages=[USER]), "either"),
    (dict(raw="a", stpo="x"), "stpo"), (dict(raw=3), "raw"), (dict(raw=None), "raw"), (dict(raw=["a"]), "raw"),
    (dict(messages=[]), ""), (dict(messages={}), ""), (dict(messages="hi"), ""), (dict(messages=None), ""),
    (dict(messages=[{"role": "wizard", "content": "hi"}]), "wizard"), (dict(messages=[{"content": "hi"}]), "role"),
    (dict(messages=["hi"]), ""), (dict(messages=[{"role": ["user"], "content": "hi"}]), "role"),
    (dict(messages=[USER, {"role": "tool", "content": "4", "tool_call_id": "abcdefghi"}]), "tool"),
    (dict(messages=[{"role": "tool", "content": "4", "tool_call_id": "abcdefghi"}]), "tool"),
    (dict(messages=[USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "4", "tool_call_id": "other0000"}]), "other0000"),
    (dict(messages=[{"role": "user", "content": 7}]), "content"), (dict(messages=[{"role": "user"}]), "content"),
    (dict(messages=[{"role": "user", "content": [{"type": "video"}]}]), "video"),
    (dict(messages=[USER], tools=3), "tools"), (dict(messages=[USER], tools=[{"type": "function"}]), ""),
    (dict(messages=[USER], reasoning_effort="maximal"), "maximal"),
    (dict(raw="a", temperature=-1), "temperature"), (dict(raw="a", temperature="1"), "temperature"),
    (dict(raw="a", temperature=True), "temperature"), (dict(raw="a", temperature=[1]), "temperature"),
    ('{"raw": "a", "temperature": NaN}', "temperature"), ('{"raw": "a", "temperature": 1e999}', "temperature"),
    (dict(raw="a", top_p=0), "top_p"), (dict(raw="a", top_p=2), "top_p"), (dict(raw="a", seed=-1), "seed"),
    (dict(raw="a", seed=1.5), "seed"), (dict(raw="a", max_new_tokens=-1), "max_new_tokens"),
    (dict(raw="a", max_new_tokens=1.5), "max_new_tokens"), (dict(raw="a", max_new_tokens={}), "max_new_tokens"),
    (dict(raw="a", stop=3), "stop"), (dict(raw="a", stop=[""]), "stop"), (dict(raw="a", stop=[3]), "stop"),
    (dict(raw="abcdefgh " * 200), "context"), (dict(messages=[{"role": "user", "content": "abc " * 500}]), "context"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}]), "image"),
], ids=lambda x: str(x)[:50])  # fmt: skip
def test_bad_requests(line, named, ckpt, program, tmp_path):
    """The line is named by its number, and no request of the file is answered."""
    line = json.dumps(line) if isinstance(line, dict) else line
    path = tmp_path / "r.jsonl"
    good = b'{"raw": "a", "max_new_tokens": 2}\n'
    path.write_bytes(good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    err = refused(program("--ckpt", ckpt, "--requests", path, "--json"), named)
    assert "line 3" in err and len(err) < 1000


def test_bad_request_files(ckpt, program, tmp_path):
    refused(program("--ckpt", ckpt, "--requests", tmp_path / "none.jsonl"), "none.jsonl")
    refused(program("--ckpt", ckpt, "--requests", tmp_path), str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    refused(program("--ckpt", ckpt, "--requests", tmp_path / "empty.jsonl"), "empty.jsonl")


def test_bad_checkpoints(ckpt, program, tmp_path):
    """What load_tokenizer, read_config and Checkpoint refuse arrives as one line."""
    import shutil

    def copy(name: str) -> str:
        return shutil.copytree(ckpt, tmp_path / name)

    ask = lambda directory: program("--ckpt", directory, "--prompt", "hi", "--json")  # noqa: E731
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(ask(empty), str(empty))
    refused(ask(tmp_path / "missing"), "missing")
    directory = copy("truncated")
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    refused(ask(directory), "model.safetensors")
    directory = copy("no tokenizer")
    (directory / "tekken.json").unlink()
    refused(ask(directory), "tokenizer")
    directory = copy("bad tokenizer")
    (directory / "tekken.json").write_bytes(b"\xff{}")
    refused(ask(directory), "tekken.json")
    directory = copy("bad config")
    (directory / "config.json").write_bytes(b'{"model_type": "mistral3", \xff}')
    refused(ask(directory), "config.json")
    fields = text_fields("yarn, short", vocab_size=write_tekken(tmp_path) - 1)
    refused(ask(write_checkpoint(tmp_path, fields, random_state(fields))), "tokenizer", "tokens")
    write_json(tmp_path / "config.json", [])
    refused(ask(tmp_path), "config.json")


@pytest.mark.time_limit(300)
def test_mistakes_in_a_process(ckpt, tmp_path):
    """The whole way: exit status 2, one line, no traceback. With the shell's raw bytes, too."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"raw": "a"}\n{"raw": "\xff"}\n')
    for arguments, named in [
        (["--requests", str(path)], "line 2"),
        (["--prompt", b"caf\xe9 \xff"], "UTF-8"),
        (["--prompt", "hi", "--system", b"\xff"], "UTF-8"),
        (["--raw", "--prompt", b"\xff"], "UTF-8"),
        (["--prompt", "hi", "--temperature", "-1"], "--temperature"),
    ]:
        done = start("--ckpt", ckpt, "--json", *arguments)
        refused((done.returncode, done.stdout.decode(), done.stderr.decode()), named)


@pytest.mark.time_limit(300)
def test_bad_bytes_in_the_chat(ckpt):
    """Invalid UTF-8 on stdin is one line, too, and the chat goes on."""
    for mode in ("utf-8:strict", "utf-8:surrogateescape"):
        arguments = ("--ckpt", ckpt, "--interactive", "--max-new-tokens", "2")
        done = start(*arguments, stdin=b"hi\n\xff\xfe\nhi\n", env={**ONE_THREAD, "PYTHONIOENCODING": mode})
        errors = [line for line in done.stderr.splitlines() if line.startswith(b"error: ")]
        assert done.returncode == 0 and b"Traceback" not in done.stderr
        assert len(errors) == 1 and b"UTF-8" in errors[0]


def test_help(program):
    status, out, err = program("--help")
    assert status == 0 and "--requests" in out and err == ""


def test_a_reader_that_goes_away(ckpt, tmp_path):
    """`generate.py … | head`: no traceback."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"raw": "a", "max_new_tokens": 1}\n' * 3000)
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "generate.py"), "--ckpt", ckpt, "--requests", str(path), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert b"Traceback" not in err


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
        done = start(*arguments, "--prompt", "The capital of France is", env=os.environ)
        assert done.returncode == 0, done.stderr
        said[layout] = json.loads(done.stdout)
        assert "Paris" in said[layout]["text"], said[layout]["text"]
    assert said["hf"]["tokens"] == said["native"]["tokens"] and len(said["hf"]["tokens"]) > 30
