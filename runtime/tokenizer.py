"""Text to token ids and back, for the two kinds of tokenizer that Mistral checkpoints ship.

**Tekken** (`tekken.json`, all newer checkpoints) is byte-level BPE. A regular expression cuts the text into words; the
UTF-8 bytes of each word are merged pair by pair, always the pair whose merged bytes have the lowest rank in the
vocabulary, until no pair is in it. An id is a rank plus the number of special tokens, which come first. All files that
Mistral has published cut words in the same way, `PATTERN`; other expressions than that and GPT-2's are refused.

**SentencePiece** (`tokenizer.model`, `tokenizer.model.v3`, …; checkpoints up to v7) is read with the package of that
name.

Special tokens (`[INST]`, `</s>`, …) never arise from text: a user who types `[INST]` gets ordinary tokens, and only
chat.py places control tokens, by id. The ids equal those of mistral-common for every file and text.
"""

import base64
import heapq
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, product

import sentencepiece

from model import Config
from runtime.files import MEGABYTE, Fields, UserError, find_folder, read_file, read_json, reading, require

LARGEST_FILE = 1024 * MEGABYTE

VERSIONS = ("v1", "v2", "v3", "v7", "v11", "v13", "v15")  # each has its own chat format

# Tekken files up to v7 do not list their special tokens: these twenty apply, in the order of their ids.
CLASSIC_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()

KNOWN = {"pattern", "num_vocab_tokens", "default_vocab_size", "default_num_special_tokens", "version"}

# The settings of pictures, in pixels and patches, with what their absence means.
IMAGE = {"image_patch_size": None, "max_image_size": None, "spatial_merge_size": 1}


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, replaced by U+FFFD (and halves of a pair joined)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """What both kinds share.

    version: chat format, "v3" to "v15". vocab_size: number of ids. special: name of control token -> id. image:
    {"image_patch_size", "max_image_size", "spatial_merge_size"} in pixels and patches, or None.
    """

    model_settings: dict | None = None  # the `model_settings_builder` of a Tekken file (v15)


class Tekken(Tokenizer):
    """A byte-level BPE tokenizer read from `tekken.json`. Its special ids are below all others. Raises UserError for a
    broken file."""

    def __init__(self, path: str):
        with reading(path, "Tekken file"):
            data = read_json(path, LARGEST_FILE)
            self._read(data)
            Fields(data["config"], path).say_strangers(KNOWN)

    def _read(self, data: dict) -> None:
        config = Fields(data["config"], "config")
        config.only(version=VERSIONS)
        self.version, self.vocab_size = config.get("version", str), config.size("default_vocab_size")
        self._num_special = config.size("default_num_special_tokens")
        self.special = _read_special(data.get("special_tokens"), self._num_special, self.version)
        self.bos_id, self.eos_id, self.pad_id = self.special["<s>"], self.special["</s>"], self.special.get("<pad>")
        vocab = _read_vocab(data["vocab"], self.vocab_size - self._num_special)
        self.token_bytes = [b""] * self._num_special + vocab
        self._ids = {word: id for id, word in enumerate(vocab, self._num_special)}
        self.image = _read_image(Fields(data, "the file"))
        self.model_settings = _read_settings(data.get("model_settings_builder"), self.version)
        self._pattern = config.values.get("pattern")
        known = isinstance(self._pattern, str) and self._pattern in CUTS
        require(known, "the pattern is neither that of Mistral's Tekken files nor GPT-2's; no other is supported")
        self._merge_cached = lru_cache(50_000)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; no <s> is added, and text that spells a special token is only text."""
        ids = []
        for word in words(_well_formed(text), self._pattern):
            # Few words are longer than 64 characters, and remembering those could fill the memory.
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

    def decode(self, ids: list[int]) -> str:
        """The text of the ids. Special tokens and ids beyond the vocabulary are left out; invalid UTF-8 -> U+FFFD."""
        text = ""
        for ordinary, run in groupby(ids, range(self._num_special, self.vocab_size).__contains__):
            data = b"".join(self.token_bytes[id] for id in run) if ordinary else b""
            text += data.decode(errors="replace")  # of each run on its own: special tokens end a character
        return text


def _read_special(listed: list[dict] | None, count: int, version: str) -> dict[str, int]:
    """Name -> id of the `count` special tokens; those that the file does not list are called <SPECIAL_n>."""
    if listed is None:
        require(version in ("v1", "v2", "v3", "v7"), f"a tokenizer of version {version} must list its special_tokens")
        listed = [{"rank": rank, "token_str": name} for rank, name in enumerate(CLASSIC_SPECIAL)]
    entries = [Fields(entry, f"special_tokens[{i}]") for i, entry in enumerate(listed)]
    listed = [(entry.get("rank", int), entry.get("token_str", str)) for entry in entries]
    names = {rank: f"<SPECIAL_{rank}>" for rank in range(count)} | dict(listed)
    special = {name: rank for rank, name in names.items()}
    distinct = len(special) == len(names) == count and len(dict(listed)) == len(listed)
    require(distinct, f"special_tokens must have distinct names and distinct ranks from 0 to {count - 1}")
    require({"<s>", "</s>"} <= set(special), "special_tokens must name <s> and </s>")
    return special


def _read_image(file: Fields) -> dict | None:
    """The settings of pictures; older files have them under another name."""
    image, older = file.section("image"), file.section("multimodal")
    require(image is None or older is None, "has both image and multimodal; remove the one that is out of date")
    image = image or older
    if image is None:
        return None
    strangers = image.strangers(IMAGE)
    require(not strangers, f"image: {strangers} is not supported; known are {', '.join(IMAGE)}")
    return {name: image.size(name, default) for name, default in IMAGE.items()}


def _read_vocab(vocab: list[dict], count: int) -> list[bytes]:
    """The bytes of the first `count` tokens. The file may list more, for which the model has no ids."""
    need = "default_vocab_size - default_num_special_tokens"
    require(count >= 256, f"{need} = {count}, but there are 256 bytes, which are tokens all of them")
    vocab = vocab[:count]
    ordered = [entry["rank"] for entry in vocab] == list(range(count))
    require(ordered, f"vocab must list {count} tokens ({need}) in the order of their ranks 0, 1, 2, …")
    tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in vocab]
    require(len(set(tokens)) == count, "the tokens of vocab must be distinct")
    require(b"".join(tokens[:256]) == bytes(range(256)), "the first 256 tokens of vocab must be the bytes in order")
    return tokens


def _read_settings(settings: dict | None, version: str) -> dict | None:
    belongs = (version == "v15") == (settings is not None)
    require(belongs, "a model_settings_builder belongs to version v15, and to no other")
    if settings is None:
        return None
    builder = Fields(settings, "model_settings_builder")
    strangers = builder.strangers(("reasoning_effort", "json_schema"))
    if effort := builder.section("reasoning_effort"):
        effort.only(type=("enum",), accepts_none=(True,))
        strangers = strangers or effort.strangers(("type", "accepts_none", "default", "values"))
        default, values = effort.get("default", str), effort.get("values", list)
        good = default in values and set(map(type, values)) == {str}
        require(good, f"reasoning_effort must list texts, and its default among them: {values}")
    require(not strangers, f"model_settings_builder: {strangers} is not supported")
    return settings


class SentencePiece(Tokenizer):
    """A tokenizer read from a SentencePiece model file.

    The version of the chat format is the file name's suffix (`tokenizer.model.v3`; `.v7m1` also takes images). For a
    plain `tokenizer.model` its control tokens tell. Raises UserError for a broken file.
    """

    def __init__(self, path: str):
        with reading(path, "SentencePiece model"):
            self._read(path)

    def _read(self, path: str) -> None:
        contents = read_file(path, LARGEST_FILE)
        require(contents, "the file is empty")  # it would load as an empty model
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=contents)
        self.vocab_size, self.bos_id, self.eos_id = model.vocab_size(), model.bos_id(), model.eos_id()
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else None
        self.special = {model.id_to_piece(id): id for id in range(self.vocab_size) if model.is_control(id)}
        suffix = re.search(r"\.model\.(v\d+)(m1)?$", path)
        self.version = suffix[1] if suffix else self._guess_version()
        image = {"image_patch_size": 16, "max_image_size": 1024, "spatial_merge_size": 1}
        self.image = image if suffix and suffix[2] else None

    def _guess_version(self) -> str:
        if "[SYSTEM_PROMPT]" in self.special:
            return "v7"
        return "v3" if "[AVAILABLE_TOOLS]" in self.special else "v1"

    def encode(self, text: str) -> list[int]:
        return self._model.encode(_well_formed(text))

    def decode(self, ids: list[int]) -> str:
        """As Tekken's, but each invalid byte becomes a U+FFFD."""
        return self._model.decode([id for id in ids if 0 <= id < self.vocab_size])


def load_tokenizer(directory: str, config: Config | None = None) -> Tokenizer:
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


def _check_config(tokenizer: Tokenizer, config: Config, directory: str) -> None:
    sizes = f"{tokenizer.vocab_size} tokens but the model only {config.vocab_size}"
    fits = tokenizer.vocab_size <= config.vocab_size
    require(fits, f"{directory}: the tokenizer has {sizes}; they do not belong together")
    strangers = f"{directory}: tokenizer and model do not belong together"
    ends = ("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)
    for fields, (name, mine) in product((config.raw, config.raw.get("text_config", {})), ends):
        said = fields.get(name)  # a list may name several; here the chat format's one ends an answer
        fits = said is None or mine in (said if isinstance(said, list) else [said])
        require(fits, f"{strangers}: {name} = {said!r}, but the tokenizer's is {mine}")
    if vision := config.vision:
        image = {**(tokenizer.image or {}), "image_token_index": tokenizer.special.get("[IMG]")}
        fields = Fields(image, strangers)
        fields.agree("image_token_index", vision.image_token_id, "the model's")
        fields.agree("image_patch_size", vision.patch_size, "the model's")
        fields.agree("spatial_merge_size", vision.spatial_merge_size, "the model's")
        fields.agree("max_image_size", vision.image_size, "the model's image_size")


class StreamDecoder:
    """Decodes ids one by one as they are generated. The pieces of text, put together, are `tokenizer.decode(ids)`.

    A character whose bytes are spread over several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the last ones: what is held back, and one whose text is out
        self._out = 0  # characters of their text that are out

    def add(self, id: int) -> str:
        """The text that this token completes, often "" in the middle of a character."""
        self._ids.append(id)
        text = self._decode(self._ids)
        # What lacks bytes shows as U+FFFD at the end, one or, in SentencePiece, one for each of up to three bytes.
        certain = max(len(text.rstrip("\ufffd")), len(text) - 3)
        new, self._out = text[self._out : certain], max(self._out, certain)
        if new and certain == len(text):
            # A character ends here, so earlier tokens no longer matter. This one stays, since SentencePiece takes the
            # space off the first.
            self._ids, self._out = [id], len(self._decode([id]))
        return new

    def flush(self) -> str:
        """The rest: U+FFFD for a character that will not be completed, else ""."""
        text = self._decode(self._ids)
        rest, self._out = text[self._out :], len(text)
        return rest


# How every Tekken file that Mistral has published cuts text into words, in the words of Rust's regex engine; and how
# GPT-2 does, with single digits, which vocabularies from elsewhere bring along when they are rewritten as Tekken files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The same for Python's `re`, which knows no \p{L}: one character stands for all that a pattern treats alike. "A" is
# upper and title case, "a" lower case, "o" other letters, "~" marks, "0" numbers, "\n" both line breaks, "\t" other
# white space, " " and "/" themselves, "." the rest. GPT-2's names an apostrophe and some letters.
WORD = re.compile(r"[^\nAao0]?[Ao~]*[ao~]+|[^\nAao0]?[Ao~]+[ao~]*|0| ?[^\sAao0]+[\n/]*|\s*\n+|\s+(?!\S)|\s+")
NAMED = "'sdmtlver"
GPT2_WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[Aaosdmtlver]+|0| ?[^\sAaosdmtlver0]+|\s+(?!\S)|\s+")

KIND = {"Lu": "A", "Lt": "A", "Ll": "a", "Lm": "o", "Lo": "o"}  # Unicode's general category -> what stands for it
KIND |= {"Mn": "~", "Mc": "~", "Me": "~", "Nd": "0", "Nl": "0", "No": "0"}

# Letters, marks and numbers that Unicode 15 and 16 added, as ranges of hexadecimal code points. An older Python takes
# them for unassigned; listing them gives every Python the words of the reference, which knows Unicode 16.
NEW_IN_UNICODE_16 = {
    "A": "1c89 a7cb-a7cc a7da a7dc 10d50-10d65",
    "a": "1c8a a7cd a7db 10d70-10d85 1df25-1df2a",
    "o": "105c0-105f3 10d4a-10d4f 10d6f 10ec2-10ec4 1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 "
    "11bc0-11be0 11f02 11f04-11f10 11f12-11f33 1342f 13441-13446 13460-143fa 16100-1611d 16d40-16d6c 18cff 1b132 1b155 "
    "1e030-1e06d 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af",
    "~": "897 cf3 ece 10d69-10d6d 10efc-10eff 11241 113b8-113c0 113c2 113c5 113c7-113ca 113cc-113d0 113d2 113e1-113e2 "
    "11f00-11f01 11f03 11f34-11f3a 11f3e-11f42 11f5a 13440 13447-13455 1611e-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef",
    "0": "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 "
    "1e5f1-1e5fa",
}


class Kinds(dict):
    """Code point -> the character that stands for it in WORD. Filled as characters come up. `named` are themselves."""

    def __init__(self, named: str = ""):
        super().__init__({0xA: "\n", 0xD: "\n", 0x20: " ", 0x2F: "/"})
        self.update(dict.fromkeys(range(0x1C, 0x20), "."))  # white space to Python, but not to Rust and Unicode
        for kind, ranges in NEW_IN_UNICODE_16.items():
            for span in ranges.split():
                first, _, last = span.partition("-")
                self.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), kind))
        self.update({ord(character): character for character in named})

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = "\t" if character.isspace() else KIND.get(unicodedata.category(character), ".")
        return self[code]


KINDS = Kinds()
CUTS = {PATTERN: (WORD, KINDS), GPT2: (GPT2_WORD, Kinds(NAMED))}


def words(text: str, pattern: str = PATTERN) -> Iterator[str]:
    """The words of a text without lone surrogates, as `pattern` cuts it. Together they are the text."""
    word, kinds = CUTS[pattern]
    for match in word.finditer(text.translate(kinds)):
        yield text[match.start() : match.end()]
