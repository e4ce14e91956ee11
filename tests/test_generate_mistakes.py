"""What generate.py refuses: every mistake is one line, names what is wrong, and ends with status 2."""

import codecs
import io
import json
import os
import shutil
import sys
from functools import partial

import pytest
from helpers import random_state, text_fields, write_checkpoint, write_json, write_tekken
from PIL import Image
from processes import run, run_on_ranks
from train_cases import arguments

import generate
import train
from runtime import plan
from runtime.files import UserError


def refused(result, *named: str) -> str:
    """Exit status 2, one line on stderr that says what is wrong, nothing on stdout."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for name in named:
        assert name in err, err
    return err


@pytest.mark.parametrize("options, named", [
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
    (["--ckpt", ""], "ckpt is empty"), (["--lora", ""], "lora is empty"), (["--image", ""], "image is empty"),
    (["stray"], "stray"), (["--seed"], "--seed"), (["--draft", "/nowhere"], "/nowhere"), (["--draft", ""], "draft"),
    (["--draft-tokens", "2"], "--draft DIR"), (["--draft", "lookup", "--draft-tokens", "0"], "--draft-tokens"),
])  # fmt: skip
def test_bad_options(options, named, ckpt, program):
    refused(program("--ckpt", ckpt, "--prompt", "hi", *options), named)


EMPTY = {generate: "ckpt lora image requests", train: "ckpt init tokenizer data out val", plan: "config"}


@pytest.mark.parametrize("module, name", [(module, name) for module in EMPTY for name in EMPTY[module].split()])
def test_an_empty_name(module, name):
    """What an unset variable of the shell leaves."""
    needed = {"generate": [], "train": ["--data", "x", "--out", "x"], "runtime.plan": ["--plan", "--config", "x"]}
    with pytest.raises(UserError, match=f"{name} is empty"):
        module.parse_args([*needed[module.__name__], f"--{name}", ""])


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
    *[(dict(raw="a", stop=stop), "stop") for stop in ("", 0, False, {})],
    *[(dict(messages=[USER], answer=answer), "messages[1]") for answer in (0, "", [], False)],
    (dict(messages=None, answer=USER), "messages"), (dict(messages=3, answer=USER), "messages"),
    (dict(raw="a", stop=3), "stop"), (dict(raw="a", stop=[""]), "stop"), (dict(raw="a", stop=[3]), "stop"),
    (dict(raw="abcdefgh " * 200), "context"), (dict(messages=[{"role": "user", "content": "abc " * 500}]), "context"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}]), "image"),
], ids=lambda x: str(x)[:50])  # fmt: skip
def test_bad_requests(line, named, ckpt, program, tmp_path):
    """The line is named by its number, and no request of the file is answered."""
    line = json.dumps(line) if isinstance(line, dict) else line
    path = tmp_path / "r.jsonl"
    good = b'{"raw": "a", "max_new_tokens": 2}\n'
    path.write_bytes(
        codecs.BOM_UTF8 + good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good
    )
    err = refused(program("--ckpt", ckpt, "--requests", path, "--json"), named)
    assert "line 3" in err and len(err) < 1000


def test_bad_request_files(ckpt, program, tmp_path):
    refused(program("--ckpt", ckpt, "--requests", tmp_path / "none.jsonl"), "none.jsonl")
    refused(program("--ckpt", ckpt, "--requests", tmp_path), str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    refused(program("--ckpt", ckpt, "--requests", tmp_path / "empty.jsonl"), "empty.jsonl")


def test_bad_checkpoints(ckpt, program, tmp_path):
    """What load_tokenizer, read_config and Checkpoint refuse arrives as one line."""

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


def test_mistakes_in_a_process(ckpt, program, tmp_path):
    """The whole way: exit status 2, one line, no traceback. With the shell's raw bytes, too."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"raw": "a"}\n{"raw": "\xff"}\n')
    refused(run("generate.py", "--ckpt", ckpt, "--json", "--prompt", b"caf\xe9 \xff"), "UTF-8")
    for options, named in [
        (["--requests", path], "line 2"),
        (["--prompt", "hi", "--system", "\udcff"], "UTF-8"),  # as Python reads the byte FF
        (["--raw", "--prompt", "\udcff"], "UTF-8"),
    ]:
        refused(program("--ckpt", ckpt, "--json", *options), named)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bad_bytes_in_the_chat(errors, ckpt, program):
    """Invalid UTF-8 on stdin is one line, too, and the chat goes on."""
    stdin = io.TextIOWrapper(io.BytesIO(b"hi\n\xff\xfe\nhi\n"), encoding="utf-8", errors=errors)
    status, _, err = program("--ckpt", ckpt, "--interactive", "--max-new-tokens", "2", stdin=stdin)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 0 and "Traceback" not in err
    assert len(said) == 1 and "UTF-8" in said[0]


def lose(rank: str, option: str) -> None:
    if os.environ["RANK"] == rank:
        sys.argv[sys.argv.index(option) + 1] = "elsewhere"


@pytest.fixture(scope="module")
def started(images, tmp_path_factory) -> dict[str, list[str]]:
    """Command lines that read a file for each of the options that name one."""
    folder = tmp_path_factory.mktemp("started")
    (ckpt, data), more = images, {"max_steps": 1, "save_every": 1}
    train.main(arguments(ckpt, data, folder / "lora", **more, lora_rank=2))
    (folder / "requests.jsonl").write_text('{"raw": "the", "max_new_tokens": 1}\n')
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    generate = ["generate.py", "--ckpt", ckpt, "--lora", str(folder / "lora" / "adapters")]
    begin = arguments("", data, folder / "out", **more, init=ckpt, tokenizer=ckpt)[2:]
    return {
        "generate": [*generate, "--prompt", "hi", "--image", str(folder / "a.png"), "--max-new-tokens", "1"],
        "requests": [*generate, "--requests", str(folder / "requests.jsonl")],
        "train": ["train.py", *arguments(ckpt, data, folder / "out", val=data, **more)],
        "begin": ["train.py", *begin],
    }


LOST = {"generate": ("ckpt", "lora", "image"), "requests": ("requests",), "train": ("ckpt", "data", "val")}
LOST["begin"] = ("init", "tokenizer", "data")


@pytest.mark.parametrize("rank", "01")
@pytest.mark.parametrize("command, option", [(command, f"--{name}") for command in LOST for name in LOST[command]])
def test_a_file_that_one_rank_lacks(command, option, rank, started):
    """It is on the disk of another machine only."""
    ranks = run_on_ranks(2, *started[command], "--tp", "2", prepare=partial(lose, rank, option), seconds=60)
    assert [rank.status for rank in ranks] == [2, 2]
    said = "".join(rank.err for rank in ranks)
    assert said.count("error: ") == 1 and "elsewhere" in said and "Traceback" not in said


def test_a_mistake_of_the_rank_that_has_the_person(ckpt, tmp_path):
    """A picture for a model without eyes: the others wait for what is typed, and learn of it all the same."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    options = ("--ckpt", ckpt, "--tp", "2", "--interactive", "--image", tmp_path / "a.png")
    ranks = run_on_ranks(2, "generate.py", *options)
    assert [status for status, _, _ in ranks] == [2, 2]
    said = "".join(err for _, _, err in ranks)
    assert said.count("error: ") == 1 and "images" in said and "Traceback" not in said


@pytest.mark.parametrize("more", [(), ("--json",), ("--max-new-tokens", 0, "--json", "--logprobs")])
@pytest.mark.parametrize("size", [2e38, 3e38])
def test_logits_that_are_not_finite(more, size, tmp_path, program):
    """Weights are finite, but what they make of a prompt is not: no answer, and nothing that looks like one."""
    root = tmp_path
    fields = text_fields("yarn, short", vocab_size=write_tekken(root) + 3)
    state = random_state(fields, seed=6)
    state["layers.1.mlp.up_proj.weight"] = state["layers.1.mlp.up_proj.weight"] * 0 + size
    write_checkpoint(root, fields, state)
    status, out, err = program("--ckpt", root, "--raw", "the other thing", "--dtype", "float32", *more)
    assert status == 1 and out == "" and err.count("error:") == 1 and "not finite" in err, (out, err)
