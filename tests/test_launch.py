"""When one rank fails, all end: soon, with the right status, and with the cause on one line."""

import json
import os
import signal
import textwrap
import time

import pytest
from helpers import EYES, make_eyes, random_state, text_fields, write_checkpoint, write_tekken
from processes import ROOT, run, run_on_ranks

from launch import WHAT_TO_DO

ASK = ("--raw", "--prompt", "the", "--json", "--dtype", "float32", "--temperature", "0")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """Text only: 8 heads, 2 key/value heads, 5 layers."""
    root = tmp_path_factory.mktemp("ckpt")
    fields = text_fields(
        vocab_size=write_tekken(root) + 1, num_attention_heads=8, head_dim=6, hidden_size=40, intermediate_size=56,
        num_hidden_layers=5,
    )  # fmt: skip
    return write_checkpoint(root, fields, random_state(fields), shards=6)


def generate(ckpt: str, *options: str) -> list[str]:
    return ["generate.py", "--ckpt", ckpt, *ASK, *options]


# ------------------------------------------------------------------------------------------------ the user's mistakes


def damaged(ckpt: str, tmp_path) -> str:
    """A copy whose last file, which only the last stage opens, was cut off."""
    for name in os.listdir(ckpt):
        with open(os.path.join(ckpt, name), "rb") as source, open(tmp_path / name, "wb") as target:
            data = source.read()
            target.write(data[: len(data) // 2] if name == files_of("lm_head.weight", ckpt) else data)
    return str(tmp_path)


def files_of(tensor: str, ckpt: str) -> str:
    with open(os.path.join(ckpt, "model.safetensors.index.json")) as file:
        return json.load(file)["weight_map"][tensor]


@pytest.mark.parametrize(
    "world, options, says",
    [
        (
            4,
            ("--tp", "3"),
            "tensor-parallel size 3 × pipeline-parallel size 1 does not divide the number of processes, 4; choose",
        ),
        (4, ("--tp", "2"), "--tp 2 × --pp 1 should be the number of processes"),
        (
            2,
            ("--tp", "2", "--pp", "2"),
            "tensor-parallel size 2 × pipeline-parallel size 2 does not divide the number of processes, 2; choose",
        ),
        (3, ("--tp", "3"), "tensor-parallel size 3 does not divide the 8 attention heads; choose other --tp and --pp"),
        pytest.param(6, ("--pp", "6"), "size 6 is more than the 5 layers; choose", marks=pytest.mark.slow),
        (2, ("--tp", "2", "--weights", "fp8"), "not FP8"),
        (2, ("--tp", "2", "--max-new-tokens", "-1"), "--max-new-tokens"),
    ],
)
def test_mistakes(world, options, says, ckpt):
    ranks = run_on_ranks(world, *generate(ckpt, *options))
    assert [status for status, _, _ in ranks] == [2] * world
    assert "".join(out for _, out, _ in ranks) == ""
    said = "".join(err for _, _, err in ranks)
    assert said.startswith("error: ") and said.count("\n") == 1 and says in said


@pytest.mark.slow
def test_more_ranks_than_heads(ckpt):
    ended = run(*generate(ckpt, "--tp", "16"), ranks=16)
    assert ended.status != 0 and ended.out == ""
    assert ended.errors == [f"error: tensor-parallel size 16 does not divide the 8 attention heads; {WHAT_TO_DO}"]


@pytest.mark.slow
def test_a_file_that_one_rank_opens(ckpt, tmp_path):
    """The other ranks never look at it, and yet all end with status 2 and one line."""
    broken = damaged(ckpt, tmp_path)
    ranks = run_on_ranks(3, *generate(broken, "--pp", "3"))
    said = "".join(err for _, _, err in ranks)
    assert [status for status, _, _ in ranks] == [2] * 3
    assert said.count("\n") == 1 and files_of("lm_head.weight", ckpt) in said and "not a whole safetensors file" in said
    ended = run(*generate(broken, "--pp", "3"), ranks=3, seconds=60)
    assert ended.status != 0 and ended.out == "" and ended.errors == [said.strip()]


def test_only_the_first_stage_has_a_tower(tmp_path):
    """Heads of the tower that do not divide: a mistake that only the first stage could see."""
    eyes = {**EYES, "hidden_size": 42, "num_attention_heads": 7}
    vocab_size = write_tekken(tmp_path)
    directory = make_eyes(tmp_path, "new", None, dict(vision_config=eyes, vocab_size=vocab_size))
    ranks = run_on_ranks(4, *generate(directory, "--tp", "2", "--pp", "2"))
    assert [status for status, _, _ in ranks] == [2] * 4
    said = "".join(err for _, _, err in ranks)
    assert (
        said.count("\n") == 1
        and "tensor-parallel size 2 does not divide the 7 attention heads of the vision tower" in said
    )


def test_a_file_that_one_rank_lacks(ckpt, tmp_path):
    """Requests on the first machine's disk only."""
    path = tmp_path / "requests.jsonl"
    path.write_text('{"raw": "the"}\n')
    program = f"""
        import os, sys, generate, launch
        sys.argv = ["", "--ckpt", {ckpt!r}, "--tp", "2", "--json", "--requests"]
        sys.argv.append({str(path)!r} if os.environ["RANK"] == "0" else "elsewhere")
        launch.run_program(generate.main)
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    ranks = run_on_ranks(2, script)
    assert [status for status, _, _ in ranks] == [2, 2]
    said = "".join(err for _, _, err in ranks)
    assert said.count("\n") == 1 and "elsewhere" in said


# ----------------------------------------------------------------------------------------------------- everything else

FAIL = """
    import os, signal, sys, time
    import config, engine, generate, launch
    what, place, bad = sys.argv[1], sys.argv[2], int(os.environ["RANK"]) == 1

    def fail():
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "mistake":
            raise config.UserError("only this rank thinks so")
        raise RuntimeError("the oven\\nis hot")

    real = getattr(engine.Engine, place)
    calls = 0
    def instead(self, *arguments):
        global calls
        calls += 1
        if bad and calls == (3 if place == "decode" else 1):
            fail()
        return real(self, *arguments)

    setattr(engine.Engine, place, instead)
    sys.argv = ["", *sys.argv[3:]]
    launch.run_program(generate.main)
"""


@pytest.fixture
def failing(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(f"import sys\nsys.path.append({ROOT!r})\n" + textwrap.dedent(FAIL).lstrip("\n"))
    return lambda ckpt, what, place, *options: [str(path), what, place, "--ckpt", ckpt, *ASK, *options]


@pytest.mark.parametrize(
    "place, options",
    [("decode", ("--tp", "2")), pytest.param("prefill", ("--pp", "2"), marks=pytest.mark.slow)],
)
def test_an_exception_on_one_rank(place, options, ckpt, failing):
    """Under torchrun: the rank that failed says why, the other one says nothing."""
    ended = run(*failing(ckpt, "raise", place, *options), ranks=2, seconds=30 + 20)  # 20 to start up
    assert ended.status == 1 and ended.out == ""
    assert ended.errors == ["error: rank 1: RuntimeError: the oven is hot (failing.py line 12)"]


@pytest.mark.slow
def test_an_exception_without_a_launcher(ckpt, failing):
    """Nobody ends the others: they do so themselves. Those that outlive rank 0, where all look, may say a line more."""
    started = time.monotonic()
    ranks = run_on_ranks(4, *failing(ckpt, "raise", "decode", "--tp", "2", "--pp", "2"))
    assert [status for status, _, _ in ranks] == [1] * 4 and time.monotonic() - started < 60
    said = [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")]
    assert said.count("error: rank 1: RuntimeError: the oven is hot (failing.py line 12)") == 1
    assert not any("error:" in err for rank, (_, _, err) in enumerate(ranks) if rank == 0)
    assert not any("Traceback" in err for _, _, err in ranks)


def test_a_killed_rank(ckpt, failing):
    """torchrun says which one, and by which signal; the others do not add that they miss it."""
    ended = run(*failing(ckpt, "kill", "decode", "--tp", "2", "--pp", "2"), ranks=4, seconds=50)
    assert ended.status != 0 and ended.out == "" and ended.errors == []
    assert f"exitcode: {-signal.SIGKILL}) local_rank: 1" in ended.err


@pytest.mark.slow
def test_a_killed_rank_without_a_launcher(ckpt, failing):
    ranks = run_on_ranks(3, *failing(ckpt, "kill", "prefill", "--pp", "3"))
    assert [status for status, _, _ in ranks] == [1, -signal.SIGKILL, 1]
    said = [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")]
    assert 1 <= len(said) <= 2 and all("Connection" in line for line in said)
    assert not any("Traceback" in err for _, _, err in ranks)


@pytest.mark.slow
def test_a_mistake_that_one_rank_alone_finds(ckpt, failing):
    """No program should raise one without `together`; if it does, the job ends all the same, and says why."""
    started = time.monotonic()
    ranks = run_on_ranks(2, *failing(ckpt, "mistake", "decode", "--tp", "2"))
    assert [status for status, _, _ in ranks] == [1, 2] and time.monotonic() - started < 60
    errors = [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")]
    assert errors == ["error: only this rank thinks so"]


def test_one_process_shows_the_traceback():
    ended = run("-c", "import launch; launch.run_program(lambda argv: 1 // 0)")
    assert ended.status == 1 and "ZeroDivisionError" in ended.err and "Traceback" in ended.err
