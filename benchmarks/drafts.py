"""What a draft brings the small model: equal answers, tokens per step, and tokens per second with and without.

    python examples/shapes.py shapes --chats 0
    python benchmarks/drafts.py shapes [--draft DIR] [--questions N] [--rounds N]

Held-out questions with reasoning, one by one and 16 at a time, in both dtypes. In float32 all answers have to stay what
they are; in BF16 sums of four rows may be rounded otherwise than those of one. Speeds are medians of rounds in turn.
"""

import argparse
import os
import statistics
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "examples")]

from evaluate import read_set  # noqa: E402

import generate  # noqa: E402
from parallel import Place  # noqa: E402

SETS = ("single", "several", "follow_up", "counted_calls")


def questions(folder: str, count: int, temperature: float) -> list[dict]:
    more = dict(reasoning_effort="high", temperature=temperature, top_p=0.95 if temperature else 1.0, base=folder)
    chats = [chat for name in SETS for chat, *_ in read_set(folder, name, count // len(SETS))]
    return [{**chat, **more, "seed": i, "where": f"question {i}"} for i, chat in enumerate(chats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what examples/shapes.py wrote")
    parser.add_argument("--draft", default=os.path.join(generate.TINY, "draft"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    own = parser.parse_args()
    for dtype in ("float32", "bfloat16"):
        for batch in ("1", "16"):
            common = ["--prompt", "", "--dtype", dtype, "--batch-size", batch, "--max-new-tokens", "160"]
            drafts = [], ["--draft", own.draft]
            sessions = [generate.Session(generate.parse_args(common + draft), Place()) for draft in drafts]
            for temperature in (0.0, 0.7):
                asked, speeds = questions(own.folder, own.questions, temperature), ([], [])
                for _ in range(own.rounds):
                    found = [session.answer(asked) for session in sessions]
                    for measured, session in zip(speeds, sessions):
                        measured.append(session.engine.tokens["decode"] / session.engine.seconds["decode"])
                equal = sum(one["tokens"] == other["tokens"] for one, other in zip(*found))
                stats, (plain, drafted) = found[1][-1]["stats"], map(statistics.median, speeds)
                print(
                    f"{dtype}, {batch} at a time, temperature {temperature}: {equal} of {len(asked)} answers equal, "
                    f"{stats['tokens_per_step']} tokens a step, {drafted:.0f} instead of {plain:.0f} tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
