"""The parser of replies: by hand, against what encode_chat writes, and a rule that holds however tokens are cut."""

import json
import os
import random
import re

import pytest
from chat_cases import TEKKEN_VERSIONS, copy_spm, write_tekken

from runtime.chat import Reply, ReplyParser, encode_chat
from runtime.tokenizer import load_tokenizer

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
NAMES = [*(f"tekken-{version}" for version in TEKKEN_VERSIONS), "spm-v3", "spm-v7"]
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """name -> tokenizer, from the small files in tests/golden."""
    root = str(tmp_path_factory.mktemp("small"))
    for version in TEKKEN_VERSIONS:
        write_tekken(os.path.join(GOLDEN, "tokenizer_tekken.json"), f"{root}/tekken-{version}", version)
    for version in ("v3", "v7"):
        copy_spm(os.path.join(GOLDEN, "tokenizer_spm.model"), f"{root}/spm-{version}", f"tokenizer.model.{version}")
    return {name: load_tokenizer(f"{root}/{name}") for name in NAMES}


def parse(tokenizer, ids: list[int], **options) -> Reply:
    """The reply; what was streamed is checked to be its very texts."""
    parser = ReplyParser(tokenizer, **options)
    pieces = [piece for id in ids for piece in parser.add(id)] + parser.finish()
    assert all(text for _, text in pieces)
    for kind, whole in (("text", parser.reply.text), ("reasoning", parser.reply.reasoning or "")):
        assert "".join(text for k, text in pieces if k == kind) == whole
    return parser.reply


def ids_of(tokenizer, spelled: str) -> list[int]:
    """The ids of a text in which special tokens stand by name."""
    special = tokenizer.special
    parts = re.split(r"(\[/?[A-Z_]+\]|</s>)", spelled)
    return [id for part in parts for id in ([special[part]] if part in special else tokenizer.encode(part))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end_token", [True, False])
def test_it_reads_what_encode_chat_writes(name, end_token, small):
    tokenizer = small[name]
    calls = [
        {"id": "abcdefgh1", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "n": [1, 2.5, None]}}},
        {"id": "abcdefgh2", "function": {"name": "x", "arguments": {}}},
    ]
    arguments = [{"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in calls]

    def parsed(**answer):
        encoded = encode_chat(tokenizer, [USER, {"role": "assistant", **answer}], training=True)
        ids = [id for id, target in zip(encoded.ids, encoded.targets) if target]
        reply = parse(tokenizer, ids if end_token else ids[:-1])
        return reply.text, reply.reasoning, reply.tool_calls

    assert parsed(content="Ja, 🙂 [INST]") == ("Ja, 🙂 [INST]", None, [])
    assert parsed(tool_calls=calls) == ("", None, arguments)
    if not name.endswith("v3"):
        assert parsed(content="wait", tool_calls=calls) == ("wait", None, arguments)
    if name in ("tekken-v13", "tekken-v15"):
        assert parsed(content="4", reasoning="2 + 2") == ("4", "2 + 2", [])
        assert parsed(content="4", reasoning="", tool_calls=calls) == ("4", "", arguments)


CALL = '{"name": "f", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("generated", "text", "reasoning", "calls"),
    [
        ("", "", None, []),
        ("a</s>", "a", None, []),
        ("[THINK]not finish", "", "not finish", []),
        ("[THINK]a[/THINK]b[THINK]c[/THINK]d", "bd", "ac", []),
        ("nothing opened[/THINK]b", "nothing openedb", None, []),
        ("[TOOL_CALLS]f[ARGS]", "", None, [("f", "")]),
        ('[TOOL_CALLS]f[ARGS]{"a": ', "", None, [("f", '{"a": ')]),
        ('[TOOL_CALLS]f[ARGS]{"a": NaN}', "", None, [("f", '{"a": NaN}')]),
        ('[TOOL_CALLS]f[ARGS]{"a": 1e999}', "", None, [("f", '{"a": 1e999}')]),
        ('[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1.5}', "", None, [("f", {"a": 1.5})]),
        ('[TOOL_CALLS]f[ARGS]1[CALL_ID]abc', "", None, [("f", 1)]),
        ("[TOOL_CALLS]f[/THINK][ARGS]1", "", None, [("f", 1)]),
        # What is no call stays in the text.
        ("[TOOL_CALLS]f", "f", None, []),
        ("[TOOL_CALLS]I cannot do that.", "I cannot do that.", None, []),
        ("x[TOOL_CALLS]two words[ARGS]{}", "xtwo words{}", None, []),
        ('[TOOL_CALLS][{"name": "f", "argu', '[{"name": "f", "argu', None, []),
        ('[TOOL_CALLS][{"name": "not a name"}]', '[{"name": "not a name"}]', None, []),
        ('[TOOL_CALLS][{"name": 7}]', '[{"name": 7}]', None, []),
        # The older formats write a list; text may stand around it.
        ('x[TOOL_CALLS][{"name": "f"}]', "x", None, [("f", {})]),
        (f"[TOOL_CALLS]Well: [{CALL}, {CALL}] Done.", "Well:  Done.", None, [("f", {"a": 1})] * 2),
        ("[ARGS]text[CALL_ID][INST]", "text", None, []),
    ],
)  # fmt: skip
def test_odd_replies(generated, text, reasoning, calls, small):
    tokenizer = small["tekken-v15"]
    reply = parse(tokenizer, ids_of(tokenizer, generated))
    assert (reply.text, reply.reasoning) == (text, reasoning)
    assert [(call["name"], call["arguments"]) for call in reply.tool_calls] == calls


def test_a_thought_that_the_prompt_opened(small):
    tokenizer = small["tekken-v15"]
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "2 +", "closed": False}]}
    opened = encode_chat(tokenizer, [USER, {**thought, "prefix": True}]).thinks
    closed = encode_chat(tokenizer, [USER, {**thought, "content": "so"}, USER]).thinks
    assert opened and not closed
    for generated, text, reasoning in (
        (" 2", "", " 2"),
        (" 2[/THINK]4", "4", " 2"),
        (" 2[/THINK]4[THINK]!", "4", " 2!"),
    ):
        assert parse(tokenizer, ids_of(tokenizer, generated), thinks=opened) == Reply(text, reasoning, [])
    assert parse(tokenizer, ids_of(tokenizer, "4"), thinks=closed) == Reply("4", None, [])
    # Raw text has no thoughts: special tokens are left out, and all else is text.
    assert parse(tokenizer, ids_of(tokenizer, " 2[/THINK]4[TOOL_CALLS]f"), raw=True) == Reply(" 24f")


@pytest.mark.parametrize(
    ("stop", "generated", "text"),
    [
        (["t", "a"], "yellow star", "yellow s"),
        (["a", "t"], "yellow star", "yellow s"),
        (["abc", "b"], "xabcd", "xa"),
        (["bc", "abc"], "xabcd", "xa"),  # complete at the same character: the first listed
        (["abc", "bc"], "xabcd", "x"),
        (["aab"], "aaab", "a"),
        (["ar\n"], "star", "star"),  # begun and never complete
        (["6"], "[THINK]= 6.[/THINK]7", "7"),  # reasoning does not count
        ([".6"], "[THINK]= 6.[/THINK]6", "6"),  # nor do text and reasoning together
        (["</s>"], "a</s>", "a"),
        (["f"], "[TOOL_CALLS]f[ARGS]{}", ""),
    ],
)
def test_stop_strings(stop, generated, text, small):
    tokenizer = small["tekken-v15"]
    assert parse(tokenizer, ids_of(tokenizer, generated), stop=stop).text == text


def expected_text(text: str, stop: list[str]) -> tuple[str, bool]:
    """The rule itself: character by character."""
    for end in range(1, len(text) + 1):
        for s in stop:
            if text[:end].endswith(s):
                return text[: end - len(s)], True
    return text, False


class Pieces:
    """A tokenizer whose tokens are whatever pieces of UTF-8 a test wants; the first are special."""

    eos_id = 0
    special = {name: id for id, name in enumerate(["</s>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"])}

    def __init__(self):
        self.pieces = [b""] * len(self.special)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[id] for id in ids).decode(errors="replace")

    def cut(self, text: str, draw: random.Random) -> list[int]:
        """The ids of `text`, cut anywhere, in the middle of characters too."""
        data, ids = text.encode(), []
        at = sorted({0, len(data), *(draw.randint(0, len(data)) for _ in range(draw.randint(0, 6)))})
        for start, stop in zip(at, at[1:]):
            ids.append(len(self.pieces))
            self.pieces.append(data[start:stop])
        return ids


def test_however_it_is_cut_into_tokens():
    """Random replies and stop strings over few letters, each reply in several ways of cutting it into tokens."""
    draw, stopped = random.Random(5), 0
    for _ in range(2000):
        tokenizer = Pieces()
        mark = tokenizer.special
        text, thought, more = ("".join(draw.choices([*"aabct .", "🙂", "é"], k=draw.randint(0, 14))) for _ in range(3))
        stop = ["".join(draw.choices([*"aabct .", "🙂"], k=draw.randint(1, 3))) for _ in range(draw.randint(0, 3))]
        wanted, hit = expected_text(text + more, stop)
        stopped += hit
        for _ in range(3):
            thinks = [mark["[THINK]"], *tokenizer.cut(thought, draw), mark["[/THINK]"]]
            calls = [mark["[TOOL_CALLS]"], *tokenizer.cut("f", draw), mark["[ARGS]"], *tokenizer.cut('{"é": 1}', draw)]
            parts = [tokenizer.cut(text, draw), thinks, tokenizer.cut(more, draw)]
            reply = parse(tokenizer, [id for part in parts for id in part] + calls, stop=stop)
            assert reply.text == wanted, (text, more, stop)
            in_text = expected_text(text, stop)[1]  # then nothing after it is read
            assert reply.reasoning == (None if in_text else thought)
            assert reply.tool_calls == ([] if hit else [{"name": "f", "arguments": {"é": 1}}])
    assert 500 < stopped < 1800


@pytest.mark.parametrize("name", ["tekken-v3", "tekken-v15", "spm-v7"])
def test_white_space_around_a_name(name, small):
    """Is not the function's; inside a name it makes what is said no call."""
    tokenizer, draw = small[name], random.Random(name)
    for i in range(30):
        spaces = ["".join(draw.choices(" \n\t\r\u00a0", k=draw.randint(0, 3))) for _ in range(2)]
        called = draw.choice(("f", "get_weather", "a-1"))
        said = called.join(spaces)
        listed = json.dumps([{"name": said, "arguments": {"a": i}}])
        spelled = f'[TOOL_CALLS]{said}[ARGS]{{"a": {i}}}' if "[ARGS]" in tokenizer.special else f"[TOOL_CALLS]{listed}"
        assert parse(tokenizer, ids_of(tokenizer, spelled)) == Reply(
            "", None, [{"name": called, "arguments": {"a": i}}]
        )
    inside = parse(tokenizer, ids_of(tokenizer, spelled.replace(called, "a b")))
    assert inside.tool_calls == [] and "a b" in inside.text


@pytest.mark.parametrize("name", ["tekken-v3", "tekken-v15", "spm-v7"])
def test_it_never_raises(name, small):
    tokenizer = small[name]
    rng = random.Random(name)
    pieces = ['[{"name": "f", "arguments": {}}]', "[[[", "[" * 2000, "[{" * 2000, '{"a": 1}', "9" * 5000, "[1, 2]"]
    pieces = [tokenizer.encode(piece) for piece in [*pieces, '"\\ud800"', "é", '[{"name": "f", "arguments": 1e999}]']]
    for _ in range(200):
        ids = []
        for _ in range(rng.randint(0, 12)):
            drawn = [rng.randrange(40)], [rng.randrange(-3, tokenizer.vocab_size + 3)], rng.choice(pieces)
            ids += rng.choice(drawn)
        reply = parse(tokenizer, ids, stop=rng.choice([[], ["a"], ["1", "é"]]))
        assert all(call.keys() == {"name", "arguments"} for call in reply.tool_calls)
        json.dumps(reply.tool_calls, allow_nan=False)
