"""benchmarks/compare.py runs from end to end, on a checkpoint of a few layers."""

import pytest
from helpers import make_checkpoint
from processes import run
from train_cases import TEXT

ROWS = """start to first token, peak memory of that, answer of 32 tokens, answer of 64 tokens, answer of 128
tokens, answer of 256 tokens, 16 answers of 32 tokens, 16 answers of 128 tokens, decode, prefill 1024,
prefill 4000, decode after 4000, prefill 16 x 20, decode 16 rows, picture: first token, picture: an
answer of 16 tokens, 64 requests, 16 at a time, training step, float32, text, training step, float32,
images, training step, bfloat16, text, training step, bfloat16, images"""


@pytest.mark.slow
@pytest.mark.time_limit(900)
def test_compare(tmp_path):
    for peer in ("transformers", "mistral_common"):
        pytest.importorskip(peer)
    ckpt = make_checkpoint(str(tmp_path / "ckpt"), TEXT)
    ended = run("benchmarks/compare.py", ckpt, "--rounds", "1", seconds=800)
    assert ended.status == 0, ended.err
    found = [line.split(": ours")[0].split(": refilled")[0] for line in ended.out.splitlines() if "ratio" in line]
    assert ", ".join(found) == ROWS.replace("\n", " ")
