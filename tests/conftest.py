"""Every test ends: a time limit around setup and call. And the fixtures that several files share."""

import faulthandler
import io
import signal
import sys
from contextlib import contextmanager

import pytest
import torch
from helpers import make_checkpoint, random_state, text_fields, write_checkpoint, write_tekken
from train_cases import IMAGES, TEXT, make_chats

import generate
from runtime import launch

torch.set_num_threads(1)  # the tests' tensors are so small that threads only cost time
TIME_LIMIT = 120  # seconds; @pytest.mark.time_limit(n) gives a test its own


@contextmanager
def limited(item):
    """A Python signal ends what waits in Python; what hangs in C is ended, with the whole run, a minute later."""
    marker = item.get_closest_marker("time_limit")
    seconds = marker.args[0] if marker else TIME_LIMIT

    def expire(number, frame):
        pytest.fail(f"took longer than {seconds} s")

    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, *launch.SIGNALS)}
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 60, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        for number, handler in before.items():  # `run_program` leaves its own
            signal.signal(number, handler)
        launch.BLOCKS.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with limited(item):
        return (yield)


@pytest.fixture
def program(monkeypatch, capsys):
    """generate.py in this process: (exit status, stdout, stderr) of some arguments."""

    def run(*arguments, stdin: str | io.TextIOBase = ""):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        if isinstance(stdin, str):
            stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            launch.run_program(generate.main)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint without a tower, and chats for it."""
    folder = tmp_path_factory.mktemp("text")
    return make_checkpoint(folder, TEXT), make_chats(folder / "data", False)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint with a tower, and chats with images."""
    folder = tmp_path_factory.mktemp("images")
    return make_checkpoint(folder, IMAGES), make_chats(folder / "data", True)


@pytest.fixture(scope="session")
def cases(text, images) -> dict[str, tuple[str, str]]:
    return {"text": text, "images": images}


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory) -> str:
    """A tiny checkpoint with a tokenizer of this model's version."""
    root = tmp_path_factory.mktemp("ckpt")
    vocab_size = write_tekken(root)
    fields = text_fields("yarn, short", vocab_size=vocab_size + 3, max_position_embeddings=600)
    return write_checkpoint(root, fields, random_state(fields, seed=6))
