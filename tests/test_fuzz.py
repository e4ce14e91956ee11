"""A small fixed part of tests/fuzz.py: some cases of every kind whose reader is quick."""

import fuzz
import pytest

KINDS = "config params index safetensors tekken sentencepiece images saved adapters state run metrics".split()
KINDS += ["folder", "options", "draft"]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input(kind):
    counts, problems = fuzz.fuzz(kind, cases=40, seed=1)
    assert not problems and sum(counts.values()) == 40
    assert counts["refused"] > 10
