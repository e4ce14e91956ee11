"""User errors and the files that they are about: guards around reading, JSON, writing so that nothing is half there."""

import codecs
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake of the user's: a line that says what is wrong and what to do. Programs exit with `status`.

    Messages quote files, which may hold anything: what does not print is escaped, and a long line loses its middle.
    """

    def __init__(self, message: str, status: int = 2):
        for _ in range(2):  # again, since what is escaped grows
            message = message if len(message) <= 440 else f"{message[:280]} … {message[-157:]}"
            message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(message[:440])
        self.status = status


def require(holds: object, problem: str) -> None:
    """Raises UserError unless `holds`. `problem` is put together in any case, so it must not fail where it holds."""
    if not holds:
        raise UserError(problem)


def plural(count: int, noun: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextmanager
def within(where: str) -> Iterator[None]:
    """A UserError of the block says where it was made."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


MEGABYTE, DEEPEST = 1 << 20, 64  # levels of JSON

LFS = b"version https://git-lfs"  # how the pointers begin that Git keeps in place of large files


def warn(text: str) -> None:
    """One line on stderr, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"WARNING: {UserError(text)}", file=sys.stderr)


@contextmanager
def reading(path: str, kind: str, advice: str = "") -> Iterator[None]:
    """The guard around the interpretation of a file: whatever its reader raises becomes one line with its name."""
    try:
        yield
        return
    except UserError as error:
        line = str(error) if str(error).startswith(str(UserError(path))) else f"{path}: {error}"
    except Exception as error:
        line = f"{path}: not a valid {kind} ({type(error).__name__}: {error})"
    raise UserError(f"{line}; {advice}" if advice else line) from None  # the `with` is still handling the first


def read_file(path: str, limit: int = 0) -> bytes:
    """A regular file of at most `limit` bytes, since a pipe may block and a device never end; with 0 its first few."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            problem = "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is a pipe or a device, not a file"
        elif limit and status.st_size > limit:
            problem = f"it is larger than {limit // MEGABYTE} MB"
        else:
            with open(path, "rb") as file:
                contents = file.read(min(status.st_size, limit or len(LFS)))
            if not contents.startswith(LFS):
                return contents
            problem = "it is a Git LFS pointer, not the file itself; run git lfs pull"
    except (FileNotFoundError, ValueError):  # ValueError: a zero byte in the name
        problem = "no such file"
    except OSError as error:
        problem = error.strerror
    raise UserError(f"{path}: cannot be read: {problem}")


def read_json(path: str, limit: int = 64 * MEGABYTE):
    return parse_json(read_file(path, limit), path)


def parse_json(data: bytes, where: str):
    try:
        value = json.loads(data.removeprefix(codecs.BOM_UTF8).decode())  # some editors begin a file with one
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    require(not deeper_than(DEEPEST, value), f"{where}: nested more than {DEEPEST} levels deep")
    return value


def deeper_than(levels: int, value) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(deeper_than(levels - 1, item) for item in items)


def read_lines(path: str) -> list[tuple[int, bytes]]:
    """The lines of a JSON-lines file that are not blank, each with its number from 1. Raises UserError."""
    return lines_of(read_file(path, 1024 * MEGABYTE))


def lines_of(data: bytes) -> list[tuple[int, bytes]]:
    lines = enumerate(data.splitlines(), 1)
    return [(number, line) for number, line in lines if line.removeprefix(codecs.BOM_UTF8).strip()]


def parse_line(line: bytes, where: str, keys: Collection[str] = ()) -> dict:
    """The JSON object in `line`; with `keys`, no others may occur. Raises UserError that begins with `where`."""
    value = parse_json(line, where)
    require(isinstance(value, dict), f"{where}: should be a JSON object")
    for key in sorted(set(value) - set(keys or value)):
        raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(keys))}")
    return value


def digest_of(paths: Iterable[str]) -> str:
    """A digest of the contents of files; of a large one, 64 blocks from all over it stand for the rest."""
    digest, block = hashlib.sha256(), MEGABYTE // 4
    for path in sorted(paths):
        with reading(path, "file"), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, max(block, size // 64)):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def write_json(path: str, value) -> None:
    write_text(path, json.dumps(value, indent=2))


def write_text(path: str, text: str) -> None:
    """Under a temporary name first: a reader sees the old file or the new one."""
    remove(f"{path}.partial")  # of a process that was killed; or a link, which would be followed
    with open(f"{path}.partial", "x", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.partial", path)


def remove(path: str) -> None:
    """Remove what has this name, if it can be: a link itself, never what is behind it."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.remove(path)


def lock(folder: str, stack: ExitStack) -> None:
    """Whoever tries this, too, before `stack` is closed or the process ends, gets a UserError."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing there; choose another, or wait for its end") from None
    except OSError:
        pass  # a file system without locks


def find_folder(path: str) -> str:
    """`path`, which should be the folder of a checkpoint."""
    require(not os.path.isfile(path), f"{path}: is a file; give the folder that holds the checkpoint")
    hub = f" (of a Hugging Face repository: hf download {path} --local-dir DIR)" if path.count("/") == 1 else ""
    require(os.path.isdir(path) or not path.endswith(".json"), f"{path}: no such file")
    require(os.path.isdir(path), f"{path}: no such directory; give the folder of a checkpoint{hub}")
    return path


# The largest sizes, and other numbers. Nothing real comes near; what is beyond might be built, or overflow, first.
LARGEST_SIZE, LARGEST_NUMBER = 1 << 20, 1e30

LARGEST = {"num_hidden_layers": 1 << 10, "n_layers": 1 << 10, "vocab_size": 1 << 24, "spatial_merge_size": 1 << 6}
LARGEST |= dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 1 << 30)


OFF = (None, False, [], {})  # 0, too, which to Python equals false


class Fields:
    """A JSON object whose fields are taken one by one, with errors that name the file and the field.

    A null counts as absent, as in transformers. No default means that the field must be there.
    """

    def __init__(self, values: dict, where: str):
        require(isinstance(values, dict), f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values, self.where = values, where

    def section(self, name: str) -> "Fields | None":
        values = self.values.get(name)
        return None if values is None else Fields(values, f"{self.where}, {name}")

    def get(self, name: str, kind: type, default=None):
        value = self.values.get(name)
        if value is None:
            require(default is not None, f"{self.where}: the field {name!r} is missing; add it")
            return default
        # `type(value)`, not isinstance: to Python, true is an int.
        right = type(value) in ((int, float) if kind is float else (kind,))
        right = right and (kind not in (int, float) or abs(value) < LARGEST_NUMBER)
        require(right, f"{self.where}: {name} should be {kind.__name__}, found {value!r}")
        return kind(value)

    def positive(self, name: str, kind: type, default=None, largest=LARGEST_NUMBER):
        value = self.get(name, kind, default)
        right = 1 / LARGEST_NUMBER < value <= largest
        require(right, f"{self.where}: {name} should be above 0 and at most {largest:g}, found {value}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        return self.positive(name, int, default, LARGEST.get(name, LARGEST_SIZE))

    def strangers(self, known: Collection[str]) -> str:
        """What fields of other names say; "" if nothing, or no more than that something is off."""
        said = {name: value for name, value in self.values.items() if name not in known and value not in OFF}
        return ", ".join(f"{name} = {value!r}" for name, value in sorted(said.items()))

    def say_strangers(self, known: Collection[str]) -> None:
        """For files whose other readers pass over what they do not know."""
        if said := self.strangers(known):
            warn(f"{self.where}: {said} is not known here and changes nothing")

    def only(self, **allowed: tuple) -> None:
        """Refuse a value that would change the numbers in a way that this code does not compute.

        Such a checkpoint would load and run, only with answers that are a little wrong, which is the worst outcome.
        For each field: the values that are known; the first is what its absence means.
        """
        for name, known in allowed.items():
            value, listed = self.values.get(name, known[0]), ", ".join(map(repr, known))
            require(value in known, f"{self.where}: {name} = {value!r} is not supported (known: {listed})")

    def agree(self, name: str, value, source: str) -> None:
        """A field that repeats what `source` says may be absent, but must not differ."""
        found = self.values.get(name)
        require(found in (None, value), f"{self.where}: {name} = {found!r}, but {source} = {value!r}")


@contextmanager
def writing(path: str, advice: str = "make room, or choose another place") -> Iterator[None]:
    """What goes wrong in the block, where `path` is written, becomes a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); {advice}") from None


UNFINISHED: set[str] = set()  # folders that whoever ends the process without Python's `finally` should remove


@contextmanager
def new_folder(path: str) -> Iterator[None]:
    """A folder for the block to fill and to rename. Whatever ends the block early, a signal too, removes it again."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    UNFINISHED.add(path)
    try:
        os.makedirs(path)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        UNFINISHED.discard(path)


def flush_to_disk(path: str) -> None:
    """A file's contents, or a folder's names, survive a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
