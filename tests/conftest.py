"""Every test ends: a time limit around setup and call, and the repository root on the path."""

import faulthandler
import os
import signal
import sys
from contextlib import contextmanager

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

torch.set_num_threads(1)  # the tests' tensors are so small that threads only cost time
TIME_LIMIT = 120  # seconds; @pytest.mark.time_limit(n) gives a test its own


@contextmanager
def limited(item):
    """A Python signal ends what waits in Python; what hangs in C is ended, with the whole run, a minute later."""
    marker = item.get_closest_marker("time_limit")
    seconds = marker.args[0] if marker else TIME_LIMIT

    def expire(number, frame):
        pytest.fail(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 60, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with limited(item):
        return (yield)
