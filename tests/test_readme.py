"""README's first commands, read out of it: they print what stands below them, on every CPU."""

import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import terminal
import torch
from helpers import answers
from processes import ENVIRONMENT, ROOT

import generate

pytestmark = pytest.mark.skipif(not os.path.isdir(generate.TINY), reason="the repository holds no checkpoint yet")

SET_UP = "pip install -r requirements.txt && "
SPEEDS = r"[\d.]+(?= (s|tokens/s|prompt tokens/s|new tokens/s|a step)\b)"  # the numbers that depend on the machine


def start() -> tuple[list[tuple[list[str], str]], list[str]]:
    """(the commands of README's first part that are followed by what they print, with it), (all of its commands)."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        part = re.search(r"^## Start$(.*?)^## ", file.read(), re.M | re.S)[1]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.M | re.S)
    shown = [(command, out) for (kind, command), (other, out) in zip(blocks, blocks[1:]) if kind and not other]
    words = [shlex.split(command.removeprefix(SET_UP)) for command, _ in shown]
    assert all(first == "python" for first, *_ in words)
    return [(line[1:], out) for line, (_, out) in zip(words, shown)], [command for kind, command in blocks if kind]


def test_the_first_minute():
    """Whole lines, of stdout and stderr together as in a terminal; ten seconds of a CPU, start-up included."""
    shown, commands = start()
    assert len(shown) >= 2 and all(command.startswith(SET_UP) for command in (commands[0], commands[-1]))
    for arguments, expected in shown:
        before = os.times()
        result = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, timeout=100, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        after = os.times()
        assert re.sub(SPEEDS, "0", result.stdout) == re.sub(SPEEDS, "0", expected)
        assert after.children_user + after.children_system - before.children_user - before.children_system < 10


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_rounding_changes_it(dtype, threads, program, monkeypatch):
    """Rounding differs from CPU to CPU, but every token is so likely that it cannot choose another."""
    monkeypatch.chdir(ROOT)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (_, *arguments), expected in start()[0]:
            (answer,) = answers(program(*arguments, "--json", "--logprobs", "--dtype", dtype))
            said = [text for text in (answer["reasoning"], answer["text"]) if text]
            assert said == expected.splitlines()[:-1] and answer["finish_reason"] == "stop", json.dumps(said)
            assert min(answer["logprobs"]) > math.log(0.9)
    finally:
        torch.set_num_threads(usual)


def test_the_recorded_chat():
    """What a person sees at a terminal: each line as README shows it."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        (shown,) = re.findall(r"^```\n(\$ .*?)^```$", file.read(), re.M | re.S)
    assert re.sub(SPEEDS, "0", terminal.record()) == re.sub(SPEEDS, "0", shown)


def plan(*options: str) -> str:
    """What `parallel.py --plan` prints for the 128B."""
    command = [sys.executable, "parallel.py", "--plan", "--config", "tests/data/config.json", *options]
    return subprocess.run(command, cwd=ROOT, timeout=100, check=True, capture_output=True, text=True).stdout


def test_the_table_of_plans():
    """Weights, cache, peak, longest context and a token's time, as the program rounds them or coarser."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| \d × H\d.*$", file.read(), re.M)
    assert len(rows) >= 4
    for row in rows:
        _, command, weights, cache, peak, longest, times = (cell.strip() for cell in row.strip("|").split("|"))
        said = plan("--inference", "--weights", "fp8", *command.strip("`").split())
        numbers = re.search(r"^ +0 .*?(yes|no)$", said, re.M)[0].split()[3:-1]
        for number, shown in zip((numbers[0], numbers[1], numbers[4]), (weights, cache, peak)):
            assert abs(float(number) - float(shown)) <= 0.0501
        assert f"at most {longest} fit" in said
        found = re.search(r"a token after [\d,]+: ([\d.]+) ms at least, about ([\d.]+) ms", said).groups()
        found += re.search(r"vLLM's kernels: .* about ([\d.]+) ms", said).groups()
        assert times.count(", ") == 2
        for number, shown in zip(found, times.split(", ")):
            assert abs(float(number) - float(shown)) <= (0.0501 if "." in shown else 0.501)


def test_what_is_said_of_training():
    """The recipe's memory per GPU and its bubble; LoRA on four GPUs; seconds of loading, and a state's bytes."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        text = " ".join(file.read().split())
    for pattern, options in (
        (r"takes at most ([\d.]+) GB on each of 64", re.search(r"`--plan (--tp 8 --pp 8[^`]*)`", text)[1]),
        (r"weights ([\d.]+) GB per GPU on four", re.search(r"`--plan (--tp 4 --lora-rank[^`]*)`", text)[1]),
    ):
        said = plan(*options.split())
        peaks = [float(row.split()[-2]) for row in re.findall(r"^ +\d+ .*(?:yes|no)$", said, re.M)]
        assert abs(max(peaks) - float(re.search(pattern, text)[1])) <= 0.0501
        if bubble := re.search(r"pipeline bubble of ([\d.]+) %", text) if "--pp" in options else None:
            assert f"{bubble[1]} %" in said


def test_what_is_said_of_files():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        text = " ".join(file.read().split())
    seconds, rate, size = re.search(r"takes (\d+) s where .* reads (\d+) GB/s; .* has ([\d.]+) TB", text).groups()
    said = plan("--tp", "8", "--pp", "8")
    assert f"files, at {rate} GB/s a machine:" in said
    assert abs(float(re.search(r"state: ([\d,.]+) GB", said)[1].replace(",", "")) / 1e3 - float(size)) <= 0.0501
    loading = re.search(r"loading: .* ([\d.]+) s", plan("--inference", "--tp", "8"))
    assert abs(float(loading[1]) - float(seconds)) <= 0.501


def test_from_python():
    """The lines of Python, run as they stand."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        (code,) = re.findall(r"^```python\n(.*?)^```$", file.read(), re.M | re.S)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.strip() == code.rsplit("#", 1)[1].strip(), ended.stderr


def test_git_ignores_what_the_commands_write():
    """Whoever follows README has nothing new to commit."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        outputs = set(re.findall(r"--out[ =]([\w./-]+)", file.read()))
    assert {"run", "lora", "tour.html"} <= outputs
    # With something below it, since "/run/" is about a folder, and none is there yet.
    command = ["git", "check-ignore", *(f"{name}/x" for name in outputs)]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a git repository")
    assert set(ignored.stdout.split()) == set(command[2:])
