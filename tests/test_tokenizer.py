"""Tokenizers against recorded ids of mistral-common (golden files), against mistral-common itself where installed,
and against rules of their own: streaming, speed, broken files."""

import base64
import codecs
import copy
import importlib.util
import json
import os
import random
import re
import shutil
import time

import pytest
from chat_cases import TEXTS, write_tekken
from helpers import layout_config, text_fields, vision_fields

from runtime.config import parse_config
from runtime.files import UserError
from runtime.tokenizer import GPT2, KIND, KINDS, PATTERN, SentencePiece, StreamDecoder, Tekken, load_tokenizer, words

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
SMALL_TEKKEN = os.path.join(GOLDEN, "tokenizer_tekken.json")
SMALL_SPM = os.path.join(GOLDEN, "tokenizer_spm.model")


@pytest.fixture(scope="module")
def golden() -> dict:
    with open(os.path.join(GOLDEN, "tokenizer_golden.json"), encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def small() -> dict:
    return {"tekken-v3": Tekken(SMALL_TEKKEN), "spm-v7": SentencePiece(SMALL_SPM)}


def real_file(name: str) -> str:
    """A tokenizer file bundled with mistral-common."""
    pytest.importorskip("mistral_common")
    return os.path.join(os.path.dirname(importlib.util.find_spec("mistral_common").origin), "data", name)


def random_text(rng: random.Random, astral: bool = True) -> str:
    """Characters from a few random blocks: ASCII, white space and controls, letters that change class, anything."""
    draw = [
        lambda: chr(rng.randrange(32, 127)),
        lambda: rng.choice(" \n\t\r\x0b\x0c\x00\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000\u200b"),
        lambda: chr(rng.randrange(0xA0, 0x3000)),
        lambda: chr(rng.randrange(0x3000, 0xD800)),
        lambda: chr(rng.randrange(0xE000, 0x10000)),
        lambda: rng.choice("'sStT \n/ǅʰªÀaA٣½_\u0301"),
    ]
    if astral:
        draw += [lambda: chr(rng.randrange(0x10000, 0x20000)), lambda: chr(rng.randrange(0x20000, 0x110000))]
    chosen = rng.sample(draw, rng.randint(1, 4))
    return "".join(rng.choice(chosen)() for _ in range(rng.randint(1, 60)))


# ---- ids and text


@pytest.mark.parametrize("name", ["tekken-v3", "spm-v7"])
def test_golden_ids_and_text(name, golden, small):
    for text, ids in golden["texts"][name]:
        assert small[name].encode(text) == ids, text
    for ids, text in golden["decoded"][name]:
        assert small[name].decode(ids) == text, ids


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_equals_mistral_common(name):
    path = real_file(name)
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    mine, theirs = Tekken(path), Tekkenizer.from_file(path)
    assert (mine.vocab_size, mine.bos_id, mine.eos_id, mine.pad_id) == (theirs.n_words, 1, 2, 11)
    assert mine.special == {theirs.id_to_piece(id): id for id in range(1000)}
    rng = random.Random(name)
    for text in TEXTS + [random_text(rng) for _ in range(3000)]:
        ids = theirs.encode(text, bos=False, eos=False)
        assert mine.encode(text) == ids, ascii(text)
    for _ in range(3000):
        ids = [rng.randrange(*rng.choice([(0, 131072), (990, 1260)])) for _ in range(rng.randint(0, 30))]
        assert mine.decode(ids) == theirs.decode(ids), ids


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "240323.model.v3", "241114.model.v7", "241114.model.v7m1"])
def test_sentencepiece_equals_mistral_common(name):
    path = real_file(name if name.startswith("tokenizer") else "mistral_instruct_tokenizer_" + name)
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    mine, theirs = SentencePiece(path), SentencePieceTokenizer(path)
    assert mine.version == theirs.version.value == mine._guess_version()
    assert (mine.vocab_size, mine.bos_id, mine.eos_id, mine.pad_id) == (theirs.n_words, 1, 2, None)
    assert set(mine.special.values()) == theirs.special_ids
    space = theirs.get_special_token("▁")
    rng = random.Random(name)
    for _ in range(1000):
        text = random_text(rng)
        ids = theirs.encode(text, bos=False, eos=False)
        assert mine.encode(text) == ids, ascii(text)
        assert mine.decode(ids) == theirs.decode(ids)
        ids = [
            rng.choice([rng.randrange(mine.vocab_size), rng.randrange(1100), space]) for _ in range(rng.randint(0, 30))
        ]
        assert mine.decode(ids) == theirs.decode(ids), ids


def test_a_whole_word_in_the_vocabulary_is_one_token(tmp_path):
    """Even where no merge leads to it. Only a pattern that knows letters beyond the BMP cuts no word in the second."""

    def change(data):
        for rank, word in ((1400, "xqz"), (1401, "a\U00010428")):
            data["vocab"][rank]["token_bytes"] = base64.b64encode(word.encode()).decode()

    tokenizer = Tekken(changed_tekken(tmp_path, change))
    assert tokenizer.encode("xqz") == [1464] and tokenizer.encode("a\U00010428") == [1465]
    assert len(tokenizer.encode("xqzx")) > 1


@pytest.mark.parametrize("name", ["tekken-v3", "spm-v7"])
def test_text_never_becomes_a_special_token(name, small):
    tokenizer = small[name]
    for special in tokenizer.special:
        ids = tokenizer.encode(f"a{special} {special}")
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == f"a{special} {special}"


@pytest.mark.parametrize("name", ["tekken-v3", "spm-v7"])
def test_round_trip_and_lone_surrogates(name, small):
    rng = random.Random(1)
    for _ in range(500):
        text = random_text(rng)
        assert small[name].decode(small[name].encode(text)) == text
    assert small[name].encode("a\ud800b\ud83d\ude42") == small[name].encode("a\ufffdb🙂")


def test_ids_beyond_the_vocabulary_are_left_out(small):
    for tokenizer in small.values():
        ids = tokenizer.encode("left out")
        assert tokenizer.decode([-5, tokenizer.vocab_size, *ids, 10**9, tokenizer.eos_id]) == "left out"


# ---- streaming


@pytest.mark.parametrize("name", ["tekken-v3", "spm-v7"])
def test_streamed_pieces_make_up_the_decoded_text(name, small):
    tokenizer = small[name]
    rng = random.Random(2)
    bytes_of = [tokenizer.encode(character)[-3:] for character in "é🙂北\x00ж\u0301"]
    for _ in range(2000):
        ids = [rng.randrange(-2, tokenizer.vocab_size + 5) for _ in range(rng.randint(0, 8))]
        for _ in range(rng.randint(0, 8)):
            ids += rng.choice(bytes_of)[: rng.randint(1, 3)]
        rng.random() < 0.5 and rng.shuffle(ids)
        stream = StreamDecoder(tokenizer)
        assert "".join([stream.add(id) for id in ids]) + stream.flush() == tokenizer.decode(ids)
        assert stream.flush() == ""


@pytest.mark.parametrize("name", ["tekken-v3", "spm-v7"])
def test_a_character_over_several_tokens_appears_whole(name, small):
    tokenizer = small[name]
    text = "Ж🙂北京 👩‍👩‍👧 नमस्ते"
    stream = StreamDecoder(tokenizer)
    pieces = [stream.add(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert "" in pieces and stream.flush() == ""


def test_an_unfinished_character_is_flushed(small):
    for tokenizer in small.values():
        stream = StreamDecoder(tokenizer)
        printed = [stream.add(id) for id in tokenizer.encode("a🙂")[:-1]]
        assert "".join(printed) == "a"
        assert set(stream.flush()) == {"\ufffd"}


# ---- the pattern


def test_every_character_is_of_its_kind():
    """What PATTERN tells apart of all of Unicode, by the engine that it was written for."""
    tiktoken = pytest.importorskip("tiktoken")
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    whites = r"[\t\x0b\x0c\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
    expected = {r"[\p{Lu}\p{Lt}]": "A", r"\p{Ll}": "a", r"[\p{Lm}\p{Lo}]": "o", r"\p{M}": "~", r"\p{N}": "0"}
    for pattern, kind in {**expected, r"[\r\n]": "\n", whites: "\t"}.items():
        engine = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=SINGLE, special_tokens={})
        found = engine.decode(engine.encode_ordinary(everything))
        assert found == "".join(c for c in everything if KINDS[ord(c)] == kind), pattern
    assert KINDS[ord("/")] == "/" and KINDS[ord(" ")] == " " and set(KINDS.values()) == {*KIND.values(), *" \n\t/."}


@pytest.mark.parametrize("pattern", [PATTERN, GPT2])
@pytest.mark.parametrize("seed", range(6))
def test_words_as_the_engine_cuts_them(seed, pattern):
    """Drawn texts, by the engine that the patterns were written for, with every word a token."""
    tiktoken = pytest.importorskip("tiktoken")
    draw = random.Random(seed)
    some = "ab sdmtlverSDZ' '\t\n\r/.-~09" + "\u00b2\u00df\u01c5\u00aa\u00e9\u0435\u0301\u6f22\u3000\x1c\U0001f600"
    for _ in range(300):
        text = "".join(draw.choice(some) for _ in range(draw.randint(1, 25)))
        found = list(words(text, pattern))
        assert "".join(found) == text
        longer = [word.encode() for word in dict.fromkeys(found) if len(word.encode()) > 1]
        ranks = {**SINGLE, **{word: 256 + i for i, word in enumerate(longer)}}
        engine = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        cut = [engine.decode_single_token_bytes(id).decode() for id in engine.encode_ordinary(text)]
        assert cut == found, text


SINGLE = {bytes([byte]): byte for byte in range(256)}


def test_words():
    text = "Hello wORLD's 12 ǅx e\u0301\u0301 --\r\n/\n  x\u3000\x1c \n\t y  "
    assert list(words(text)) == [
        *("Hello", " w", "ORLD", "'s", " ", "1", "2", " ǅx", " e\u0301\u0301", " --\r\n/\n", " ", " x", "\u3000"),
        *("\x1c", " \n", "\t", " y", "  "),
    ]


def test_letters_newer_than_this_python():
    """Code points of Unicode 15 and 16, whatever `unicodedata` knows."""
    assert [KINDS[code] for code in (0x1C89, 0xA7CD, 0x31350, 0x897, 0x1E4F5)] == ["A", "a", "o", "~", "0"]


@pytest.mark.parametrize(
    "pattern", [r"\p{L}+", "(a*)*b", "a*a*a*a*a*a*b|[^b]", "(" * 5000, "*", "", None, 3, [PATTERN]]
)
def test_other_patterns(pattern, tmp_path):
    """None is tried: `re` could take for ever over a text."""
    with pytest.raises(UserError, match="tekken.json: the pattern is neither that of Mistral's"):
        Tekken(changed_tekken(tmp_path, lambda data: data["config"].update(pattern=pattern)))


# ---- speed


def test_opening_a_full_size_file_is_fast(tmp_path):
    rng = random.Random(3)
    words = {bytes([byte]): None for byte in range(256)}
    while len(words) < 150_000:
        words[rng.randbytes(rng.randint(2, 9))] = None
    with open(SMALL_TEKKEN, encoding="utf-8") as file:
        data = json.load(file)
    data["vocab"] = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": "x"}
        for rank, word in enumerate(words)
    ]
    data["config"] |= {"default_vocab_size": 131072, "default_num_special_tokens": 1000}
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    start = time.process_time()
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.encode("Hello 🙂 world")
    assert time.process_time() - start < 2  # seconds; about 0.7
    assert tokenizer.vocab_size == 131072


def test_encoding_english_is_fast(small):
    words = (
        "the of and to in is that it was for on are as with they be at one have this from or had by hot but some what"
    )
    rng = random.Random(4)
    made_up = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
    text = " ".join(rng.choice(words.split()) if rng.random() < 0.7 else rng.choice(made_up) for _ in range(200_000))
    start = time.process_time()
    small["tekken-v3"].encode(text)
    assert len(text) / (time.process_time() - start) > 0.5e6  # bytes per second; in fact several million


def test_more_words_than_the_cache_holds(small):
    text = " ".join(f"{chr(97 + n % 26)}x{chr(97 + n // 26 % 26)}q{chr(0x4E00 + n // 676)}z" for n in range(60_000))
    assert small["tekken-v3"].decode(small["tekken-v3"].encode(text)) == text


def test_long_words_take_linear_time(small):
    """Words of 200 kB: quadratic merging would take minutes."""
    rng = random.Random(5)
    for word in ["a" * 200_000, "".join(rng.choices("etaoin", k=200_000)), " " * 200_000, "北" * 60_000, "A" * 200_000]:
        start = time.process_time()
        ids = small["tekken-v3"].encode(word)
        assert time.process_time() - start < 5  # seconds; about 0.5
        assert small["tekken-v3"].decode(ids) == word


# ---- files


def changed_tekken(tmp_path, change) -> str:
    with open(SMALL_TEKKEN, encoding="utf-8") as file:
        data = json.load(file)
    change(data)
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(data))
    return str(path)


def settings(values: list) -> dict:
    return {"reasoning_effort": {"type": "enum", "default": "none", "values": values}}


def set_first(**entry):
    return lambda data: data["vocab"][0].update(**entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("vocab"),
        lambda data: data.pop("config"),
        lambda data: data.update(vocab=data["vocab"][:1000]),
        lambda data: data.update(vocab=data["vocab"][::-1]),
        lambda data: data.update(vocab="abc"),
        set_first(token_bytes="not base64!"),
        set_first(token_bytes=None),
        set_first(rank=7),
        lambda data: data["vocab"][300].update(token_bytes=data["vocab"][301]["token_bytes"]),
        lambda data: data["config"].update(version="v99"),
        lambda data: data["config"].update(version="v11"),  # would have to list its special tokens
        lambda data: data["config"].update(default_vocab_size="many"),
        lambda data: data["config"].update(default_num_special_tokens=1),
        lambda data: data.update(special_tokens=[{"rank": 0, "token_str": "<s>"}, {"rank": 0, "token_str": "</s>"}]),
        lambda data: data.update(special_tokens=[{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "<s>"}]),
        lambda data: data.update(special_tokens=[{"rank": 99999, "token_str": "<s>"}]),
        lambda data: data.update(special_tokens=[{"rank": 0, "token_str": "<unk>"}]),  # no <s>
        lambda data: data.update(model_settings_builder={}),
        lambda data: (data["config"].update(version="v15"), data.update(model_settings_builder=settings(["none", 3]))),
        lambda data: (data["config"].update(version="v15"), data.update(model_settings_builder=settings(["high"]))),
    ],
)
def test_broken_tekken_files(change, tmp_path):
    with pytest.raises(UserError, match="tekken.json") as caught:
        Tekken(changed_tekken(tmp_path, change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def tekken_fields(data: dict) -> list[tuple]:
    """The paths of what a Tekken file says, but for its tokens and most of its special ones."""
    sections = ("config",), ("image",), ("model_settings_builder",), ("model_settings_builder", "reasoning_effort")
    paths = [(name,) for name in data] + [("special_tokens", 1), ("special_tokens", 1, "rank")]
    for section in sections:
        at = data
        for name in section:
            at = at[name]
        paths += [(*section, name) for name in at]
    return paths


ODD = (0, -1, -300, 1.0, 0.5, False, True, "", "5", [], {}, [[]], ["none"], 10**12)


def test_what_is_falsy_or_of_another_type_is_not_taken_for_absent(tmp_path):
    """Each field with each odd value: one line, or the same tokenizer."""
    write_tekken(SMALL_TEKKEN, str(tmp_path), "v15")
    whole, path = json.loads((tmp_path / "tekken.json").read_text()), tmp_path / "tekken.json"
    valid, refused = vars(load_tokenizer(str(tmp_path))), 0
    told = "vocab_size", "_num_special", "special", "image", "model_settings", "_pattern", "version"
    for *section, name in tekken_fields(whole):
        for value in ODD:
            data = copy.deepcopy(whole)
            at = data
            for key in section:
                at = at[key]
            at[name] = value
            path.write_text(json.dumps(data))
            try:
                found = vars(load_tokenizer(str(tmp_path)))
            except UserError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                same = {key: found[key] for key in told} == {key: valid[key] for key in told}
                unread = name in ("num_vocab_tokens", "is_control", "token_str", "type")
                fewer = (name, value) in (("model_settings_builder", {}), ("values", ["none"]))
                assert same or unread or fewer, (section, name, value)
    assert refused > 100


def test_unknown_settings(tmp_path, capsys):
    """Those of pictures and of the model would change the tokens: refused. What other readers pass over is named."""
    write_tekken(SMALL_TEKKEN, str(tmp_path), "v15")
    path = tmp_path / "tekken.json"
    whole = json.loads(path.read_text())
    for section in ("image", "model_settings_builder"):
        path.write_text(json.dumps(whole | {section: whole[section] | {"overlap": 3}}))
        with pytest.raises(UserError, match=f"{section}: overlap = 3 is not supported"):
            load_tokenizer(str(tmp_path))
    path.write_text(json.dumps(whole | {"multimodal": whole["image"]}))
    with pytest.raises(UserError, match="both image and multimodal"):
        load_tokenizer(str(tmp_path))
    assert capsys.readouterr().err == ""
    path.write_text(json.dumps(whole | {"config": whole["config"] | {"lowercase": True, "unk": None}}))
    load_tokenizer(str(tmp_path))
    assert capsys.readouterr().err == f"WARNING: {path}: lowercase = True is not known here and changes nothing\n"


def test_a_byte_order_mark(tmp_path):
    for version in ("v3", "v15"):
        path = write_tekken(SMALL_TEKKEN, str(tmp_path), version)
        valid = load_tokenizer(str(tmp_path))
        with open(path, "rb") as file:
            text = file.read()
        with open(path, "wb") as file:
            file.write(codecs.BOM_UTF8 + text)
        assert load_tokenizer(str(tmp_path)).special == valid.special


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000])
def test_files_that_are_not_json(text, tmp_path):
    (tmp_path / "tekken.json").write_bytes(text)
    with pytest.raises(UserError, match="tekken.json"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_larger_than_the_model(tmp_path):
    write_tekken(SMALL_TEKKEN, str(tmp_path), "v15")
    size = load_tokenizer(str(tmp_path)).vocab_size
    for enough in (size, size + 1):
        assert load_tokenizer(str(tmp_path), parse_config(text_fields(vocab_size=enough))).vocab_size == size
    message = f"{tmp_path}: the tokenizer has {size} tokens but the model only {size - 1}; they do not belong together"
    with pytest.raises(UserError, match=re.escape(message)):
        load_tokenizer(str(tmp_path), parse_config(text_fields(vocab_size=size - 1)))


def test_tokenizer_of_other_images(tmp_path):
    """Another [IMG], another patch or merge size: the images' tokens would stand elsewhere."""
    write_tekken(SMALL_TEKKEN, str(tmp_path), "v15")
    tower = vision_fields(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=1540
    )
    raw = layout_config(text_fields(vocab_size=1564, vision_config=tower), "new")[1]
    load_tokenizer(str(tmp_path), parse_config(raw))
    wrong = [raw | dict(image_token_index=11), raw | dict(spatial_merge_size=1)]
    wrong += [raw | dict(vision_config=tower | change) for change in (dict(patch_size=16), dict(image_size=1400))]
    names = "image_token_index = 10", "spatial_merge_size = 2", "image_patch_size = 14", "max_image_size = 1540"
    for raw, name in zip(wrong, names):
        with pytest.raises(UserError, match=f"do not belong together: {name}"):
            load_tokenizer(str(tmp_path), parse_config(raw))


@pytest.mark.parametrize("name, mine", [("bos_token_id", 1), ("eos_token_id", 2)])
def test_tokenizer_of_other_ends(name, mine, tmp_path):
    """A model that ends its answers by another token would never be seen to end. A list may name several."""
    write_tekken(SMALL_TEKKEN, str(tmp_path), "v15")
    sizes = dict(vocab_size=1564)
    for good in (mine, None, [mine], [20, mine, 7]):
        load_tokenizer(str(tmp_path), parse_config(text_fields(**sizes, **{name: good})))
        load_tokenizer(str(tmp_path), parse_config(dict(text_config=text_fields(**sizes)) | {name: good}))
    for bad in (mine + 1, [], [20, 7], str(mine), -1, {}):
        with pytest.raises(UserError, match=f"do not belong together: {name} = "):
            load_tokenizer(str(tmp_path), parse_config(text_fields(**sizes, **{name: bad})))


def test_counts_are_not_believed(tmp_path):
    """They are compared with what is there before anything of their size is built."""
    for counts in (dict(default_num_special_tokens=10**12), dict(default_vocab_size=10**12), dict.fromkeys(
        ("default_num_special_tokens", "default_vocab_size"), 10**12
    )):  # fmt: skip
        with pytest.raises(UserError, match="tekken.json: .*(default_num_special_tokens|default_vocab_size)"):
            Tekken(changed_tekken(tmp_path, lambda data: data["config"].update(counts)))


def test_missing_tokenizer_and_broken_sentencepiece(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with open(SMALL_SPM, "rb") as file:
        whole = file.read()
    for content in (b"", b"garbage", whole[:-100]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model"):
            load_tokenizer(str(tmp_path))


def test_which_file_and_version(tmp_path):
    def version(*names: str) -> str:
        for name in names:
            shutil.copy(SMALL_SPM, tmp_path / name)
        return load_tokenizer(str(tmp_path)).version

    assert version("tokenizer.model") == "v7"  # it has [SYSTEM_PROMPT]
    assert version("tokenizer.model.v3") == "v3"
    assert load_tokenizer(str(tmp_path)).image is None
    assert version("tokenizer.model.v7m1") == "v7"
    assert load_tokenizer(str(tmp_path)).image == {
        "image_patch_size": 16,
        "max_image_size": 1024,
        "spatial_merge_size": 1,
    }
    write_tekken(SMALL_TEKKEN, str(tmp_path), "v15")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.version == "v15" and tokenizer.model_settings["reasoning_effort"]["default"] == "none"
    assert tokenizer.image == {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    assert tokenizer.special["[THINK]"] == 34 and tokenizer.special["<SPECIAL_50>"] == 50
    assert len(tokenizer.special) == 64 and tokenizer.vocab_size == 1564
