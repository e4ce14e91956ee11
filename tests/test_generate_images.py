"""Pictures through generate.py: --image, image parts in --requests, and what is refused."""

import base64
import io
import json
import os

import pytest
import torch
from helpers import answers, random_state, text_fields, whole_state, write_checkpoint, write_tekken
from PIL import Image
from processes import ROOT

import generate
from parallel import Place
from runtime.config import parse_config
from runtime.images import grid, load_image, pixels
from vision import build_model

SIZES = [(40, 61), (100, 30), (9, 9), (75, 84), (57, 29)]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """A tiny checkpoint with a tower, and a few noisy pictures beside it."""
    root = tmp_path_factory.mktemp("eyes")
    fields = text_fields("yarn, short", vocab_size=write_tekken(root), max_position_embeddings=900)
    fields["vision_config"] = dict(
        model_type="pixtral", hidden_size=36, intermediate_size=22, num_hidden_layers=2, num_attention_heads=3,
        head_dim=12, num_channels=3, patch_size=7, image_size=84, hidden_act="silu",
        rope_parameters=dict(rope_type="axial", rope_theta=1e4),
    )  # fmt: skip
    write_checkpoint(root, fields, whole_state(fields, seed=5), "new")
    for i, size in enumerate(SIZES):
        Image.effect_noise(size, 90).convert("RGB").save(root / f"{i}.png")
    return str(root)


def part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def chats(root: str) -> list[dict]:
    with open(f"{root}/3.png", "rb") as file:
        data = "data:image/png;base64," + base64.b64encode(file.read()).decode()
    user = lambda *parts: {"role": "user", "content": list(parts)}  # noqa: E731
    return [
        dict(messages=[user(part("0.png"), text("the hat"))]),
        dict(messages=[{"role": "user", "content": "no picture here"}]),
        dict(messages=[user(text("then"), part("1.png"), text("and"), part(data), part("2.png"))]),
        dict(raw="the weather"),
        dict(
            messages=[
                user(part("4.png"), part("0.png"), text("in it")),
                {"role": "assistant", "content": "there"},
                user(*(part(f"{i}.png") for i in (3, 2, 1)), text("?")),
            ]
        ),
    ]


def write_requests(path, specs: list[dict]):
    path.write_text("".join(json.dumps(spec) + "\n" for spec in specs))
    return path


def score(program, root: str, specs: list[dict], *options) -> list[dict]:
    path = f"{root}/requests.jsonl"  # the pictures' paths are relative to it
    with open(path, "w") as file:
        file.write("".join(json.dumps({**spec, "max_new_tokens": 0}) + "\n" for spec in specs))
    return answers(program("--ckpt", root, "--requests", path, "--dtype", "float32", "--json", *options))


def test_together_as_alone_and_in_small_chunks(ckpt, program, monkeypatch):
    specs = chats(ckpt)
    together = score(program, ckpt, specs)
    monkeypatch.setattr(generate, "CPU_CHUNK", 7)  # cuts images in the middle of a row
    for spec, answer in zip(specs, together):
        (alone,) = score(program, ckpt, [spec])
        assert alone["prompt_tokens"] == answer["prompt_tokens"]
        assert alone["prompt_logprobs"][1:] == pytest.approx(answer["prompt_logprobs"][1:], abs=1e-4)


def test_log_probabilities_equal_transformers(ckpt, program):
    """1 to 5 images in one turn and across turns, from the file to the log-probability."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Mistral3ForConditionalGeneration.from_pretrained(ckpt, dtype=torch.float32)
    vision = build_model(parse_config(json.load(open(f"{ckpt}/config.json")))).config.vision
    specs = chats(ckpt)
    for spec, answer in zip(specs, score(program, ckpt, specs)):
        urls = [
            p["image_url"]["url"]
            for message in spec.get("messages", [])
            if isinstance(message["content"], list)
            for p in message["content"]
            if p["type"] == "image_url"
        ]
        images = [pixels(load_image(url, ckpt), vision) for url in urls]
        more = {}
        if images:
            height, width = (max(image.shape[i] for image in images) for i in (1, 2))
            padded = [
                torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
                for image in images
            ]
            more = dict(
                pixel_values=torch.stack(padded), image_sizes=torch.tensor([list(image.shape[1:]) for image in images])
            )
        ids = torch.tensor([answer["prompt_tokens"]])
        with torch.inference_mode():
            logits = theirs(input_ids=ids, **more).logits[0].log_softmax(-1)
        expected = logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert answer["prompt_logprobs"][0] is None
        assert answer["prompt_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


def test_the_option(ckpt, program):
    """--image puts the images first."""
    common = ("--ckpt", ckpt, "--dtype", "float32", "--max-new-tokens", 4)
    images = ("--image", f"{ckpt}/0.png", "--image", f"{ckpt}/4.png")
    (answer,) = answers(program(*common, *images, "--prompt", "hat", "--json"))
    vision = build_model(parse_config(json.load(open(f"{ckpt}/config.json")))).config.vision
    expected = sum(rows * columns for rows, columns in (grid(*SIZES[i], vision) for i in (0, 4)))
    prompt = answer["prompt_tokens"]
    assert prompt.count(10) == expected and prompt.count(13) == 2
    assert prompt.index(3) < prompt.index(10) < len(prompt) - 1 - prompt[::-1].index(13) < prompt.index(4)


def refused(result, *words: str) -> None:
    status, out, err = result
    assert status == 2 and out == "" and len(err.splitlines()) == 1, (status, out, err)
    assert all(word in err for word in words), err


def test_mistakes(ckpt, program, tmp_path):
    (tmp_path / "text.png").write_text("this is no image")
    whole = io.BytesIO()
    Image.effect_noise((70, 70), 50).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:900])
    common = ("--ckpt", ckpt, "--prompt", "hat", "--image")
    refused(program(*common, tmp_path / "text.png"), "text.png", "not an image")
    refused(program(*common, tmp_path / "cut.png"), "cut.png")
    refused(program(*common, tmp_path / "none.png"), "none.png", "no such file")
    refused(program(*common, "https://example.com/a.png"), "nothing is fetched")
    refused(program(*common, f"{ckpt}/0.png", "--max-context", 20), "context of 20")
    bad = write_requests(
        tmp_path / "r.jsonl", [chats(ckpt)[1], dict(messages=[{"role": "user", "content": [part("x")]}])]
    )
    refused(program("--ckpt", ckpt, "--requests", bad), "r.jsonl line 2", "x")


def test_a_damaged_picture_far_down(ckpt, program, tmp_path):
    """Its header is as it should be, so it shows when it is needed; what was answered before stands."""
    Image.effect_noise((70, 70), 50).save(file := io.BytesIO(), "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:900])
    lines = [dict(raw="the", max_new_tokens=2)] * 3 + [dict(messages=[{"role": "user", "content": [part("cut.png")]}])]
    path = write_requests(tmp_path / "r.jsonl", lines)
    status, out, err = program("--ckpt", ckpt, "--requests", path, "--json", "--batch-size", 1)
    assert status == 2 and out.count("\n") == 3 and err.count("\n") == 1
    assert "r.jsonl line 4: " in err and "cut.png" in err and "cut off or damaged" in err


def test_text_only_checkpoints_refuse_images(ckpt, program, tmp_path):
    fields = text_fields("plain", vocab_size=write_tekken(tmp_path))
    write_checkpoint(tmp_path, fields, random_state(fields))
    refused(program("--ckpt", tmp_path, "--image", f"{ckpt}/0.png", "--prompt", "hat"), "takes no images")


# ------------------------------------------------------------------------------------------------ turn after turn


def test_a_chat_is_computed_once(tmp_path):
    """Twelve turns and two pictures, with the small checkpoint: every token goes through the model once, and every
    picture through the tower. A picture of the same size with other content is another one."""
    picture = os.path.join(ROOT, "examples", "tiny", "picture.png")
    with Image.open(picture) as image:
        Image.merge("RGB", image.convert("RGB").split()[::-1]).save(tmp_path / "other.png")  # blue becomes red
    pictures = {0: part(picture), 6: part(str(tmp_path / "other.png"))}
    questions = ["What is right of the blue star?", "How many stars are there?", "Is there a red circle?"]

    def start() -> tuple[generate.Session, list[int]]:
        made = generate.Session(generate.parse_args(["--dtype", "float32", "?"]), Place())
        features, seen = made.model.vision.forward, []
        made.model.vision.forward = lambda images: seen.append(len(images)) or features(images)
        return made, seen

    def ask(made: generate.Session, messages: list[dict]) -> dict:
        return made.answer([{"messages": messages, "max_new_tokens": 30, "where": "a turn"}])[0]

    (chat, seen), messages, turns = start(), [], []
    for turn in range(12):
        content = [pictures[turn]] if turn in pictures else []
        messages.append({"role": "user", "content": [*content, text(questions[turn % 3])]})
        turns.append(ask(chat, messages))
        assert turns[-1]["tokens"] == ask(start()[0], messages)["tokens"]
        messages.append({"role": "assistant", "content": turns[-1]["text"]})
    prefilled = sum(turn["stats"]["prefill_tokens"] for turn in turns)
    # The last token of an answer goes through the model with the next turn.
    decoded = sum(len(turn["tokens"]) - 1 for turn in turns[:-1])
    assert prefilled + decoded == len(turns[-1]["prompt_tokens"]) and seen == [1, 1]
    other = [{"role": "user", "content": [pictures[6], text(questions[0])]}]
    assert ask(chat, other)["tokens"] == ask(start()[0], other)["tokens"] != turns[0]["tokens"]
    assert seen == [1, 1, 1]
