"""How much the tests see: one token of the code is changed at a time, and the tests that cover its file should fail.

    nice python tests/mutations.py [--count N] [--seed S] [FILE…]        all files of COVER without FILE

Changes are drawn from comparisons, signs, `and` and `or`, constants, conditions and the like, and made in a scratch
copy of the working tree. What stays green is a change without effect, or a test that is missing.
"""

import argparse
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The tests that are run for a file, those that are likeliest to see a change first. test_fuzz.py is added to each.
COVER = {
    "model.py": "model engine engine_cache shapes cpu",
    "vision.py": "vision shapes",
    "fp8.py": "fp8 export model",
    "parallel.py": "parallel pipeline train shapes sharding plan",
    "generate.py": "engine engine_cache generate generate_images generate_mistakes generate_chat",
    "train.py": "train train_runs train_output nothing_lost lora generate_mistakes",
    "runtime/files.py": "config checkpoint_damage tokenizer nothing_lost generate_mistakes data",
    "runtime/config.py": "config model checkpoint",
    "runtime/native.py": "config checkpoint",
    "runtime/checkpoint.py": "checkpoint checkpoint_damage sharding export",
    "runtime/tokenizer.py": "tokenizer chat session_reply",
    "runtime/chat.py": "chat session_reply generate_chat",
    "runtime/images.py": "vision_images generate_images",
    "runtime/requests.py": "generate session_reply generate_images generate_mistakes generate_chat",
    "runtime/data.py": "data train train_runs shapes",
    "runtime/lora.py": "lora optimizer generate_mistakes",
    "runtime/run.py": "train_runs nothing_lost optimizer train_output train",
}

PAIRS = [("<", "<="), (">", ">="), ("==", "!="), ("+", "-"), ("*", "+"), ("//", "*"), ("and", "or")]
PAIRS += [("True", "False"), ("min", "max"), ("any", "all")]
SWAPS = dict(PAIRS) | {b: a for a, b in reversed(PAIRS)}
SWAPS |= {"&": "|", "not": "", "if": "if not", "elif": "elif not", "while": "while not", "+=": "-=", "-=": "+="}


def changes_of(text: str) -> list[tuple[int, int, str, str]]:
    """(line from 1, column, token, what replaces it) of every change that leaves a program."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        new = SWAPS.get(token.string)
        if token.type == tokenize.NUMBER:
            number = float(token.string) if re.search(r"[.e]", token.string) else int(token.string, 0)
            new = str(number * 1.5 or 0.5) if isinstance(number, float) else str(number + 1)
        change = *token.start, token.string, new
        if new is not None and is_program(changed(text, *change)):
            found.append(change)
    return found


def changed(text: str, line: int, column: int, old: str, new: str) -> str:
    lines = text.splitlines(keepends=True)
    before, after = lines[line - 1][:column], lines[line - 1][column + len(old) :]
    lines[line - 1] = before + new + after
    return "".join(lines)


def is_program(text: str) -> bool:
    try:
        compile(text, "", "exec")
        return True
    except SyntaxError:
        return False


def run_tests(tree: str, file: str, seconds: float) -> str:
    """The first test that failed, "" if none did."""
    tests = [f"tests/test_{name}.py" for name in (*COVER[file].split(), "fuzz")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    run = subprocess.Popen([*command, *tests], cwd=tree, env=settings, **pipes)
    try:
        said, _ = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        return "the time limit"
    if run.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return failed[1] if failed else f"pytest's status {run.returncode}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=", ".join(COVER))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one change")
    args = parser.parse_args(argv)
    if unknown := set(args.files) - set(COVER):
        parser.error(f"unknown file {min(unknown)!r}; known are {', '.join(COVER)}")
    texts = {file: open(os.path.join(ROOT, file), encoding="utf-8").read() for file in args.files or COVER}
    everything = [(file, change) for file, text in texts.items() for change in changes_of(text)]
    drawn = random.Random(args.seed).sample(everything, min(args.count, len(everything)))
    seen = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        tree = os.path.join(scratch, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.partial*"))
        for file, change in drawn:
            line, column, old, new = change
            start = time.monotonic()
            write(os.path.join(tree, file), changed(texts[file], *change))
            failed = run_tests(tree, file, args.timeout)
            write(os.path.join(tree, file), texts[file])
            seen += bool(failed)
            what = f"red: {failed}" if failed else "GREEN"
            place = f"{file}:{line}:{column}: {old!r} -> {new!r}"
            print(f"{place}: {what}; {time.monotonic() - start:.0f} s", flush=True)
    print(f"{seen} of {len(drawn)} changes turned a test red")
    return 0 if seen == len(drawn) else 1


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
