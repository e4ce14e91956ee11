"""Text to token ids and back, for the two kinds of tokenizer that Mistral checkpoints ship.

**Tekken** (`tekken.json`, all newer checkpoints) is byte-level BPE. A regular expression cuts the text into words; the
UTF-8 bytes of each word are merged pair by pair, always the pair whose merged bytes have the lowest rank in the
vocabulary, until no pair is in it. An id is a rank plus the number of special tokens, which come first. The expression
is written for Rust's regex engine; `python_pattern` rewrites it for the standard library's `re`.

**SentencePiece** (`tokenizer.model`, `tokenizer.model.v3`, …; checkpoints up to v7) is read with the package of that
name.

Special tokens (`[INST]`, `</s>`, …) never arise from text: a user who types `[INST]` gets ordinary tokens, and only
chat.py places control tokens, by id. The ids equal those of mistral-common for every file and text.
"""

import base64
import codecs
import heapq
import os
import re
import unicodedata
from functools import cache, lru_cache, partial
from itertools import groupby

import sentencepiece

from model import Config
from runtime.files import MEGABYTE, UserError, find_folder, read_file, read_json, reading, require

LARGEST_FILE = 1024 * MEGABYTE

MOST_SPECIAL, LONGEST_PATTERN = 1 << 16, 2000  # files have 1,000 special tokens, and patterns of 300 characters

VERSIONS = ("v1", "v2", "v3", "v7", "v11", "v13", "v15")  # each has its own chat format

# Tekken files up to v7 do not list their special tokens: these twenty apply, in the order of their ids.
CLASSIC_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, replaced by U+FFFD (and halves of a pair joined)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tekken:
    """A byte-level BPE tokenizer read from `tekken.json`.

    version: chat format, "v3" to "v15". vocab_size: number of ids. special: name of control token -> id, all below
    every ordinary id. image: {"image_patch_size", "max_image_size", "spatial_merge_size"} in pixels and patches, or
    None. model_settings: the file's `model_settings_builder` (v15), or None. Raises UserError for a broken file.
    """

    utf8_errors = "replace"

    def __init__(self, path: str):
        with reading(path, "Tekken file"):
            self._read(read_json(path, LARGEST_FILE))

    def _read(self, data: dict) -> None:
        config = data["config"]
        self.version, self.vocab_size = _known(config["version"]), config["default_vocab_size"]
        self._num_special = config["default_num_special_tokens"]
        self.special = _read_special(data.get("special_tokens"), self._num_special, self.version)
        self.bos_id, self.eos_id, self.pad_id = self.special["<s>"], self.special["</s>"], self.special.get("<pad>")
        words = _read_vocab(data["vocab"], self.vocab_size - self._num_special)
        self._bytes = [b""] * self._num_special + words
        self._ids = {word: id for id, word in enumerate(words, self._num_special)}
        image = data.get("image") or data.get("multimodal")
        self.image = {"spatial_merge_size": 1, **image} if image else None
        self.model_settings = _read_settings(data.get("model_settings_builder"), self.version)
        self._pattern = config["pattern"]
        _word_pattern(self._pattern, LAST_BMP)  # so that a bad pattern is reported now
        self._merge_cached = lru_cache(50_000)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; no <s> is added, and text that spells a special token is only text."""
        text = _well_formed(text)
        beyond_bmp = max(text, default="") > chr(LAST_BMP)
        ids = []
        for match in _word_pattern(self._pattern, LAST_UNICODE if beyond_bmp else LAST_BMP).finditer(text):
            word = match[0]  # few words are longer than 64 characters, and remembering those could fill the memory
            ids += self._merge_cached(word) if len(word) < 64 else self._merge(word)
        return ids

    def _merge(self, text: str) -> list[int]:
        """Byte-pair encoding of one word.

        Looking through all pairs before each merge would be O(n²), minutes for 100 kB of base64, which is one word. A
        merge only changes the pairs to its left and right, so a heap that holds every pair by its rank makes it
        O(n log n). Equal ranks are merged from left to right, as in the reference.
        """
        word, ids = text.encode("utf-8"), self._ids
        if word in ids:  # even if no chain of merges leads to it
            return [ids[word]]
        # Tokens form a linked list over byte positions: end[i] is where the token that starts at i ends (0 once a
        # merge has swallowed it), before[i] is where its left neighbour starts.
        size = len(word)
        end, before = list(range(1, size + 1)), list(range(-1, size - 1))
        # Pairs as (rank, start, stop). Ids are ranks plus a constant; none is 0, since special tokens come first.
        heap = [(ids[word[i : i + 2]], i, i + 2) for i in range(size - 1) if word[i : i + 2] in ids]
        heapq.heapify(heap)
        while heap:
            _, start, stop = heapq.heappop(heap)
            # Pairs that no longer exist are not searched for in the heap but recognized when they come out of it: by
            # now one of the two tokens has been swallowed, or has grown.
            middle = end[start]
            if not 0 < middle < stop or end[middle] != stop:
                continue
            end[start], end[middle] = stop, 0
            if stop < size:
                before[stop] = start
                if rank := ids.get(word[start : end[stop]]):
                    heapq.heappush(heap, (rank, start, end[stop]))
            if start > 0 and (rank := ids.get(word[before[start] : stop])):
                heapq.heappush(heap, (rank, before[start], stop))
        result, start = [], 0
        while start < size:
            result.append(ids[word[start : end[start]]])
            start = end[start]
        return result

    def is_special(self, id: int) -> bool:
        return 0 <= id < self._num_special

    def token_bytes(self, id: int, first: bool) -> tuple[bytes, bool]:
        """The UTF-8 bytes of a token, and whether a character may continue across its borders. `first`: no ordinary
        token came before. For StreamDecoder."""
        ordinary = self._num_special <= id < self.vocab_size
        return (self._bytes[id], True) if ordinary else (b"", False)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids. Special tokens and ids beyond the vocabulary are left out; invalid UTF-8 -> U+FFFD."""
        return _decode(self, ids)


def _known(version: str) -> str:
    require(version in VERSIONS, f"tokenizer version {version!r} is unknown; known are {', '.join(VERSIONS)}")
    return version


def _read_special(listed: list[dict] | None, count: int, version: str) -> dict[str, int]:
    """Name -> id of the `count` special tokens; those that the file does not list are called <SPECIAL_n>."""
    require(3 <= count <= MOST_SPECIAL, f"default_num_special_tokens should be 3 to {MOST_SPECIAL}, found {count}")
    if listed is None:
        require(version in ("v1", "v2", "v3", "v7"), f"a tokenizer of version {version} must list its special_tokens")
        listed = [{"rank": rank, "token_str": name} for rank, name in enumerate(CLASSIC_SPECIAL)]
    named = {entry["rank"]: entry["token_str"] for entry in listed}
    names = {rank: f"<SPECIAL_{rank}>" for rank in range(count)} | named
    special = {name: rank for rank, name in names.items()}
    distinct = len(special) == len(names) == count and len(named) == len(listed)
    require(distinct, f"special_tokens must have distinct names and distinct ranks from 0 to {count - 1}")
    return special


def _read_vocab(vocab: list[dict], count: int) -> list[bytes]:
    """The bytes of the first `count` tokens. The file may list more, for which the model has no ids."""
    vocab = vocab[:count]
    require(len(vocab) == count, "vocab and special tokens do not make up default_vocab_size")
    words = [base64.b64decode(entry["token_bytes"], validate=True) for entry in vocab]
    ordered = [entry["rank"] for entry in vocab] == list(range(count)) and len(set(words)) == count
    require(ordered, "vocab must list distinct tokens in the order of their ranks 0, 1, 2, …")
    single = [bytes([byte]) for byte in range(256)]
    require(words[:256] == single, "the first 256 tokens of vocab must be the single bytes in order")
    return words


def _read_settings(settings: dict | None, version: str) -> dict | None:
    belongs = (version == "v15") == (settings is not None)
    require(belongs, "a model_settings_builder belongs to version v15, and to no other")
    if effort := (settings or {}).get("reasoning_effort"):
        good = effort["default"] in effort["values"] and set(map(type, effort["values"])) == {str}
        require(good, f"reasoning_effort must list texts, and its default among them: {effort['values']}")
    return settings


# SentencePiece prints one U+FFFD for each invalid byte, Python's "replace" one for each broken character.
codecs.register_error("replace-each-byte", lambda error: ("\ufffd", error.start + 1))


class SentencePiece:
    """A tokenizer read from a SentencePiece model file; the same attributes and methods as Tekken.

    The version of the chat format is the file name's suffix (`tokenizer.model.v3`; `.v7m1` also takes images). For a
    plain `tokenizer.model` its control tokens tell. Raises UserError for a broken file.
    """

    utf8_errors = "replace-each-byte"
    model_settings = None

    def __init__(self, path: str):
        with reading(path, "SentencePiece model"):
            self._read(path)

    def _read(self, path: str) -> None:
        contents = read_file(path, LARGEST_FILE)
        require(contents, "the file is empty")  # it would load as an empty model
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=contents)
        self.vocab_size, self.bos_id, self.eos_id = model.vocab_size(), model.bos_id(), model.eos_id()
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else None
        pieces = [model.id_to_piece(id) for id in range(self.vocab_size)]
        self.special = {piece: id for id, piece in enumerate(pieces) if model.is_control(id)}
        suffix = re.search(r"\.model\.(v\d+)(m1)?$", path)
        self.version = _known(suffix[1] if suffix else self._guess_version())
        image = {"image_patch_size": 16, "max_image_size": 1024, "spatial_merge_size": 1}
        self.image = image if suffix and suffix[2] else None
        self._bytes = [self._bytes_of(id, piece) for id, piece in enumerate(pieces)]
        self._leading = self._find_leading(pieces)

    def _find_leading(self, pieces: list[str]) -> set[int]:
        """The pieces whose space goes where they begin a text: encode() puts one there, and most models take it off."""
        spaced = next((id for id, piece in enumerate(pieces) if re.match("▁[^▁]", piece)), None)
        if spaced is None or self._model.decode([spaced]).startswith(" "):
            return set()
        return {id for id, piece in enumerate(pieces) if piece.startswith("▁")}

    def _bytes_of(self, id: int, piece: str) -> bytes:
        """As SentencePiece decodes it."""
        if self._model.is_control(id):
            return b""
        if self._model.is_byte(id):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return (self._model.decode([id]) if id == self._model.unk_id() else piece.replace("▁", " ")).encode()

    def _guess_version(self) -> str:
        if "[SYSTEM_PROMPT]" in self.special:
            return "v7"
        return "v3" if "[AVAILABLE_TOOLS]" in self.special else "v1"

    def encode(self, text: str) -> list[int]:
        return self._model.encode(_well_formed(text))

    def is_special(self, id: int) -> bool:
        return 0 <= id < self.vocab_size and self._model.is_control(id)

    def token_bytes(self, id: int, first: bool) -> tuple[bytes, bool]:
        if not 0 <= id < self.vocab_size:
            return b"", False
        # Byte pieces may form a character together.
        return self._bytes[id][1 if first and id in self._leading else 0 :], self._model.is_byte(id)

    def decode(self, ids: list[int]) -> str:
        return _decode(self, ids)


def load_tokenizer(directory: str, config: Config | None = None) -> Tekken | SentencePiece:
    """The tokenizer of a checkpoint directory: `tekken.json`, else a SentencePiece `*.model` file, a versioned name
    (`tokenizer.model.v3`) before a plain one. Raises UserError if there is none, if it is broken, or if it and the
    model's `config` contradict each other."""
    names = sorted(os.listdir(find_folder(directory)))
    models = [name for name in names if re.search(r"\.model(\.v\d+(m\d+)?)?$", name)]
    if "tekken.json" in names:
        tokenizer = Tekken(os.path.join(directory, "tekken.json"))
    elif models:
        tokenizer = SentencePiece(os.path.join(directory, models[-1]))
    else:
        raise UserError(f"{directory} has no tokenizer: expected tekken.json or a SentencePiece tokenizer.model")
    if config is not None:
        _check_config(tokenizer, config, directory)
    return tokenizer


def _check_config(tokenizer: "Tekken | SentencePiece", config: Config, directory: str) -> None:
    pairs = []  # (name, in the tokenizer, in the config)
    if vision := config.vision:
        image = tokenizer.image or {}
        pairs = [
            ("image_token_index", tokenizer.special.get("[IMG]"), vision.image_token_id),
            ("image_patch_size", image.get("image_patch_size"), vision.patch_size),
            ("spatial_merge_size", image.get("spatial_merge_size"), vision.spatial_merge_size),
        ]
    wrong = [f"{name} is {a} in the tokenizer but {b} in the config" for name, a, b in pairs if a not in (None, b)]
    if tokenizer.vocab_size > config.vocab_size:
        wrong.insert(0, f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}")
    require(not wrong, f"{directory}: {''.join(wrong[:1])}; they do not belong together")


class StreamDecoder:
    """Decodes ids one by one as they are generated. The pieces of text, put together, are `tokenizer.decode(ids)`.

    A character whose bytes are spread over several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tekken | SentencePiece):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.utf8_errors)
        self._first = True  # no ordinary token yet

    def add(self, id: int) -> str:
        """The text that this token completes, often "" in the middle of a character."""
        data, joins = self._tokenizer.token_bytes(id, self._first)
        if 0 <= id < self._tokenizer.vocab_size and not self._tokenizer.is_special(id):
            self._first = False
        held = "" if joins else self.flush()
        return held + self._utf8.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD for a character that will not be completed, else ""."""
        return self._utf8.decode(b"", final=True)


def _decode(tokenizer: Tekken | SentencePiece, ids: list[int]) -> str:
    stream = StreamDecoder(tokenizer)
    return "".join(map(stream.add, ids)) + stream.flush()


LAST_BMP, LAST_UNICODE = 0xFFFF, 0x10FFFF  # code points; the Basic Multilingual Plane holds nearly all living scripts

# What \s means to Rust, and to Unicode. Python's also matches \x1c to \x1f.
WHITE_SPACE = ((0x9, 0xD), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A))
WHITE_SPACE += ((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000))

# Letters, marks and numbers that Unicode 15 and 16 added, as ranges of hexadecimal code points. An older Python takes
# them for unassigned; listing them gives every Python the words of the reference, which knows Unicode 16.
NEW_IN_UNICODE_16 = {
    "Lu": "1c89 a7cb-a7cc a7da a7dc 10d50-10d65",
    "Ll": "1c8a a7cd a7db 10d70-10d85 1df25-1df2a",
    "Lm": "10d4e 10d6f 16d40-16d42 16d6b-16d6c 1e030-1e06d 1e4eb",
    "Lo": "105c0-105f3 10d4a-10d4d 10d4f 10ec2-10ec4 1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 "
    "11bc0-11be0 11f02 11f04-11f10 11f12-11f33 1342f 13441-13446 13460-143fa 16100-1611d 16d43-16d6a 18cff 1b132 1b155 "
    "1e4d0-1e4ea 1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af",
    "Mn": "897 ece 10d69-10d6d 10efc-10eff 11241 113bb-113c0 113ce 113d0 113d2 113e1-113e2 11f00-11f01 11f36-11f3a "
    "11f40 11f42 11f5a 13440 13447-13455 1611e-16129 1612d-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef",
    "Mc": "cf3 113b8-113ba 113c2 113c5 113c7-113ca 113cc-113cd 113cf 11f03 11f34-11f35 11f3e-11f3f 11f41 1612a-1612c",
    "Nd": "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1e4f0-1e4f9 1e5f1-1e5fa",
    "No": "1d2c0-1d2d3",
}


@cache
def _categories() -> dict[str, list[tuple[int, int]]]:
    """Unicode general category ("Lu", "Nd", …) -> ascending inclusive ranges of code points."""
    category = list(map(unicodedata.category, map(chr, range(LAST_UNICODE + 1))))
    for name, ranges in NEW_IN_UNICODE_16.items():
        for span in ranges.split():
            first, _, last = span.partition("-")
            for code in range(int(first, 16), int(last or first, 16) + 1):
                if category[code] == "Cn":  # unassigned
                    category[code] = name
    ranges, start = {}, 0
    for name, run in groupby(category):
        end = start + sum(1 for _ in run)
        ranges.setdefault(name, []).append((start, end - 1))
        start = end
    return ranges


@cache
def _class_body(name: str, negated: bool, last: int) -> str:
    """What stands between the brackets of a Python character class for white space ("s") or a general category ("Lu",
    or "L" for all that begin so), or for its complement, over the code points up to `last`."""
    if name == "s":
        ranges = list(WHITE_SPACE)
    else:
        ranges = sorted(r for category, found in _categories().items() if category.startswith(name) for r in found)
    require(ranges, f"the pattern uses \\p{{{name}}}, but only general categories such as L or Lu are supported")
    if negated:
        starts = [0] + [end + 1 for _, end in ranges]
        ends = [start - 1 for start, _ in ranges] + [LAST_UNICODE]
        ranges = [(start, end) for start, end in zip(starts, ends) if start <= end]
    return "".join(f"\\U{start:08x}-\\U{min(end, last):08x}" for start, end in ranges if start <= last)


# A pattern is cut into character classes and what stands between them; a "]" right after "[" or "[^" is a member.
CLASS_OR_REST = re.compile(r"\[\^?\]?(?:\\.|[^\\\]])*\]?|(?:\\.|[^\\\[])+|.", re.DOTALL)

ESCAPE = re.compile(r"\\(?:([pP])(?:\{(\w+)\}|([A-Z]))|([sS])|.)", re.DOTALL)

# Rust has nested classes, intersections and differences; `re` would read the same signs as characters.
NOT_IN_CLASS = re.compile(r"(?<=.)\[|&&|--|~~", re.DOTALL)

# Where Rust takes linear time, `re` may take for ever: (a*)*b tries every way to cut a run of a's.
REPEATED_GROUP = re.compile(r"\)[*+{]")


def python_pattern(pattern: str, last: int = LAST_UNICODE) -> str:
    """A Rust regular expression rewritten for Python's `re`: `\\p{..}`, `\\P{..}`, `\\s` and `\\S` spelled out, in and
    out of brackets, for text whose code points do not exceed `last`. Raises UserError for what `re` cannot say."""
    fits = len(pattern) <= LONGEST_PATTERN
    require(fits, f"the pattern has more than {LONGEST_PATTERN} characters, which is not supported")
    out = []
    for chunk in CLASS_OR_REST.findall(pattern):
        is_class = chunk.startswith("[")
        bare = ESCAPE.sub("_", chunk)
        if found := (NOT_IN_CLASS if is_class else REPEATED_GROUP).search(bare):
            what = f"has {found[0]!r} inside a character class" if is_class else "repeats a group"
            raise UserError(f"the pattern {what}, which is not supported: {pattern!r}")
        out.append(ESCAPE.sub(partial(_spelled_out, "{}" if is_class else "[{}]", last), chunk))
    return "".join(out)


def _spelled_out(form: str, last: int, escape: re.Match) -> str:
    letter, name, short, space = escape.groups()
    if not letter and not space:
        return escape[0]
    return form.format(_class_body(name or short or "s", (letter or space).isupper(), last))


@cache
def _word_pattern(pattern: str, last: int) -> re.Pattern:
    """The rewritten pattern, compiled. `re` looks a character up in a table inside the BMP but walks through a list of
    ranges beyond it, so that a pattern confined to the BMP is ten times as fast; most texts need no other."""
    return re.compile(python_pattern(pattern, last))
