"""Requests that the tests of the engine, and of GPUs, share."""

import random

import torch
from helpers import random_tokens

from runtime.requests import Request


def drawn_requests(count: int, seed: int, **more) -> list[Request]:
    """Greedy and sampled requests of different lengths."""
    draw = random.Random(seed)
    return [
        Request(
            random_tokens(draw.randint(1, 90), 301, seed=1000 * seed + i),
            max_new_tokens=draw.randint(0, 70),
            temperature=draw.choice([0.0, 0.7, 1.3]),
            top_p=draw.choice([1.0, 0.8]),
            seed=draw.getrandbits(63),
            **more,
        )
        for i in range(count)
    ]


def assert_same(answers, expected) -> None:
    for answer, other in zip(answers, expected, strict=True):
        ends = [i for i, pair in enumerate(zip(answer.tokens, other.tokens)) if pair[0] != pair[1]]
        count = ends[0] + 1 if ends else None  # two tokens that are equally likely: either may be taken, and then …
        assert ends or (answer.tokens, answer.finish_reason) == (other.tokens, other.finish_reason)
        torch.testing.assert_close(answer.logprobs[:count], other.logprobs[:count], atol=2e-6 if ends else 1e-4, rtol=0)
