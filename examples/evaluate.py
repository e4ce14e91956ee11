"""How often checkpoints answer the held-out questions of `shapes.py` exactly right, as a table in Markdown.

    python examples/evaluate.py DATA --ckpt DIR [DIR …] [--sets NAME …] [--count N] [--by-kind] [generate.py's options]

A row for each set, and for each checkpoint two columns: reasoning effort none and high. Decoding is greedy. A tool call
is right if it is the only one and its name and arguments are the expected ones, an answer in text if it is the same
text. With --draft a last row says how many tokens a step brought. Runs under torchrun too, with --tp and --pp.
"""

import json
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import generate
from parallel import Place
from runtime.files import UserError
from runtime.launch import SIZE, Parser, find_place, run_program, together

BOTH = ("none", "high")
SETS = {  # name: (what it is, the reasoning efforts it is asked with)
    "single": ("single-step questions", BOTH),
    "counting": ("how many there are", BOTH),
    "corners": ("in which corner something is", BOTH),
    "sides": ("left or right of something, above or below it", BOTH),
    "yes_or_no": ("is it left of, right of, above, below: yes or no", BOTH),
    "several": ("questions of several steps", BOTH),
    "crowded": ("the same, three or four shapes", BOTH),
    "tools": ("tool calls", BOTH),
    "counted_calls": ("tool calls with a count from the picture", BOTH),
    "follow_up": ("questions that refer to the one before", BOTH),
    "absent": ("about what is not there", BOTH),
    "large": ("single-step, twice the resolution", ("none",)),
    "wide": ("single-step, new aspect ratios", ("none",)),
    "styles": ("single-step, other styles of drawing", ("none",)),
    "text": ("no picture", ("none",)),
    "pink": ("single-step, with a colour not trained on", ("none",)),
}
MAX_NEW_TOKENS = 160


def read_set(folder: str, name: str, count: int, effort: str = "high") -> list[tuple[dict, dict, str]]:
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
        for message in chat["messages"][:-1] if effort == "none" else ():  # which has thought of nothing before, too
            if message["role"] == "assistant":
                message["content"] = [part for part in message["content"] if part["type"] != "thinking"]
        expected = chat["messages"].pop()
        chat.pop("reasoning_effort", None)
        questions.append((chat, expected, kind.strip()))
    return questions


def is_right(result: dict, expected: dict) -> bool:
    """Whether an answer of generate.py is that of the assistant message `expected`, thinking aside."""
    calls = [call["function"] for call in expected.get("tool_calls", ())]
    text = "".join(part["text"] for part in expected["content"] if part["type"] == "text")
    return (result["text"], result["tool_calls"], result["finish_reason"]) == (text, calls, "stop")


def evaluate(
    session: generate.Session, folder: str, name: str, effort: str, count: int, steps: Counter
) -> list[tuple[str, bool]]:
    """(kind, right?) for each question of a held-out set. Adds to `steps`, and the tokens that these brought."""
    questions, size = read_set(folder, name, count, effort), session.args.batch_size
    verdicts = []
    for first in range(0, len(questions), size):
        batch = questions[first : first + size]
        specs = [
            {**chat, "reasoning_effort": effort, "where": f"{name} {first + i}", "base": folder}
            for i, (chat, *_) in enumerate(batch, 1)
        ]
        results = session.answer(specs)
        steps.update(steps=session.engine.row_steps, tokens=session.engine.tokens["decode"])
        verdicts += [(kind, is_right(result, expected)) for result, (_, expected, kind) in zip(results, batch)]
    return verdicts


def percent(verdicts: list[bool]) -> str:
    return f"{100 * sum(verdicts) / len(verdicts):.1f} %" if verdicts else ""


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DATA", help="the folder that shapes.py wrote")
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="DIR", help="checkpoints, any layout")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=[n for n in SETS if n != "pink"])
    parser.add_argument("--count", type=SIZE, default=10**9, metavar="N", help="questions a set; default all")
    parser.add_argument("--by-kind", action="store_true", help="a row for each kind of question too")
    own, rest = parser.parse_known_args(argv)
    # greedy decoding, whatever the effort; the prompt only stands in for the ones that are read from files
    defaults = ["--prompt", "", "--temperature", "0", "--top-p", "1", "--max-new-tokens", str(MAX_NEW_TOKENS)]
    every = [generate.parse_args([*defaults, "--batch-size", "32", "--ckpt", ckpt, *rest]) for ckpt in own.ckpt]
    place: Place = find_place(every[0].tp, every[0].pp)
    together(lambda: [read_set(own.data, name, 1) for name in own.sets])
    sessions = [generate.Session(args, place) for args in every]

    def row(title: str, count: int | str, cells: list[str]) -> None:
        if place.rank == 0:
            print("|", " | ".join([title, str(count), *cells]), "|", flush=True)

    row("", "questions", [f"{ckpt}, {effort}" for ckpt in own.ckpt for effort in BOTH])
    row("---", "---", ["---"] * 2 * len(sessions))
    asked = [(session, effort, Counter()) for session in sessions for effort in BOTH]
    for name in own.sets:
        title, efforts = SETS[name]
        columns = [
            evaluate(session, own.data, name, effort, own.count, steps) if effort in efforts else []
            for session, effort, steps in asked
        ]
        row(title, len(columns[0]), [percent([right for _, right in column]) for column in columns])
        for kind in sorted({kind for kind, _ in columns[0]}) if own.by_kind else ():
            of_kind = [[right for each, right in column if each == kind] for column in columns]
            row(f"· {kind}", len(of_kind[0]), [percent(rights) for rights in of_kind])
    if every[0].draft:
        row("tokens a step", "", [f"{n['tokens'] / n['steps']:.2f}" if n["steps"] else "" for *_, n in asked])


if __name__ == "__main__":
    run_program(main)
