"""Hostile input: what a user can hand over, changed at random, ends in success or in one clear line.

    python tests/fuzz.py KIND… [--cases N] [--seed S]      every kind without KIND
    python tests/fuzz.py KIND --seed S --only I            one case again, and what it said

A case takes a valid input, changes it (JSON by its structure, anything by its bytes, files by what is no file), and
calls the reader of that kind in a child process with limits on memory and time. Anything but success, or a UserError of
at most 500 printable characters in one line that names the file, is a problem; so is whatever else reaches stderr.
"""

import argparse
import collections
import copy
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import torch  # noqa: E402
from hostile import KINDS, Kind  # noqa: E402

from runtime.files import UserError  # noqa: E402

SECONDS, MEMORY = 10, 3 << 30  # what a case may take; address space beyond what the parent has


# --------------------------------------------------------------------------------------------------- changes

DEEP = "@deep@"  # texts that JSON's writer would not write; see `as_json`
RAW = {
    DEEP: "[" * 100_000,
    "@nested@": "[" * 60 + "]" * 60,
    "@objects@": '{"a":' * 500 + "1" + "}" * 500,
    "@1e400@": "1e400",
    "@digits@": "1" + "0" * 5000,
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
}
HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 62, -(1 << 63), 10**12, 10**400, 0.5, -0.5, 1e-320, 1e308),
    *("", "a", "0", "none", "high", "\n\x1b[31mred\r\t\0", "x" * 100_000, "\ud800", "漢", "(a*)*b", "(" * 5000, "v3"),
    *("../../../etc/passwd", "/dev/zero", "/", ".", "a\0b", "data:image/png;base64,AAAA", "%s %d {0} {x}", "</s>"),
    *([], {}, [[]], [None], [1], ["a"], {"a": 1}, {"": None}, [[["a"]]], *RAW),
]


def spots(value, path: tuple = ()) -> list[tuple]:
    """The paths of a JSON value's parts; of a long list only some."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if len(items) > 40:
        items = items[:20] + items[-20:]
    return [spot for key, part in items for spot in [(*path, key), *spots(part, (*path, key))]]


def change_json(draw: random.Random, value):
    """`value` with one to three of its parts replaced, removed, renamed, nudged, doubled or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if not (found := spots(value)) or draw.random() < 0.02:
            return copy.deepcopy(draw.choice(HOSTILE))
        *parents, key = draw.choice(found)
        at = value
        for parent in parents:
            at = at[parent]
        old, kind = at[key], draw.randrange(8)
        if kind < 4:
            at[key] = copy.deepcopy(draw.choice(HOSTILE))  # which later changes may hit
        elif kind == 4:
            del at[key]
        elif kind == 5 and type(old) in (int, float):
            at[key] = draw.choice(
                [old + 1, old - 1, -old, old * 2, old // 2, str(old), min(old, 1e300) / 1, old * 10**9]
            )
        elif kind == 5 and type(old) is str:
            at[key] = draw.choice([old[:-1], old + draw.choice("x \n\0é"), old * 2, old.upper(), [old], old[::-1]])
        elif kind == 5 and type(old) is list:
            at[key] = draw.choice(
                [copy.deepcopy(old) + old, old[::-1], old[:-1], [*old, copy.deepcopy(draw.choice(HOSTILE))]]
            )
        elif kind == 6 and isinstance(at, dict):
            at[draw.choice(["", "type", "x" * 50_000, "\n\x1b", key + "s"])] = at.pop(key)
        else:
            other = value
            for part in draw.choice(found):
                other = other[part] if part in (other if isinstance(other, dict) else range(len(other))) else other
                if not isinstance(other, (dict, list)):
                    break
            at[key] = json.loads(json.dumps(other))
    return value


def as_json(value) -> bytes:
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def change_bytes(draw: random.Random, whole: bytes) -> bytes:
    some = draw.randbytes(draw.choice([1, 4, 100]))
    at, stop = sorted(draw.randrange(len(whole) + 1) for _ in range(2))
    near = draw.randrange(min(len(whole), 400) + 1)  # headers are in front
    return draw.choice([
        lambda: whole[:at], lambda: whole[at:], lambda: whole[:at] + some + whole[at:],
        lambda: whole[:at] + whole[stop:],
        lambda: whole[:at] + some + whole[at + len(some) :], lambda: whole[:near] + some + whole[near + len(some) :],
        lambda: whole[:near] + some[:1] + whole[near + 1 :], lambda: whole + some, lambda: whole * 2, lambda: b"",
        lambda: b"\0" * 1000, lambda: b"\xef\xbb\xbf" + whole, lambda: b"<html>Not Found</html>", lambda: some * 50,
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", lambda: b"[" * 100_000,
        lambda: whole.decode("latin-1").encode("utf-16"), lambda: b"\n" * 1000 + whole,
    ])()  # fmt: skip


def change_header(draw: random.Random, whole: bytes) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(whole[:8], "little")
    header = as_json(change_json(draw, json.loads(whole[8 : 8 + size])))
    said = draw.choice([len(header)] * 8 + [0, 1 << 62, len(header) - 1, 10**9])
    return said.to_bytes(8, "little") + header + whole[8 + size :]


def change_file(draw: random.Random, path: str, whole: bytes) -> None:
    if draw.random() < 0.04:  # no file at all
        draw.choice([lambda: None, lambda: os.mkdir(path), lambda: os.mkfifo(path),
                     lambda: os.symlink("/dev/zero", path), lambda: os.symlink(path, path)])()  # fmt: skip
        return
    if not path.endswith((".json", ".jsonl", ".safetensors")) or draw.random() < 0.25:
        whole = change_bytes(draw, whole)
    elif path.endswith(".json"):
        whole = as_json(change_json(draw, json.loads(whole)))
    elif path.endswith(".jsonl"):
        lines = whole.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = as_json(change_json(draw, json.loads(lines[at])))
        whole = b"\n".join(lines) + b"\n"
    else:
        whole = change_header(draw, whole)
    with open(path, "wb") as file:
        file.write(whole)


# ----------------------------------------------------------------------------------------------------- running


class TooLong(BaseException):
    """Not an Exception, so that no guard takes it for a mistake in a file."""


def expire(number, frame) -> None:
    raise TooLong


def restore(path: str, whole: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
    with open(path, "wb") as file:
        file.write(whole)


def outcome(kind: Kind, name: str) -> tuple[str, str]:
    """("success" or "refused" or "problem", what was said)."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read()
        return "success", ""
    except UserError as error:
        said = f"error: {error}"
    except TooLong:
        return "problem", f"took more than {SECONDS} s"
    except BaseException as error:  # SystemExit, and the panics of Rust, too
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)} line {trace.tb_lineno}"
        return "problem", f"{type(error).__name__}: {str(error)[:200]!r} in {where}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(said) > 500 or not said.isprintable():
        return "problem", f"not a short printable line: {said[:600]!r}"
    if os.path.basename(name) not in said and kind.folder not in said:
        return "problem", f"does not name {name}: {said}"
    return "refused", said


def run_cases(kind: Kind, name: str, seed: int, cases: range, report) -> None:
    """In a child process: the cases one after the other, each told to `report` before and after."""
    signal.signal(signal.SIGALRM, expire)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    valid = {path: open(path, "rb").read() for path in (os.path.join(kind.folder, file) for file in kind.files)}
    spoken = tempfile.TemporaryFile()
    os.dup2(spoken.fileno(), 2)
    for i in cases:
        draw = random.Random(f"{seed} {name} {i}")
        report(["case", i, ""])
        path = change(kind, draw, valid)
        os.truncate(spoken.fileno(), 0)
        os.lseek(spoken.fileno(), 0, os.SEEK_SET)
        what, said = outcome(kind, path)
        sys.stderr.flush()
        os.lseek(spoken.fileno(), 0, os.SEEK_SET)
        lines = os.read(spoken.fileno(), 10_000).decode(errors="replace").splitlines()
        if what != "problem" and (more := [line for line in lines if not line.startswith(("WARNING: ", "step "))]):
            what, said = "problem", f"also printed: {more[0][:200]!r}"
        report([what, i, said])
        if not kind.change:
            restore(path, valid[path])


def change(kind: Kind, draw: random.Random, valid: dict[str, bytes]) -> str:
    """Make a case; returns the name that a refusal should have."""
    if kind.change:
        return kind.change(draw)
    path = draw.choice(list(valid))
    os.remove(path)
    change_file(draw, path, valid[path])
    return path


def fuzz(name: str, cases: int, seed: int = 0, only: int | None = None) -> tuple[collections.Counter, list[str]]:
    """(how many cases ended in which way, one line per problem) of a kind."""
    counts, problems = collections.Counter(), []
    root = tempfile.mkdtemp(prefix="fuzz-")
    try:
        os.mkdir(folder := os.path.join(root, "x"))
        kind = KINDS[name](folder)
        first, stop = (0, cases) if only is None else (only, only + 1)
        while first < stop:
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                try:
                    run_cases(kind, name, seed, range(first, stop), lambda x: os.write(writer, as_line(x)))
                finally:
                    os._exit(0)
            os.close(writer)
            first, running = stop, None
            with os.fdopen(reader, "rb", buffering=0) as pipe:
                while True:
                    ready, _, _ = select.select([pipe], [], [], 3 * SECONDS)
                    line = pipe.readline() if ready else b""
                    what, i, said = json.loads(line) if line else ("end", -1, "")
                    if what == "case":
                        running = i
                    elif what == "end":
                        os.kill(child, signal.SIGKILL)
                        break
                    else:
                        running = None
                        counts[what] += 1
                        if what == "problem" or only is not None:
                            problems.append(f"{name} case {i}: {said or what}")
            _, status = os.waitpid(child, 0)
            if running is not None:  # it hung in C, or died
                counts["problem"] += 1
                problems.append(f"{name} case {running}: the process hung or died")
                restore_all(kind, name, folder)
                first = running + 1
    finally:
        shutil.rmtree(root)
    return counts, problems


def as_line(report: list) -> bytes:
    return json.dumps(report).encode() + b"\n"


def restore_all(kind: Kind, name: str, folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder)
    KINDS[name](folder)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="this case alone")
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown kind {min(unknown)!r}; known are {', '.join(KINDS)}")
    torch.set_num_threads(1)
    failed = 0
    for name in args.kinds or KINDS:
        start = time.monotonic()
        counts, problems = fuzz(name, args.cases, args.seed, args.only)
        for problem in problems:
            print(problem)
        failed += counts["problem"]
        kinds = ", ".join(f"{counts[what]} {what}" for what in ("success", "refused", "problem"))
        print(f"{name}: {sum(counts.values())} cases, {kinds}; {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
