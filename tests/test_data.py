"""Chats to micro-batches: what is a target, what is dropped, in which order, and what is refused."""

import json
import os

import pytest
import torch
from helpers import write_tekken
from PIL import Image
from train_cases import IMAGES, TEXT, make_chats

from parallel import Place
from runtime.chat import encode_chat
from runtime.data import IGNORE, Chats, Order, decode_images, micro_batches
from runtime.files import UserError
from runtime.images import load_image, pixels
from runtime.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tekken(folder)
    return load_tokenizer(str(folder))


def write(folder, *lines) -> str:
    path = os.path.join(folder, "chats.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return path


def chat(*contents: str, **extra) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **extra}


def test_targets_are_what_assistants_wrote(tokenizer, tmp_path):
    thinking = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]
    call = {"id": "a", "function": {"name": "find", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": thinking},
        {"role": "user", "content": "Find it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "here"},
        {"role": "assistant", "content": "There."},
    ]
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    path = write(tmp_path, {"messages": messages, "tools": tools, "reasoning_effort": "high"})
    (sample,) = Chats(path, tokenizer, TEXT, 1000, Place()).samples
    special = tokenizer.special
    expected, learned = [], []
    for text in (["[THINK]", "hm", "[/THINK]", "yes", "</s>"], ["[TOOL_CALLS]", "find", "[ARGS]", '{"x": 1}', "</s>"]):
        learned += [i for part in text for i in ([special[part]] if part in special else tokenizer.encode(part))]
    learned += [*tokenizer.encode("There."), special["</s>"]]
    (batch,) = micro_batches([sample], 1, 11)
    assert sample.ids[sample.targets].tolist() == learned
    assert batch.targets[batch.targets != IGNORE].tolist() == learned
    expected = encode_chat(tokenizer, messages, tools, "high", training=True)
    assert batch.tokens[0].tolist() == expected.ids[:-1]
    before, answer = sample.split_answer()
    assert (
        before + answer == expected.ids
        and answer == learned[-len(answer) :]
        and before[-1] == special["[/TOOL_RESULTS]"]
    )


def test_padding_on_the_right(tokenizer, tmp_path):
    path = write(tmp_path, chat("a", "bcd"), chat("a long question", "and answer"), chat("x", "y"))
    samples = Chats(path, tokenizer, TEXT, 1000, Place()).samples
    first, second = micro_batches(samples, 2, 11)
    lengths = [len(sample.ids) - 1 for sample in samples]
    assert first.shape == (2, max(lengths[:2])) and second.shape == (1, lengths[2])
    assert first.length == sum(lengths[:2]) and first.lines == [1, 2] and second.lines == [3]
    assert (first.tokens[0, lengths[0] :] == 11).all() and (first.targets[0, lengths[0] :] == IGNORE).all()
    for i, sample in enumerate(samples[:2]):
        assert first.tokens[i, : lengths[i]].tolist() == sample.ids[:-1].tolist()
        shifted = first.targets[i, : lengths[i]]
        assert torch.equal(shifted != IGNORE, sample.targets[1:])
        assert shifted[shifted != IGNORE].tolist() == sample.ids[sample.targets].tolist()


def test_long_samples_are_dropped_and_counted(tokenizer, tmp_path):
    path = write(tmp_path, chat("a", "b"), chat("a" * 90, "b"), chat("c", "d"))
    length = len(Chats(path, tokenizer, TEXT, 1000, Place()).samples[1].ids)
    for limit, dropped in ((length, 0), (length - 1, 1)):
        chats = Chats(path, tokenizer, TEXT, limit, Place())
        assert chats.dropped == dropped and len(chats.samples) == 3 - dropped
    with pytest.raises(UserError, match="all 3 samples are longer than --max-length 5"):
        Chats(path, tokenizer, TEXT, 5, Place())


@pytest.mark.parametrize(
    "lines, message",
    [
        ([chat("a", "b"), "", '{"messages": ['], "line 3: not JSON"),
        ([chat("a", "b"), chat("a")], "line 2: messages end with role user"),
        ([chat("a", "b"), {"messages": []}], "line 2: messages should be a list with at least one"),
        ([[1]], "line 1: should be a JSON object"),
        ([{"tools": []}], "line 1: messages should be a list with at least one"),
        ([chat("a", "b", tool=[])], "line 1: unknown key 'tool'"),
        ([], "is empty"),
        (["", "  "], "is empty"),
    ],
)
def test_bad_lines(lines, message, tokenizer, tmp_path):
    path = write(tmp_path, *lines)
    with pytest.raises(UserError, match=message) as error:
        Chats(path, tokenizer, TEXT, 1000, Place())
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_the_first_bad_line_wins_and_missing_files(tokenizer, tmp_path):
    path = write(tmp_path, chat("a", "b"), "{", chat("a"), "[")
    with pytest.raises(UserError, match="line 2: not JSON"):
        Chats(path, tokenizer, TEXT, 1000, Place())
    with pytest.raises(UserError, match="cannot be read"):
        Chats(str(tmp_path / "none.jsonl"), tokenizer, TEXT, 1000, Place())
    see = chat([{"type": "image_url", "image_url": {"url": "lost.png"}}, {"type": "text", "text": "?"}], "b")
    path = write(tmp_path, chat("a", "b"), see)
    with pytest.raises(UserError, match="line 2: .*lost.png: cannot be read: no such file"):
        Chats(path, tokenizer, IMAGES, 1000, Place())
    with pytest.raises(UserError, match="line 2: .*takes no images"):
        Chats(path, tokenizer, TEXT, 1000, Place())


def test_images_are_read_when_they_are_needed(tokenizer, tmp_path):
    path = make_chats(tmp_path, images=True)
    chats = Chats(path, tokenizer, IMAGES, 1000, Place())
    batches = micro_batches(chats.samples[:5], 2, 11)
    assert not any(batch.pixels for batch in batches) and [len(b.images) for b in batches][0] > 0
    decode_images(batches, chats.base, IMAGES.vision, torch.float32)
    for batch in batches:
        count = int((batch.tokens == IMAGES.vision.image_token_id).sum())
        assert sum(image.shape[1] * image.shape[2] for image in batch.pixels) == count * 36  # (3 · 2)² pixels a token
        for image, url in zip(batch.pixels, batch.images, strict=True):
            assert torch.equal(image, pixels(load_image(url, str(tmp_path)), IMAGES.vision))


def test_an_image_that_breaks_later(tokenizer, tmp_path):
    """Its header was whole when the chats were read."""
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    see = chat([{"type": "image_url", "image_url": {"url": "a.png"}}], "b")
    chats = Chats(write(tmp_path, see), tokenizer, IMAGES, 1000, Place())
    (tmp_path / "a.png").write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"a\.png.*cut off or damaged"):
        decode_images(micro_batches(chats.samples, 1, 11), chats.base, IMAGES.vision, torch.float32)


@pytest.mark.parametrize("shuffle", [False, True])
def test_order(shuffle):
    order = Order(7, 3, 2, 5, shuffle)
    assert order.steps == 5
    seen = [i for step in range(1, 6) for i in order.batch(step)]
    assert [len(order.batch(step)) for step in range(1, 6)] == [3, 3, 3, 3, 2]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert (seen[:7] == list(range(7))) is not shuffle and (seen[:7] == seen[7:]) is not shuffle
    assert order.batch(3) == Order(7, 3, 2, 5, shuffle).batch(3)  # a step's samples depend on nothing but its number
    assert Order(7, 20, None, 5, shuffle).batch(2)[0] == Order(7, 1, None, 5, shuffle).batch(21)[0]
    if shuffle:
        assert seen != [i for step in range(1, 6) for i in Order(7, 3, 2, 6, True).batch(step)]


def test_fingerprint(tokenizer, tmp_path):
    prints = set()
    for lines in ([chat("a", "b")], [chat("a", "c")], [chat("a", "b")] * 2):
        prints.add(Chats(write(tmp_path, *lines), tokenizer, TEXT, 1000, Place()).fingerprint())
    assert len(prints) == 3
