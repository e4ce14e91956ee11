"""Chat formats against ids of mistral-common, recorded (golden files) and live, and against expectations by hand."""

import importlib.util
import json
import os
import random
import re

import pytest
from chat_cases import (
    MODEL_SETTINGS,
    TEKKEN_VERSIONS,
    TEXTS,
    TOOLS,
    copy_spm,
    grid_of,
    oracle,
    random_chat,
    write_tekken,
)

from runtime.chat import encode_chat
from runtime.files import UserError
from runtime.tokenizer import load_tokenizer

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
NAMES = [*(f"tekken-{version}" for version in TEKKEN_VERSIONS), "spm-v3", "spm-v7", "spm-v7m1"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """name -> tokenizer of every chat format, from the small files in tests/golden."""
    root = str(tmp_path_factory.mktemp("small"))
    for version in TEKKEN_VERSIONS:
        write_tekken(os.path.join(GOLDEN, "tokenizer_tekken.json"), f"{root}/tekken-{version}", version)
    for version in ("v3", "v7", "v7m1"):
        copy_spm(os.path.join(GOLDEN, "tokenizer_spm.model"), f"{root}/spm-{version}", f"tokenizer.model.{version}")
    return {name: load_tokenizer(f"{root}/{name}") for name in NAMES}


def spelled(tokenizer, ids: list[int]) -> str:
    """The ids as text, with the special tokens by name."""
    names = {id: name for name, id in tokenizer.special.items()}
    return "".join(names[id] if id in names else tokenizer.decode([id]) for id in ids)


def runs(tokenizer, encoded) -> list[tuple[bool, str]]:
    """Runs of neighbouring ids with the same target flag, spelled."""
    found = []
    for id, target in zip(encoded.ids, encoded.targets, strict=True):
        if not found or found[-1][0] != target:
            found.append((target, []))
        found[-1][1].append(id)
    return [(target, spelled(tokenizer, ids)) for target, ids in found]


# ---- mistral-common


@pytest.mark.parametrize("name", NAMES)
def test_golden_chats(name, small):
    tokenizer = small[name]
    grid = grid_of(tokenizer.image) if tokenizer.image else None
    with open(os.path.join(GOLDEN, "tokenizer_golden.json"), encoding="utf-8") as file:
        chats = [(chat, ids) for case, chat, ids in json.load(file)["chats"] if case == name]
    assert len(chats) >= 3
    for chat, ids in chats:
        assert encode_chat(tokenizer, **chat, image_grid=grid).ids == ids, json.dumps(chat)


@pytest.fixture(scope="module")
def real_files(tmp_path_factory) -> dict:
    """name -> path of a full-size tokenizer file for every chat format."""
    pytest.importorskip("mistral_common")
    data = os.path.join(os.path.dirname(importlib.util.find_spec("mistral_common").origin), "data")
    root = str(tmp_path_factory.mktemp("real"))
    paths = {f"tekken-{v}": write_tekken(f"{data}/tekken_240911.json", f"{root}/{v}", v) for v in TEKKEN_VERSIONS}
    for version, date in {"v3": "240323", "v7": "241114", "v7m1": "241114"}.items():
        source = f"mistral_instruct_tokenizer_{date}.model.{version}"
        paths[f"spm-{version}"] = copy_spm(f"{data}/{source}", f"{root}/spm-{version}", source)
    return paths


@pytest.mark.parametrize("name", NAMES)
def test_chats_equal_mistral_common(name, real_files):
    pytest.importorskip("cv2")
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = real_files[name]
    tokenizer = load_tokenizer(os.path.dirname(path))
    theirs = [MistralTokenizer.from_file(path, mode) for mode in (ValidationMode.test, ValidationMode.finetuning)]
    grid = grid_of(tokenizer.image) if tokenizer.image else None
    # mistral-common does not take lone surrogates with SentencePiece
    texts = [text for text in TEXTS if "tekken" in name or not re.search("[\ud800-\udfff]", text)]
    rng = random.Random(name)
    for case in range(60):
        training = case % 3 == 0
        chat = random_chat(rng, tokenizer.version, bool(tokenizer.image), training, texts)
        assert encode_chat(tokenizer, **chat, image_grid=grid).ids == oracle(theirs[training], chat), json.dumps(chat)


# ---- formats and loss mask, by hand

ANSWER = {"role": "assistant", "content": "fine "}
CALLS = [
    {"id": "abcdefgh1", "function": {"name": "f", "arguments": '{"x":1}'}},
    {"id": "abcdefgh2", "function": {"name": "g", "arguments": {}}},
]
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "abcdefgh2", "content": "two"},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": '{"y":  1}'},
    ANSWER,
    {"role": "user", "content": "bye"},
    ANSWER,
]
TOOL = [{"type": "function", "function": {"name": "f"}}]
SPELLED_TOOL = (
    '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]'
    "[/AVAILABLE_TOOLS]"
)
LIST = '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefgh1"}, '
LIST += '{"name": "g", "arguments": {}, "id": "abcdefgh2"}]</s>'
PLAIN = '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}</s>'
WITH_IDS = '[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]abcdefgh2[ARGS]{}</s>'
RESULT_1 = '[TOOL_RESULTS]abcdefgh1[TOOL_CONTENT]{"y":  1}[/TOOL_RESULTS]'
RESULT_2 = "[TOOL_RESULTS]abcdefgh2[TOOL_CONTENT]two[/TOOL_RESULTS]"
JSON_RESULTS = '[TOOL_RESULTS]{"content": "two", "call_id": "abcdefgh2"}[/TOOL_RESULTS]'
JSON_RESULTS += '[TOOL_RESULTS]{"content": {"y": 1}, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'
PLAIN_RESULTS = '[TOOL_RESULTS]{"y":  1}[/TOOL_RESULTS][TOOL_RESULTS]two[/TOOL_RESULTS]'
SYSTEM = "<s>[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT]"
SETTINGS = '[MODEL_SETTINGS]{"reasoning_effort": "none"}[/MODEL_SETTINGS]'
EXPECTED = {
    "v3": [
        "<s>[INST]hi[/INST]",
        LIST,
        JSON_RESULTS,
        "fine</s>",
        f"{SPELLED_TOOL}[INST]be kind\n\nbye[/INST]",
    ],
    "v7": [f"{SYSTEM}[INST]hi[/INST]", LIST, RESULT_2 + RESULT_1, "fine</s>", f"{SPELLED_TOOL}[INST]bye[/INST]"],
    "v11": [f"{SYSTEM}[INST]hi[/INST]", WITH_IDS, RESULT_1 + RESULT_2, "fine</s>", f"{SPELLED_TOOL}[INST]bye[/INST]"],
    "v13": [f"{SYSTEM}{SPELLED_TOOL}[INST]hi[/INST]", PLAIN, PLAIN_RESULTS, "fine</s>", "[INST]bye[/INST]"],
    "v15": [f"{SYSTEM}{SPELLED_TOOL}{SETTINGS}[INST]hi[/INST]", PLAIN, PLAIN_RESULTS, "fine</s>", "[INST]bye[/INST]"],
}


@pytest.mark.parametrize("version", TEKKEN_VERSIONS)
def test_format_and_loss_mask(version, small):
    tokenizer = small[f"tekken-{version}"]
    encoded = encode_chat(tokenizer, CHAT, TOOL, training=True)
    texts = [*EXPECTED[version], "fine</s>"]
    assert runs(tokenizer, encoded) == [(i % 2 == 1, text) for i, text in enumerate(texts)]


def test_loss_covers_thinking_and_what_follows_a_join(small):
    tokenizer = small["tekken-v15"]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]},
        {"role": "assistant", "content": "more", "tool_calls": CALLS[1:]},
        {"role": "tool", "tool_call_id": "abcdefgh2", "content": ""},
        {"role": "assistant", "reasoning": "so", "content": "end "},
    ]
    settings = '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]'
    assert runs(tokenizer, encode_chat(tokenizer, messages, reasoning_effort="high", training=True)) == [
        (False, f"<s>{settings}[INST]ab\n\nc[/INST]"),
        (True, "[THINK]hm[/THINK]yes\n\nmore[TOOL_CALLS]g[ARGS]{}</s>"),
        (False, "[TOOL_RESULTS][/TOOL_RESULTS]"),
        (True, "[THINK]so[/THINK]end </s>"),
    ]


def test_a_chat_may_begin_with_an_answer(small):
    messages = [{"role": "system", "content": "be kind"}, ANSWER, {"role": "user", "content": "hi"}]
    expected = {
        "tekken-v3": "<s>[INST][/INST]fine</s>[INST]be kind\n\nhi[/INST]",
        "tekken-v13": "<s>[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT]fine</s>[INST]hi[/INST]",
    }
    for name, text in expected.items():
        assert spelled(small[name], encode_chat(small[name], messages).ids) == text


def test_a_prefix_is_left_open(small):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am ", "prefix": True}]
    assert spelled(small["tekken-v7"], encode_chat(small["tekken-v7"], messages).ids) == "<s>[INST]hi[/INST]I am"
    messages[1]["content"] = [{"type": "thinking", "thinking": "hm", "closed": False}]
    ids = encode_chat(small["tekken-v13"], messages).ids
    assert spelled(small["tekken-v13"], ids) == "<s>[INST]hi[/INST][THINK]hm"


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_whether_the_reply_begins_in_a_thought(prefix, closed, small):
    """Only where the last message is to be continued, and a thought in it is open."""
    text, thought = {"type": "text", "text": "so"}, {"type": "thinking", "thinking": "hm", "closed": closed}
    for content in ([thought], [text, thought], [text]):
        answer = {"role": "assistant", "content": content, "prefix": prefix}
        encoded = encode_chat(small["tekken-v15"], [USER, answer], training=not prefix)
        assert encoded.thinks == (prefix and not closed and thought in content)


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_images(small):
    tokenizer = small["tekken-v15"]
    sizes = {"a": (2, 3), "b": (1, 1), "c": (3, 1)}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "see"}, image("a")]},
        {"role": "assistant", "tool_calls": CALLS[:1]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": [{"type": "text", "text": "x"}, image("b")]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [image("c"), {"type": "text", "text": "and"}, image("a")]},
    ]
    encoded = encode_chat(tokenizer, messages, image_grid=sizes.__getitem__)
    a = "[IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]"
    b, c = "[IMG][IMG_END]", "[IMG][IMG_BREAK][IMG][IMG_BREAK][IMG][IMG_END]"
    assert encoded.images == ["a", "b", "c", "a"]
    assert spelled(tokenizer, encoded.ids) == (
        f'<s>{SETTINGS}[INST]{a}see[/INST][TOOL_CALLS]f[ARGS]{{"x": 1}}</s>[TOOL_RESULTS]x{b}[/TOOL_RESULTS]'
        f"ok</s>[INST]{c}and{a}[/INST]"
    )
    with pytest.raises(UserError, match=r"messages\[0\].*takes no images"):
        encode_chat(tokenizer, messages)
    with pytest.raises(UserError, match=r"messages\[2\]: content\[1\].*tool messages hold no parts of type image_url"):
        encode_chat(small["tekken-v13"], messages, image_grid=sizes.__getitem__)


def test_input_is_not_changed(small):
    before = json.dumps(CHAT)
    for name in NAMES:
        encode_chat(small[name], CHAT, TOOLS, training=True)
    assert json.dumps(CHAT) == before


# ---- reasoning effort


def test_reasoning_effort(small):
    user = [{"role": "user", "content": "hi"}]
    default = encode_chat(small["tekken-v15"], user).ids
    assert default == encode_chat(small["tekken-v15"], user, reasoning_effort="none").ids
    assert default != encode_chat(small["tekken-v15"], user, reasoning_effort="high").ids
    with pytest.raises(UserError, match="'medium'.*none, high"):
        encode_chat(small["tekken-v15"], user, reasoning_effort="medium")
    for name in ("tekken-v13", "spm-v3"):
        assert encode_chat(small[name], user, reasoning_effort="none").ids == encode_chat(small[name], user).ids
        with pytest.raises(UserError, match="'high'.*no such setting"):
            encode_chat(small[name], user, reasoning_effort="high")
    assert MODEL_SETTINGS == small["tekken-v15"].model_settings


# ---- mistakes

USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "tool_calls": CALLS[:1]}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "x"}


def call(**changes) -> list:
    return [USER, {"role": "assistant", "tool_calls": [{**CALLS[0], **changes}]}, RESULT]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (None, "messages should be a list"),
        ([], "messages should be a list"),
        ({"role": "user"}, "messages should be a list"),
        (["hi"], r"messages\[0\]: should be an object"),
        ([{"content": "hi"}], r"messages\[0\]: unknown role None"),
        ([USER, {"role": "robot", "content": "hi"}], r"messages\[1\]: unknown role 'robot'"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\]: unknown role"),
        ([{"role": "user"}], r"messages\[0\]: content should be"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: content should be"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\]: content\[0\]: a part must have the type"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"content\[0\]: a part must have the type.*'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: a part of type 'text' needs a string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "needs a string under 'image_url'"),
        ([{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}], "user messages hold no parts"),
        ([{"role": "system", "content": [image("a")]}, USER], "system messages hold no parts of type image_url"),
        ([USER, {"role": "assistant", "content": [image("a")]}, USER], "assistant messages hold no parts"),
        ([USER, RESULT], r"messages\[1\]: tool_call_id 'abcdefgh1' is not that of a tool call"),
        ([USER, ANSWER, RESULT], r"messages\[2\]: tool_call_id 'abcdefgh1' is not that of a tool call that waits"),
        ([USER, CALL, RESULT, RESULT], r"messages\[3\]: tool_call_id 'abcdefgh1' is not that of"),
        ([USER, CALL, {"role": "tool", "content": "x"}], r"messages\[2\]: a tool message needs the tool_call_id"),
        (
            [USER, CALL, {**RESULT, "tool_call_id": 7}],
            r"messages\[2\]: the tool call id 7 should be a string that is not empty",
        ),
        ([USER, CALL, {**RESULT, "name": "a b"}], r"messages\[2\]: the function name 'a b'"),
        ([USER, CALL, USER, ANSWER, USER], r"messages\[2\]: 1 of the tool calls before it have no result"),
        (
            [USER, CALL, {"role": "system", "content": "x"}],
            r"messages\[2\]: a system message cannot follow one of role assistant",
        ),
        ([USER, {"role": "assistant", "tool_calls": 1}], r"messages\[1\]: tool_calls should be a list"),
        (call(function={}), r"messages\[1\]: tool_calls\[0\]: function: the field 'arguments' is missing"),
        (call(function={"name": "f", "arguments": [1]}), r"tool_calls\[0\]: arguments should be"),
        (call(function={"name": "f g", "arguments": ""}), r"tool_calls\[0\]: the function name 'f g'"),
        (call(id=None), r"messages\[1\]: each tool call needs an id"),
        (call(id=""), r"tool_calls\[0\]: the tool call id '' should be a string that is not empty"),
        ([USER, {"role": "assistant", "tool_calls": CALLS[:1] * 2}, RESULT], "each tool call needs an id of its own"),
        ([USER, {"role": "assistant"}, USER], r"messages\[1\] has neither content nor tool_calls"),
        ([USER, ANSWER], "messages end with role assistant; to be answered"),
        ([{"role": "system", "content": "x"}], "messages end with role system; to be answered"),
        ([USER, {**ANSWER, "prefix": True}, USER], r"messages\[1\]: only the last message may have"),
    ],
)
def test_bad_messages(messages, error, small):
    with pytest.raises(UserError, match=error) as caught:
        encode_chat(small["tekken-v15"], messages, image_grid=lambda url: (1, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({}, "tools should be a list"),
        (["x"], r"tools\[0\]: a tool: expected a JSON object"),
        ([TOOL[0], {"type": "function"}], r"tools\[1\]: a tool: the field 'function' is missing"),
        (
            [{"type": "retrieval", "function": {"name": "f"}}],
            r"tools\[0\]: a tool: type = 'retrieval' is not supported",
        ),
        ([{"function": {}}], r"tools\[0\]: function: the field 'name' is missing"),
        ([{"function": {"name": "f", "parameters": "x"}}], r"tools\[0\]: function: parameters should be dict"),
        ([{"function": {"name": "f", "description": 1}}], r"tools\[0\]: function: description should be str"),
    ],
)
def test_bad_tools(tools, error, small):
    with pytest.raises(UserError, match=error):
        encode_chat(small["tekken-v15"], [USER], tools)


def test_what_older_versions_cannot_say(small):
    both = [USER, {**CALL, "content": "text"}, RESULT]
    with pytest.raises(UserError, match=r"messages\[1\] has content and tool_calls"):
        encode_chat(small["tekken-v3"], both)
    encode_chat(small["tekken-v7"], both)
    long_id = json.loads(json.dumps([USER, CALL, RESULT]).replace("abcdefgh1", "call_1"))
    with pytest.raises(UserError, match=r"messages\[1\]: tool_calls\[0\].*nine letters or digits"):
        encode_chat(small["tekken-v11"], long_id)
    encode_chat(small["tekken-v13"], long_id)
    with pytest.raises(UserError, match=r"messages\[1\].*no parts of type thinking"):
        encode_chat(small["tekken-v11"], [USER, {**ANSWER, "reasoning": "hm"}, USER])


def test_training_ends_with_an_answer(small):
    for messages in ([USER], [USER, CALL, RESULT], [{"role": "system", "content": "x"}]):
        with pytest.raises(UserError, match="for training they must end with an assistant message"):
            encode_chat(small["tekken-v15"], messages, training=True)
    with pytest.raises(UserError, match="prefix"):
        encode_chat(small["tekken-v15"], [USER, {**ANSWER, "prefix": True}], training=True)
    # only the last answer's calls may lack ids, and only where ids are optional
    last = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": None}}]}]
    ids = encode_chat(small["tekken-v3"], last, training=True).ids
    assert spelled(small["tekken-v3"], ids) == '<s>[INST]hi[/INST][TOOL_CALLS][{"name": "f", "arguments": {}}]</s>'
    with pytest.raises(UserError, match="needs an id"):
        encode_chat(small["tekken-v13"], last, training=True)


def test_tokenizers_without_a_chat_format(small, tmp_path):
    copy_spm(os.path.join(GOLDEN, "tokenizer_spm.model"), str(tmp_path), "tokenizer.model.v1")
    with pytest.raises(UserError, match="v1 has no supported chat format"):
        encode_chat(load_tokenizer(str(tmp_path)), [USER])
    # a version whose control tokens the file does not have
    path = write_tekken(os.path.join(GOLDEN, "tokenizer_tekken.json"), str(tmp_path), "v13")
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    data["special_tokens"] = data["special_tokens"][:3]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)
    with pytest.raises(UserError, match=r"no \[INST\] token"):
        encode_chat(load_tokenizer(str(tmp_path)), [USER])


# ---- what messages may say


TWO_CALLS = [
    {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}},
    {"id": "abcdefgh2", "function": {"name": "g", "arguments": {"a": 1}}},
]


def result(id: str, text: str = "r") -> dict:
    return {"role": "tool", "tool_call_id": id, "content": text}


def test_forms_that_mean_the_same(small):
    """OpenAI's newer role, the API's form of thinking, empty keys that clients send, our own output fed back."""
    tokenizer = small["tekken-v15"]

    def ids(*messages: dict) -> list[int]:
        return encode_chat(tokenizer, list(messages)).ids

    assert ids({"role": "developer", "content": "s"}, USER) == ids({"role": "system", "content": "s"}, USER)
    thought = {"type": "thinking", "thinking": "abc"}
    parts = {"type": "thinking", "thinking": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]}
    answers = [{"role": "assistant", "content": [t, {"type": "text", "text": "x"}]} for t in (thought, parts)]
    assert ids(USER, answers[0], USER) == ids(USER, answers[1], USER)
    sent = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []}
    assert ids(USER, {"role": "assistant", "content": "x", **sent}, USER) == ids(
        USER, {"role": "assistant", "content": "x", "name": "me"}, USER
    )
    ours = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]
    unnamed = [{"role": "tool", "content": text} for text in "pq"]
    assert ids(USER, {"role": "assistant", "content": "", "tool_calls": ours}, *unnamed) == ids(
        USER, {"role": "assistant", "tool_calls": TWO_CALLS}, result("abcdefgh1", "p"), result("abcdefgh2", "q")
    )


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_is_not_trained_on(name, small):
    tokenizer = small[name]

    def chat(*weights) -> tuple[list[int], list[bool]]:
        turns = [[USER, {"role": "assistant", "content": f"answer {w}", "weight": w}] for w in weights]
        encoded = encode_chat(tokenizer, [message for turn in turns for message in turn], training=True)
        return encoded.ids, encoded.targets

    for weights in ((1, 0, 1), (0, 1), (None, 0), (0, 0)):
        ids, targets = chat(*weights)
        answers = [id for id, target in zip(ids, targets) if target]
        expected = [f"answer {w}" for w in weights if w != 0]
        assert answers == [id for text in expected for id in [*tokenizer.encode(text), tokenizer.eos_id]]
    # Neighbours of different weight stay two turns, as in mistral-common.
    pair = [USER, *({"role": "assistant", "content": "x", "weight": w} for w in (0, 1))]
    encoded = encode_chat(tokenizer, pair, training=True)
    assert sum(encoded.targets) == len(tokenizer.encode("x")) + 1 and encoded.ids.count(tokenizer.eos_id) == 2


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([USER, {"role": "assistant", "tool_calls": TWO_CALLS}, result("abcdefgh1")], "1 of the latest tool calls"),
        ([USER, {"role": "assistant", "tool_calls": TWO_CALLS}, USER], "2 of the tool calls before it have no result"),
        ([USER, {"role": "assistant", "tool_calls": TWO_CALLS[:1], "content": "x", "prefix": True}], "have no result"),
        ([{**USER, "wieght": 1}], "unknown key 'wieght' in a message of role user"),
        ([USER, {"role": "assistant", "content": "x", "function_call": {"name": "f"}}, USER], "'function_call'"),
        ([USER, {"role": "assistant", "content": "x", "weight": 0.5}, USER], "weight should be 0"),
        ([USER, {"role": "assistant", "content": "x", "weight": True}, USER], "weight should be 0"),
        ([USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "r"}], "needs the tool_call_id"),
        ([{"role": ["user"], "content": "x"}], "unknown role"),
        ([{"role": "user", "content": "x", "weight": 1}], "unknown key 'weight'"),
        ([USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": [3]}]}, USER], "thinking[0]"),
        ([USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": [image("a")]}]}], "thinking[0]"),
    ],
)
def test_refused(messages, says, small):
    with pytest.raises(UserError) as refusal:
        encode_chat(small["tekken-v15"], messages)
    assert says in str(refusal.value) and "messages[" in str(refusal.value)


def test_what_is_falsy_is_not_taken_for_absent(small):
    """Each field of a chat with each falsy or odd value: one line, unless it is of the right type."""
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}, "strict": False}}
    thought = {"type": "thinking", "thinking": "hm", "closed": True}
    answer = {"role": "assistant", "content": [thought], "name": "me", "tool_calls": [call], "prefix": False}
    last = {"role": "assistant", "content": "", "tool_calls": [], "weight": 1, "prefix": False, "reasoning": "hm"}
    messages = [USER, answer, result("abcdefgh1"), last]
    parts = [answer, thought, call, call["function"], tool, tool["function"], last]
    types = dict(role=str, content=str | list, tool_calls=list, prefix=bool, weight=int | float)
    types |= dict(
        type=str, thinking=str | list, reasoning=str | list, closed=bool, id=str, function=dict, arguments=str | dict
    )
    types |= dict(description=str, parameters=dict, name=object, strict=object)  # the last two say nothing
    refused = 0
    for tokenizer in (small["tekken-v13"], small["tekken-v15"]):
        for part in parts:
            for name in list(part):
                before = dict(part)
                for value in (0, 0.0, "", [], {}, False, 1, -1, "true", [[]], {"a": None}):
                    part[name] = value
                    try:
                        encode_chat(tokenizer, messages, [tool], training=True)
                        right = isinstance(value, types.get(name, ())) and not (name == "weight" and value is False)
                        assert right, (name, value)
                    except UserError:
                        refused += 1
                part.clear()
                part.update(before)
    assert refused > 100
