"""When one rank fails, all end: soon, with the right status, and with the cause on one line."""

import gc
import io
import json
import os
import random
import re
import signal
import socket
import sys
import textwrap
import threading
import time
import weakref
from functools import partial

import pytest
from helpers import EYES, make_eyes, random_state, text_fields, write_checkpoint, write_tekken
from processes import ROOT, run, run_on_ranks, run_ranks, start
from torch import cuda, distributed

import train
from generate import Engine, Group
from generate import main as ask
from runtime import launch
from runtime.files import UserError
from runtime.launch import WHAT_TO_DO, find_place, start_world

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
    assert said.count("\n") == 1 and files_of("lm_head.weight", ckpt) in said and "not a valid safetensors file" in said
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


# ----------------------------------------------------------------------------------------------------- everything else

FAIL = """
    import os, signal, subprocess, sys, time
    import generate
    from runtime import files, launch
    what, place, bad = sys.argv[1], sys.argv[2], os.environ["RANK"] == os.environ.get("BAD", "1")

    def fail():
        me = os.getpid()
        if what == "kill":
            os.kill(me, signal.SIGKILL)
        if what == "crash":
            os.kill(me, signal.SIGSEGV)
        if what == "end":
            os._exit(3)
        if what in ("stop", "nap"):
            after = f"sleep 10; kill -9 {me}" if what == "stop" else f"sleep 2; kill -CONT {me}"
            subprocess.Popen(["sh", "-c", after])
            return os.kill(me, signal.SIGSTOP)
        if what == "slow":
            return time.sleep(12)
        if what == "mistake":
            raise files.UserError("only this rank thinks so")
        raise RuntimeError("the oven\\nis hot")

    real = getattr(generate.Engine, place)
    calls = 0
    def instead(self, *arguments):
        global calls
        calls += 1
        if bad and calls == (3 if place == "decode" else 1):
            fail()
        return real(self, *arguments)

    setattr(generate.Engine, place, instead)
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
    assert ended.errors == ["error: rank 1: RuntimeError: the oven is hot (failing.py line 24)"]


@pytest.mark.parametrize("bad", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_without_a_launcher(bad, ckpt, failing):
    """Nobody ends the others: they do so themselves. Also where it is rank 0, and the store is gone with it."""
    started = time.monotonic()
    prepare = partial(environment, {"BAD": str(bad)})
    ranks = run_on_ranks(4, *failing(ckpt, "raise", "decode", "--tp", "2", "--pp", "2"), prepare=prepare)
    assert [rank.status for rank in ranks] == [1] * 4 and time.monotonic() - started < 60
    said = [line for rank in ranks for line in rank.errors]
    assert said == [f"error: rank {bad}: RuntimeError: the oven is hot (failing.py line 24)"]
    assert not any("Traceback" in rank.err for rank in ranks)


KILLED = "error: rank 1 was killed, or crashed; the kernel's log (dmesg) may say why"


@pytest.mark.parametrize("what", ["kill", *(pytest.param(what, marks=pytest.mark.slow) for what in ("crash", "end"))])
def test_a_killed_rank(what, ckpt, failing):
    """Another rank says which one, before torchrun does; the rest keep quiet, and leave the cause to be the cause."""
    options = ("--tp", "2", "--pp", "2") if what == "kill" else ("--tp", "2")
    ended = run(*failing(ckpt, what, "decode", *options), ranks=4 if what == "kill" else 2, seconds=50)
    assert ended.status != 0 and ended.out == "" and ended.errors == [KILLED]
    own = [line for line in ended.err.splitlines() if not line.startswith("loading:")]
    assert own[0] == KILLED
    if what == "kill":
        assert f"exitcode: {-signal.SIGKILL}) local_rank: 1" in ended.err


@pytest.mark.slow
def test_a_killed_rank_without_a_launcher(ckpt, failing):
    ranks = run_on_ranks(3, *failing(ckpt, "kill", "prefill", "--pp", "3"))
    assert [status for status, _, _ in ranks] == [1, -signal.SIGKILL, 1]
    assert [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")] == [KILLED]
    assert not any("Traceback" in err for _, _, err in ranks)


def test_a_stopped_rank(ckpt, failing):
    """The others do not wait for it; here it is killed after 10 seconds, when they have to be gone."""
    ranks = run_on_ranks(2, *failing(ckpt, "stop", "decode", "--tp", "2", "--timeout", "5"))
    assert [status for status, _, _ in ranks] == [1, -signal.SIGKILL]
    said = [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")]
    assert said == ["error: rank 1 gave no sign of life for 5 s (--timeout); it is stopped or cut off"]


@pytest.mark.slow
def test_rank_0_stopped_without_a_launcher(ckpt, failing):
    """The store, through which ranks see each other, is in that process."""
    prepare = partial(environment, {"BAD": "0"})
    ranks = run_on_ranks(2, *failing(ckpt, "stop", "decode", "--tp", "2", "--timeout", "5"), prepare=prepare)
    assert [status for status, _, _ in ranks] == [-signal.SIGKILL, 1]
    said = [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")]
    assert said == [
        "error: rank 0, where all ranks meet, gave no sign of life for 5 s (--timeout); it is stopped or cut off"
    ]


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_a_while(ckpt, failing):
    """For less than the timeout: nothing happened. And a rank that is slow is not stopped, however slow."""
    for what in ("nap", "slow"):
        ranks = run_on_ranks(2, *failing(ckpt, what, "decode", "--tp", "2", "--timeout", "6"))
        assert [status for status, _, _ in ranks] == [0, 0] and "error" not in ranks[0].err + ranks[1].err


@pytest.mark.slow
def test_ctrl_c(ckpt, tmp_path):
    """The terminal sends SIGINT to all processes; torchrun's own report may begin before ours."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text(1000 * '{"raw": "the", "max_new_tokens": 50}\n')
    command = ["generate.py", "--ckpt", ckpt, "--requests", requests, "--batch-size", "1", "--json", "--tp", "2"]
    process = start(*command, ranks=2, start_new_session=True)
    assert process.stdout.readline().startswith("{")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert [line for line in err.splitlines() if line.startswith("error:")] == ["error: stopped by SIGINT"]
    assert process.returncode == 1 and "KeyboardInterrupt" not in err


@pytest.mark.slow
def test_a_mistake_that_one_rank_alone_finds(ckpt, failing):
    """No program should raise one without `together`; if it does, the job ends all the same, and says why."""
    started = time.monotonic()
    ranks = run_on_ranks(2, *failing(ckpt, "mistake", "decode", "--tp", "2"))
    assert [status for status, _, _ in ranks] == [1, 2] and time.monotonic() - started < 60
    errors = [line for _, _, err in ranks for line in err.splitlines() if line.startswith("error:")]
    assert errors == ["error: only this rank thinks so"]


def test_one_process_shows_the_traceback():
    ended = run("-c", "from runtime import launch; launch.run_program(lambda argv: 1 // 0)")
    assert ended.status == 1 and "ZeroDivisionError" in ended.err and "Traceback" in ended.err


# ------------------------------------------------------------------------------- what the system gives to a program

SHOW = """
    import sys
    from runtime import launch
    launch.run_program(lambda argv: [print(f"é {chr(0xd800)} {i}", flush=True) for i in range(20)])
"""


@pytest.fixture
def script(tmp_path):
    def make(program: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(f"import sys\nsys.path.append({ROOT!r})\n" + textwrap.dedent(program).lstrip("\n"))
        return str(path)

    return make


def stdout_full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def stdout_unread() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # the one made before knows that it could seek


def all_closed() -> None:
    sys.stdin = sys.stdout = None
    os.close(0)
    os.close(1)


def ascii_only() -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


@pytest.mark.parametrize(
    "prepare, status, says",
    [
        (stdout_full, 2, "error: standard output, or a file: No space left on device\n"),
        (stdout_unread, 1, ""),
        (all_closed, 2, "error: standard output, or a file: Bad file descriptor\n"),
        (ascii_only, 0, ""),
    ],
)
def test_standard_output(prepare, status, says, script):
    (ended,) = run_on_ranks(1, script(SHOW), prepare=prepare)
    assert (ended.status, ended.err) == (status, says)
    assert ended.out == ("".join(f"é \\ud800 {i}\n" for i in range(20)) if status == 0 else "")


@pytest.mark.slow
def test_a_closed_pipe(ckpt, tmp_path):
    """A whole program, in a shell; and one under torchrun, where one line says what happened."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text(200 * '{"raw": "the", "max_new_tokens": 5}\n')
    for ranks, says in ((1, []), (2, ["error: the reader of the output went away"])):
        process = start("generate.py", "--ckpt", ckpt, "--requests", requests, "--batch-size", 1, "--json", ranks=ranks)
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 1
        assert [line for line in err.splitlines() if line.startswith("error:")] == says
        assert ranks > 1 or all(line.startswith("load") for line in err.splitlines())


@pytest.mark.parametrize("work", ["bytearray(1 << 60)", "torch.empty(1 << 50)", "open('/nowhere/x')"])
def test_what_the_machine_refuses(work, script):
    (ended,) = run_on_ranks(
        1, script(f"import torch\nfrom runtime import launch\nlaunch.run_program(lambda argv: {work})")
    )
    says = "/nowhere/x: No such file" if "open" in work else "out of memory; use more processes"
    assert ended.status == 2 and ended.err.startswith(f"error: {says}") and ended.err.count("\n") == 1


def test_long_and_unprintable_messages(script):
    program = (
        "from runtime import files, launch\ndef main(argv):\n    raise files.UserError('a\\n\\x1b[31m' + 'b' * 9999)\n"
    )
    (ended,) = run_on_ranks(1, script(program + "launch.run_program(main)"))
    assert ended.err.count("\n") == 1 and len(ended.err) <= 501 and ended.err.strip("\n").isprintable()


def environment(values: dict[str, str]) -> None:
    os.environ.update(values)


GOOD = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BAD = {
    "WORLD_SIZE": ("abc", "-1", "0", "", "1e3", "9" * 5000, "2.0", "\u0664x"),
    "RANK": ("2", "-1", "x", "", "nan"),
    "LOCAL_RANK": ("2", "-1", "a b", ""),
    "MASTER_PORT": ("0", "65536", "-5", "http", ""),
    "MASTER_ADDR": ("", "no such host", "256.256.256.256"),
}


def test_garbage_in_the_environment(script):
    """As a program: one bad value of each variable. The next test has all of them."""
    path, rng = script("from runtime import launch\nlaunch.run_program(lambda argv: None)"), random.Random(7)
    for name, values in BAD.items():
        value = rng.choice(values)
        (ended,) = run_on_ranks(1, path, prepare=partial(environment, {**GOOD, name: value}))
        assert ended.status == 2 and ended.out == "" and ended.err.count("\n") == 1, value[:9]
        assert ended.err.startswith("error: ") and name in ended.err and len(ended.err) < 500


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_bad_variables(name, value, monkeypatch):
    for each, good in GOOD.items():
        monkeypatch.setenv(each, good)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        start_world()


def test_a_variable_that_is_missing(monkeypatch):
    for name in GOOD:
        for each, good in GOOD.items():
            monkeypatch.setenv(each, good)
        monkeypatch.delenv(name)
        if name not in ("WORLD_SIZE", "LOCAL_RANK"):
            with pytest.raises(UserError, match=name):
                start_world()


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {**GOOD, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="MASTER_PORT .*: in use on this machine; set a free one"):
            start_world()


@pytest.mark.parametrize("gpus, gpu", [(3, 1), (2, 0), (1, 1)])
def test_a_rank_has_its_gpu_before_nccl_begins(gpus, gpu, monkeypatch):
    happened = []
    for name, value in {**GOOD, "LOCAL_RANK": str(gpu)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(cuda, "set_device", happened.append)
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **options: iter([(None,)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **options: happened.append(backend))
    if gpu < gpus:
        start_world()
        assert happened == [gpu, "cpu:gloo,cuda:nccl"]
    else:
        with pytest.raises(UserError, match="more processes than the 1 GPUs of a machine"):
            start_world()


def first_messages(tp: int, pp: int) -> list[tuple]:
    """(what, group, with which stage) while a rank finds its place."""
    seen, send, receive = [], distributed.send, distributed.recv

    def sends(x, group, group_dst):
        seen.append(("to", group, group_dst))
        send(x, group=group, group_dst=group_dst)

    def receives(x, group, group_src):
        seen.append(("from", group, group_src))
        receive(x, group=group, group_src=group_src)

    distributed.send, distributed.recv = sends, receives
    place = find_place(tp, pp)
    assert {group for _, group, _ in seen} <= {place.pp_group, place.answer_group} - {None}
    return [(what, group is place.pp_group, stage) for what, group, stage in seen]


@pytest.mark.parametrize("tp, pp", [(1, 2), (1, 3), (2, 2), (1, 4), (2, 1)])
def test_stages_meet_before_they_read(tp, pp):
    """In both groups each of them sends to the next and receives from the one before; with Gloo, in earnest."""
    for rank, seen in enumerate(run_ranks(first_messages, tp * pp, tp, pp)):
        stage = rank // tp
        ring = [
            (what, down, to % pp) for down in (True, False) for what, to in (("to", stage + 1), ("from", stage - 1))
        ]
        assert sorted(seen) == (sorted(ring) if pp > 1 else [])


@pytest.mark.slow
def test_whoever_takes_the_connection_and_says_nothing(script):
    """torch waits for an answer without end, whatever its own timeout."""
    path = script("from runtime import launch\nlaunch.run_program(lambda argv: None)")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_port = {**GOOD, "RANK": "1", "MASTER_PORT": str(silent.getsockname()[1])}
        started = time.monotonic()
        (ended,) = run_on_ranks(1, path, "--timeout", "5", prepare=partial(environment, silent_port))
    assert ended.status == 2 and ended.err.count("\n") == 1 and time.monotonic() - started < 10
    assert re.fullmatch(
        r"error: MASTER_ADDR '127.0.0.1', MASTER_PORT \d+: no answer within 5 s \(--timeout\)\n", ended.err
    )


@pytest.mark.parametrize("program", ["fp8.py", "parallel.py"])
def test_programs_that_run_alone(program, ckpt, tmp_path):
    """A shell inside a job may have a launcher's variables; nobody else comes to meet."""
    config = os.path.join(ckpt, "config.json")
    options = [ckpt, tmp_path / "out"] if program == "fp8.py" else ["--plan", "--config", config, "--tp", 2]
    (ended,) = run_on_ranks(1, program, *options, prepare=partial(environment, GOOD), seconds=60)
    assert ended.status == 0 and "error" not in ended.err


def outlived(program, argv: list[str], stdin: str, monkeypatch) -> list[str]:
    """What is left of engines and their groups when `program` comes to `finish`, without the garbage collector."""
    made, left = [], []
    for kind in (Engine, Group):

        def init(self, *arguments, original=kind.__init__):
            made.append(weakref.ref(self))
            original(self, *arguments)

        monkeypatch.setattr(kind, "__init__", init)

    def finish(watch, *ending) -> None:
        left.extend(type(one()).__name__ for one in made if one())
        sys.exit(ending[0])

    monkeypatch.setattr(launch, "finish", finish)
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    gc.disable()
    try:
        with pytest.raises(SystemExit, match="0"):
            launch.run_program(program)
    finally:
        gc.enable()
    assert len(made) > 1
    return left


@pytest.mark.parametrize("chat", [False, True])
def test_no_recorded_step_outlives_main(chat, ckpt, monkeypatch):
    """`destroy_process_group` never returns while a captured graph is alive (pytorch #115388)."""
    options = ["--interactive"] if chat else ["--raw", "the", "--max-new-tokens", 3]
    stdin = "hello\n/exit\n" if chat else ""
    assert outlived(ask, ["--ckpt", ckpt, "--max-context", 40, *options], stdin, monkeypatch) == []


def test_no_recorded_step_outlives_training(text, tmp_path, monkeypatch):
    """Validation generates, too."""
    argv = ["--ckpt", text[0], "--data", text[1], "--val", text[1], "--val-generate", "--out", tmp_path / "out"]
    argv += ["--max-steps", 1, "--global-batch-size", 2, "--dtype", "float32"]
    assert outlived(train.main, argv, "", monkeypatch) == []


def test_a_session_that_lives_on_has_no_groups(ckpt, monkeypatch):
    kept, make = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *rest: kept.append(self) or make(self, *rest))
    argv = ["--ckpt", ckpt, "--raw", "the", "--max-new-tokens", 3]
    assert outlived(ask, argv, "", monkeypatch) == ["Engine"] and kept[0].groups == []


# --------------------------------------------------------------------------------------------------------- signals

HANG = """
    import os, sys, time
    import torch.distributed as dist
    from runtime import launch
    from runtime.files import new_folder

    def main(argv):
        what, folder = argv
        if what == "postponed":
            with launch.Postponed(tell=lambda: print("soon\\n", end="", flush=True)) as signals:
                print("ready\\n", end="", flush=True)
                while not signals.number:
                    time.sleep(0.01)
                print(f"noted {signals.number}\\n", end="", flush=True)
                time.sleep(60 if os.path.exists(folder) else 1)
            print("never", flush=True)
        with new_folder(folder):
            print("ready\\n", end="", flush=True)
            if what == "waits":  # in C: a collective that the other rank never comes to
                dist.barrier() if os.environ.get("RANK") == "1" else time.sleep(600)
            time.sleep(60)

    launch.run_program(main)
"""


def signalled(script, numbers: list[int], *arguments) -> tuple[int, str, str]:
    """Start HANG and send it signals, each once it has said something more."""
    process = start(script(HANG), *arguments)
    said = ""
    for number in numbers:
        said += process.stdout.readline()
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, said + out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal(number, script, tmp_path):
    """The folder that was being written goes, and nothing is said."""
    assert signalled(script, [number], "sleeps", tmp_path / "new") == (128 + number, "ready\n", "")
    assert not (tmp_path / "new").exists()


def test_a_signal_that_is_postponed(script, tmp_path):
    """Noted, told of, and delivered after the block; there a second Ctrl-C ends the program at once."""
    status, out, err = signalled(script, [signal.SIGTERM], "postponed", tmp_path / "new")
    assert (status, err) == (143, "") and sorted(out.splitlines()) == ["noted 15", "ready", "soon"]
    started = time.monotonic()
    status, out, err = signalled(script, [signal.SIGINT] * 2, "postponed", tmp_path)
    assert (status, err) == (130, "") and time.monotonic() - started < 50


def test_ignored_signals_stay_ignored(script, tmp_path):
    """As under nohup."""
    process = start(
        script(HANG), "sleeps", tmp_path / "new", preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def signal_myself(folder: str) -> None:
    """To rank 1, a second after it began to wait in C."""

    def wait() -> None:
        while not os.path.exists(f"{folder}.1"):
            time.sleep(0.01)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_a_signal_to_a_rank_that_waits(script, tmp_path):
    """Its main thread waits in C and runs no handler; the watching thread ends it, tidies up, and so do the others."""
    path = script(HANG.replace("new_folder(folder)", "new_folder(f'{folder}.{os.environ[\"RANK\"]}')"))
    started = time.monotonic()
    prepare = partial(signal_myself, str(tmp_path / "new"))
    ranks = run_on_ranks(2, path, "waits", tmp_path / "new", prepare=prepare, seconds=60)
    assert [rank.status for rank in ranks] == [1, 143] and time.monotonic() - started < 30
    assert [line for rank in ranks for line in rank.errors] == ["error: stopped by SIGTERM"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith("new")]


def test_an_interrupt_while_torch_is_imported():
    """No traceback, in any of the four programs."""
    for program in ("generate.py", "train.py", "fp8.py", "parallel.py"):
        process = start(program, "--help")
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130, 0) and "Traceback" not in err
