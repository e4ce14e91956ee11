"""How often a checkpoint answers the held-out questions of `shapes.py` exactly right.

    python examples/evaluate.py DATA --ckpt DIR [--sets NAME …] [--count N] [--by-kind] [generate.py's options]

Prints, a set and a reasoning effort a line, the share of right answers; decoding is greedy. A tool call is right if it
is the only one and its name and arguments are the expected ones, an answer in text if it is the same text. `several`
is asked twice, with reasoning and without. Runs under torchrun too, with --tp and --pp.
"""

import json
import os
import sys
import time
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import generate
from config import UserError
from launch import SIZE, Parser, find_place, run_program, together
from parallel import Place

SETS = {  # name: (what it is, the reasoning efforts it is asked with)
    "single": ("single-step questions", ("none", "high")),
    "several": ("questions of several steps", ("none", "high")),
    "tools": ("tool calls", ("none",)),
    "text": ("text only", ("none",)),
    "large": ("single-step, twice the resolution", ("none",)),
    "wide": ("single-step, new aspect ratios", ("none",)),
    "pink": ("single-step, with a colour not trained on", ("none",)),
}
MAX_NEW_TOKENS = 160


def read_set(folder: str, name: str, count: int) -> list[tuple[dict, dict, str]]:
    """(the chat without its last answer, that answer, the question's kind) for the first `count` of a held-out set."""
    chats, kinds = (os.path.join(folder, f"{name}.{suffix}") for suffix in ("jsonl", "kinds"))
    try:
        with open(chats, encoding="utf-8") as file, open(kinds, encoding="utf-8") as labels:
            lines = list(zip(file, labels))[:count]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); shapes.py writes it") from None
    questions = []
    for line, kind in lines:
        chat = json.loads(line)
        expected = chat["messages"].pop()
        chat.pop("reasoning_effort", None)
        questions.append((chat, expected, kind.strip()))
    return questions


def is_right(result: dict, expected: dict) -> bool:
    """Whether an answer of generate.py is that of the assistant message `expected`, thinking aside."""
    calls = [call["function"] for call in expected.get("tool_calls", ())]
    text = "".join(part["text"] for part in expected["content"] if part["type"] == "text")
    return (result["text"], result["tool_calls"], result["finish_reason"]) == (text, calls, "stop")


def evaluate(session: generate.Session, folder: str, name: str, effort: str, count: int) -> list[tuple[str, bool]]:
    """(kind, right?) for each question of a held-out set."""
    questions, size = read_set(folder, name, count), session.args.batch_size
    verdicts = []
    for first in range(0, len(questions), size):
        batch = questions[first : first + size]
        specs = [
            {**chat, "reasoning_effort": effort, "where": f"{name} {first + i}"}
            for i, (chat, *_) in enumerate(batch, 1)
        ]
        results = session.answer(specs, folder)
        verdicts += [(kind, is_right(result, expected)) for result, (_, expected, kind) in zip(results, batch)]
    return verdicts


def percent(verdicts: list[bool]) -> str:
    return f"{100 * sum(verdicts) / len(verdicts):5.1f} % of {len(verdicts)}"


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DATA", help="the folder that shapes.py wrote")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=[n for n in SETS if n != "pink"])
    parser.add_argument("--count", type=SIZE, default=10**9, metavar="N", help="questions a set; default all")
    parser.add_argument("--by-kind", action="store_true", help="a line for each kind of question too")
    own, rest = parser.parse_known_args(argv)
    # greedy decoding, whatever the effort; the prompt only stands in for the ones that are read from files
    defaults = ["--prompt", "", "--temperature", "0", "--top-p", "1", "--max-new-tokens", str(MAX_NEW_TOKENS)]
    args = generate.parse_args([*defaults, "--batch-size", "32", *rest])
    place: Place = find_place(args.tp, args.pp)
    together(lambda: [read_set(own.data, name, 1) for name in own.sets])
    session = generate.Session(args, place)

    def say(text: str) -> None:
        if place.rank == 0:
            print(text, flush=True)

    for name in own.sets:
        title, efforts = SETS[name]
        for effort in efforts:
            started = time.perf_counter()
            verdicts = evaluate(session, own.data, name, effort, own.count)
            seconds = time.perf_counter() - started
            say(f"{title + ', ' + effort:50} {percent([right for _, right in verdicts])}   ({seconds:.0f} s)")
            kinds = defaultdict(list)
            for kind, right in verdicts:
                kinds[kind].append(right)
            for kind in sorted(kinds) if own.by_kind else ():
                say(f"    {kind:46} {percent(kinds[kind])}")


if __name__ == "__main__":
    run_program(main)
