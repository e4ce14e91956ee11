"""Requests that the tests of the engine, and of GPUs, share."""

import random

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
