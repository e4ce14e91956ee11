"""The small checkpoint's data: pictures that show their scenes, answers that are right, sets that share no picture."""

import glob
import hashlib
import json
import os
import random
import re
from collections import Counter

import pytest
from evaluate import SETS, is_right
from pictures import COLOURS, SHAPES, STYLES, WORDS, Scene, Style, Thing, any_style, draw_scene, render
from PIL import Image
from processes import ROOT, run
from questions import CALLS, FIRST, FURTHER, NUMBERS, SEVERAL, SIDES, SINGLE, Asker
from shapes import EASY, FINDING, READING, SEEING, Album, fine_tuning_chats, strings, training_chats

from parallel import Place
from runtime.chat import encode_chat
from runtime.config import read_config
from runtime.data import Chats
from runtime.tokenizer import load_tokenizer
from vision import build_model

EXAMPLES = os.path.join(ROOT, "examples")


def make(folder, *options: str) -> str:
    options = ("--chats", 160, "--held-out", 15, "--review", 40, *options)
    ended = run("examples/shapes.py", folder, *options)
    assert ended.status == 0, ended.err
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return make(tmp_path_factory.mktemp("shapes") / "data")


def contents(folder: str) -> dict[str, bytes]:
    paths = [path for path in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(path)]
    return {os.path.relpath(path, folder): open(path, "rb").read() for path in paths}


def chats(folder: str, name: str) -> list[dict]:
    with open(os.path.join(folder, f"{name}.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- pictures


def nearest(pixel: tuple, colours: dict) -> str:
    return min(colours, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, colours[name])))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_picture_shows_its_scene(scale):
    """Every shape's colour is at its place, and there is nothing but background in cells without one."""
    rng = random.Random(3)
    for _ in range(60):
        scene = draw_scene(rng)
        image = render(scene, rng, scale)
        width, height = (n * size * scale for n, size in zip((scene.columns, scene.rows), scene.cell))
        assert abs(image.width - width) < 1 and abs(image.height - height) < 1
        filled = {(thing.column, thing.row): thing for thing in scene.things}
        for column in range(scene.columns):
            for row in range(scene.rows):
                left, top = column * width / scene.columns, row * height / scene.rows
                right, bottom = left + width / scene.columns, top + height / scene.rows
                box = (round(left) + 1, round(top) + 1, round(right) - 1, round(bottom) - 1)
                found = image.crop(box).getcolors(1 << 20)
                thing = filled.get((column, row))
                if thing is None:
                    assert len(found) == 1 or scene.digit or scene.word
                    continue
                counts = Counter()
                for n, pixel in found:
                    if max(pixel) - min(pixel) > 80:  # neither background nor outline
                        counts[nearest(pixel, COLOURS)] += n
                assert max(counts, key=counts.get) == thing.colour


@pytest.mark.parametrize("name", STYLES)
def test_styles(name):
    """Each changes the picture; noise and turns are weaker where they are trained on, and none there is a JPEG."""
    rng = random.Random(4)
    scene = Scene(2, 2, (44.0, 40.0), [Thing("red", "square", 0, 0), Thing("blue", "star", 1, 1)])
    style = STYLES[name](rng)
    plain, drawn = (render(scene, random.Random(1), 2.0, style=each) for each in (Style(), style))
    assert plain.size == drawn.size and plain.tobytes() != drawn.tobytes()
    assert nearest(drawn.getpixel((44, 40)), COLOURS) == "red"
    trained = [any_style(rng) for _ in range(300)]
    assert not any(each.jpeg for each in trained)
    assert max(each.noise for each in trained) <= 14 and max(abs(each.angle) for each in trained) <= 6


def pixels_of(image: Image.Image) -> list[tuple]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def test_shapes_look_different():
    """How much of the same square each shape covers tells them apart; a cross and a star are no circle."""
    areas = {}
    for shape in SHAPES:
        scene = Scene(1, 1, (44.0, 44.0), [Thing("blue", shape, 0, 0)])
        image = render(scene, random.Random(1), 3.0)
        areas[shape] = sum(nearest(p, {**COLOURS, "": image.getpixel((0, 0))}) == "blue" for p in pixels_of(image))
    assert len({round(area, -2) for area in areas.values()}) == len(SHAPES), areas
    assert areas["star"] < areas["cross"] < areas["square"]


@pytest.mark.parametrize("text", [*WORDS, "4"])
def test_texts_stay_inside_the_picture(text):
    scene = Scene(3, 2, (26.0, 30.0), [Thing("red", "star", 1, 0)], text_row=1, text_column=2)
    scene.digit, scene.word = (text, "") if text.isdigit() else ("", text)
    image = render(scene, random.Random(0), 2.0)
    lower = image.crop((0, image.height // 2 + 2, image.width, image.height))
    edge = [lower.getpixel((x, y)) for x in (0, lower.width - 1) for y in range(lower.height)]
    assert len(set(edge)) == 1 and len(lower.getcolors(1 << 20)) > 2


# ---- questions


def members(plural: str, things: list[Thing]) -> list[Thing]:
    """What a name such as "red circles", "stars" or "blue shapes" speaks of, written down from scratch."""
    words = plural[:-2] if plural.endswith("crosses") else plural[:-1]
    return [t for t in things if all(word in (t.colour, t.shape, "shape") for word in words.split())]


def truth(kind: str, text: str, scene: Scene) -> str:
    """The answer, found in another way than by the code that asked."""
    things = scene.things
    if kind in ("colour", "shape"):
        (name,) = [w for w in re.findall(r"\w+", text) if w in SHAPES or w in COLOURS]
        (thing,) = [t for t in things if name in (t.shape, t.colour)]
        return thing.colour if name == thing.shape else thing.shape
    if kind == "exists":
        return "yes" if members(re.search(r"a (\w+ \w+)\?", text)[1] + "s", things) else "no"
    if kind in ("digit", "word"):
        return scene.digit or scene.word
    if kind == "count":
        plural = re.search(r"(?:many|the|of) ((?:\w+ )?\w+s)\b", text.replace("number of ", ""))[1]
        return str(len(members(plural, things)))
    if kind == "extreme":
        keys = dict(leftmost=lambda t: t.column, rightmost=lambda t: -t.column)
        keys |= dict(topmost=lambda t: t.row, lowest=lambda t: -t.row)
        return str(min(things, key=next(keys[name] for name in keys if name in text)))
    if kind == "cell":
        (thing,) = members(re.search(r"the ([\w ]+?) in\?", text)[1] + "s", things)
        return Asker(scene, random.Random()).place(thing)
    if kind == "further":
        a, b = re.search(r", the ([\w ]+) or the ([\w ]+)\?", text).groups()
        (one,), (other,) = (members(f"{name}s", things) for name in (a, b))
        place, sign = FURTHER[re.search(r"is ([\w ]+),", text)[1]]
        return a if sign * one.place(place) > sign * other.place(place) else b
    if kind == "which side":
        sides = ("left of", "right of") if " left or right of " in text else ("above", "below")
        one, other = re.search(r"Is the ([\w ]+?) (?:left or right of|above or below) the ([\w ]+)\?", text).groups()
        (side,) = [s for s in sides if truth("side", f"Is the {one} {s} the {other}?", scene).endswith("yes")]
        return side.split()[0]
    if kind in ("side", "beside", "nothing beside", "count_beside"):
        side = next(side for side in SIDES if f" {side} " in text)
        *_, name = re.findall(r"the ([\w ]+?)[?,]", text)
        (anchor,) = members(name.split("the ")[-1] + "s", things)
        past = {"left of": lambda t: t.column < anchor.column, "right of": lambda t: t.column > anchor.column}
        past |= {"above": lambda t: t.row < anchor.row, "below": lambda t: t.row > anchor.row}
        hits = [t for t in things if past[side](t)]
        if "beside" in kind and kind != "count_beside":
            assert len(hits) <= 1
            return str(hits[0]) if hits else "nothing"
        if kind == "side":
            (one,) = members(re.search(rf"the ([\w ]+?) {side}", text)[1] + "s", things)
            opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            return f"{side} it, so yes" if one in hits else f"{opposite[side]} it, so no"
        start = len(members(re.search(r"many ([\w ]+?) are", text)[1], hits))
    elif kind == "count_sum":
        start = len(members(re.search(r"many ([\w ]+?) are", text)[1], things))
    elif kind == "more":
        a, b = re.search(r"more ([\w ]+?) than ([\w ]+?) are", text).groups()
        return str(len(members(a, things)) - len(members(b, things)))
    elif kind in ("digit_sum", "word_sum"):
        n = len(members(re.search(r"number of ((?:\w+ )?\w+s)\?", text)[1], things))
        return str(n + (int(scene.digit) if scene.digit else len(scene.word)))
    elif kind == "where":
        (thing,) = members(re.search(r"the ([\w ]+?)\?", text)[1] + "s", things)
        left, top = 2 * thing.column < scene.columns - 1, 2 * thing.row < scene.rows - 1
        return f"{'top' if top else 'bottom'} {'left' if left else 'right'}"
    sign, number = re.search(r"(plus|minus|times) (\w+)\?", text).groups()
    number = NUMBERS.index(number) if number in NUMBERS else int(number)
    return str({"plus": start + number, "minus": start - number, "times": start * number}[sign])


def test_answers_are_right_and_thoughts_lead_to_them():
    rng, kinds = random.Random(5), set()
    for _ in range(1500):
        scene = draw_scene(rng)
        for question in Asker(scene, rng).draw(SINGLE + SEVERAL + FIRST + ("side", "absent"), 4):
            kinds.add(question.kind)
            if question.kind.startswith("no "):
                name = question.answer.removeprefix("there is no ")
                assert name in question.text and not (getattr(scene, name, "") or members(f"{name}s", scene.things))
                continue
            assert question.answer == truth(question.kind, question.text, scene), (question, scene)
            last = question.thought.removesuffix(".").split()[-1]
            if question.answer.isdigit() and question.kind != "digit":
                assert last == question.answer
    assert len(kinds) == 22, kinds


def test_follow_ups_speak_of_the_answer_before():
    """With the words that "it" and "them" stand for in their place, the question has the same answer."""
    rng, kinds = random.Random(8), set()
    for _ in range(800):
        scene = draw_scene(rng)
        pair = Asker(scene, rng).follow_up()
        if not pair:
            continue
        first, second = pair
        assert first.answer == truth(first.kind, first.text, scene)
        text = second.text.removeprefix("And ")
        kinds.add((first.kind, second.kind))
        if second.kind == "of them":
            plural, word = first.about, re.search(r"are (\w+)\?", text)[1]
            name = f"{word} {plural}" if word in COLOURS else f"{plural.split()[0]} {word}"
            assert second.answer == str(len(members(name, scene.things)))
            continue
        if len(members(f"{first.about}s", scene.things)) > 1:
            continue  # "it" is the leftmost one, say, and its name alone does not tell which that is
        kind = "where" if "here is" in text or "corner" in text else "beside"
        assert second.answer == truth(kind, re.sub(r"\bit\b", f"the {first.about}", text), scene)
    assert len(kinds) == 4, kinds


def test_calls_carry_what_the_picture_shows():
    rng, seen = random.Random(6), set()
    for _ in range(400):
        scene = draw_scene(rng)
        for question in Asker(scene, rng).draw(CALLS, 2):
            name, arguments = question.call["name"], question.call["arguments"]
            seen.add(name)
            if name == "press_key":
                assert arguments == {"key": int(scene.digit)}
            elif name == "move_shape":
                wanted = truth("extreme", question.text, scene)
                assert f"{arguments['colour']} {arguments['shape']}" == wanted
                assert question.text.endswith(arguments["direction"] + ".")
            else:
                text = question.text.split(",")[0].replace("'s", "")
                assert arguments["colour"] == truth("colour", text.replace("colour", "").replace("light", ""), scene)
                if times := re.search(r", (\w+) times\.", question.text):
                    times = times[1]
                    assert arguments["count"] == (NUMBERS.index(times) if times in NUMBERS else int(times))
                else:
                    plural = re.search(r"(?:of the|are) ((?:\w+ )?\w+s)\.", question.text)[1]
                    assert arguments["count"] == len(members(plural, scene.things)) > 0
    assert len(seen) == 3


def test_where_things_are():
    """A place is the token of the picture that the middle of the shape's cell falls into."""
    scene = Scene(3, 2, (37.0, 29.0), [Thing("red", "star", 2, 1), Thing("blue", "star", 0, 0)])  # 4 × 3 tokens
    assert Asker(scene, random.Random(0)).everything().answer == "a1 blue star, d3 red star"
    thoughts = [q.thought for q in Asker(scene, random.Random(1)).draw(("count", "exists"), 9)]
    assert len(thoughts) > 4 and all(re.search(r": a1 blue star \d, d3 red star \d\.", text) for text in thoughts)
    expected = {"shape": ["star blue a1", "star red d3"], "colour": ["blue star a1", "red star d3"]}
    expected["cell"] = ["a1 star blue", "d3 star red"]
    asked = [Asker(scene, random.Random(seed)).in_any_order() for seed in range(40)]
    for question in asked:
        assert sorted(question.answer.split(", ")) == expected[question.text.split()[-1].strip(".")]
    assert len({question.answer for question in asked}) == 6  # either shape may be first


def test_lists_name_all_that_is_shown():
    """Digits and words too, each once, at the same places in any order."""
    rng = random.Random(12)
    for _ in range(100):
        scene = draw_scene(rng)
        asker = Asker(scene, rng)
        lists = [asker.everything().answer, asker.in_any_order().answer]
        ordered, shuffled = (sorted(sorted(one.split()) for one in text.split(", ")) for text in lists)
        assert ordered == shuffled and len(ordered) == len(scene.things) + bool(scene.digit or scene.word)
        for kind in ("digit", "word"):
            assert (f"{kind} {getattr(scene, kind)}" in lists[0]) == bool(getattr(scene, kind))


def test_what_is_seen_at_a_glance_is_said_in_a_sentence():
    """It holds the answer, and nothing that the question does not name but the answer."""
    rng = random.Random(3)
    kinds = ("colour", "shape", "extreme", "beside", "where", "cell", "further", "which_side", "side", "absent")
    for _ in range(300):
        for question in Asker(draw_scene(rng), rng).draw(kinds, 4):
            said, answer = question.thought.lower(), question.answer.split(" it, so ")[0].split()
            assert set(answer) <= set(re.findall(r"\w+", said)), question
            named = set(re.findall(r"\w+", question.text.lower())) | set(answer)
            shapes = {*COLOURS, *SHAPES} & set(re.findall(r"\w+", said))
            assert shapes <= named or question.kind in ("beside", "nothing beside"), question


def test_thoughts_list_everything_and_count_on_the_way():
    """A list has all shapes, from left to right or from top to bottom, and counts exactly those that are asked for."""
    rng, counts = random.Random(7), 0
    list_of = re.compile(rf"([\w ]+?)(?: ({'|'.join(SIDES)}) the ([\w ]+))?: ((?:[a-h]\d [\w ]+(?:, )?)+)")
    for _ in range(600):
        scene = draw_scene(rng)
        asker = Asker(scene, rng)
        questions = asker.draw(SINGLE + SEVERAL + CALLS + ("side", "absent", "no_light"), 4) + asker.follow_up()
        for question in questions:
            for plural, side, anchor, listed in list_of.findall(question.thought):
                shapes, numbers = zip(*(re.fullmatch(r"(\D+\d\D+?) (\d)", one).groups() for one in listed.split(", ")))
                down = side in ("above", "below")
                things = sorted(scene.things, key=lambda t: (t.row, t.column) if down else (t.column, t.row))
                assert list(shapes) == [f"{asker.place(t)} {t}" for t in things]
                hits = members(plural, things)
                if side:
                    (axis, sign), (other,) = SIDES[side], members(f"{anchor}s", things)
                    hits = [t for t in hits if sign * t.place(axis) > sign * other.place(axis)]
                assert numbers == tuple(str(sum(t in hits for t in things[: i + 1])) for i in range(len(things)))
                counts += 1
    assert counts > 500


# ---- the files


def test_the_seed_decides_everything(data, tmp_path):
    assert contents(make(tmp_path / "same")) == contents(data)
    assert contents(make(tmp_path / "other", "--seed", "1"))["train.jsonl"] != contents(data)["train.jsonl"]


def test_nothing_is_overwritten(data):
    before, ended = contents(data), run("examples/shapes.py", data, "--chats", 1)
    assert ended.status == 2 and ended.err.count("\n") == 1 and "already exists" in ended.err
    assert contents(data) == before


def test_no_picture_occurs_twice(data):
    digests = []
    for path in glob.glob(f"{data}/images/**/*.png", recursive=True):
        with Image.open(path) as image:
            digests.append(hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest())
    assert len(digests) > 600 and len(set(digests)) == len(digests)


def test_sizes_of_pictures(data):
    sizes = {name: [] for name in ("train", "large", "wide")}
    for name in sizes:
        for path in glob.glob(f"{data}/images/{name}/**/*.png", recursive=True):
            with Image.open(path) as image:
                sizes[name].append(image.size)
    assert 90 < max(map(max, sizes["train"])) <= 141 < max(map(max, sizes["large"])) <= 226
    assert len(set(sizes["train"])) > 50
    ratios = {name: [max(size) / min(size) for size in sizes[name]] for name in sizes}
    assert max(ratios["train"]) < 2.3 and min(ratios["wide"]) > 2.4


def test_the_new_colour_is_new(data):
    for name in ("train", "review", "val", "calibrate", *(name for name in SETS if name != "pink")):
        assert "pink" not in json.dumps(chats(data, name))
    assert all("pink" in json.dumps(chat) for name in ("pink", "pink_train") for chat in chats(data, name))


def test_what_is_taught_first(tmp_path):
    """Things alone, then lists in the order of places, lists in any order, questions, and sums."""
    made = list(training_chats(Album(str(tmp_path), "train", set()), 1000, random.Random(9)))
    texts = [" ".join(strings(chat["messages"])) for chat in made]
    for text, begin in (("List everything", SEEING), ("List all by", READING), ("How many", FINDING), ("plus", EASY)):
        first = next(i for i, asked in enumerate(texts) if text in asked)
        assert begin <= first / 1000 < begin + 0.05, text


@pytest.mark.parametrize("seed", range(5, 11))
def test_new_examples_of_a_fine_tune_look_like_old_ones(seed, tmp_path):
    """Alone and in chats, with thoughts and without: nothing but pink tells them apart."""
    rng, forms = random.Random(seed), {}
    for name, must in (("new", "pink"), ("old", "")):
        colours = (*COLOURS, must) if must else tuple(COLOURS)
        album = Album(str(tmp_path), name, set())
        made = list(fine_tuning_chats(album, 60, rng, (1, 1, 1, 0), colours, must))
        assert len(made) == album.count == 60 and all(must in json.dumps(chat) for chat in made)
        asked = [sum(message["role"] == "user" for message in chat["messages"]) for chat in made]
        forms[name] = {(min(count, 2), chat["reasoning_effort"]) for count, chat in zip(asked, made)}
        thoughts = {"thinking" in json.dumps(chat) for chat in made if chat["reasoning_effort"] == "none"}
        assert thoughts == {False}
    assert forms["new"] == forms["old"] == {(1, "none"), (2, "none"), (2, "high")}


def test_every_set_can_be_learned_from(data):
    """train.py reads them; thinking stands in chats with effort high alone; a common word is one token."""
    tokenizer, config = load_tokenizer(f"{data}/start"), read_config(f"{data}/start")
    assert tokenizer.vocab_size == config.vocab_size and tokenizer.version == "v15"
    think = tokenizer.special["[THINK]"]
    for path in glob.glob(f"{data}/*.jsonl"):
        read = Chats(path, tokenizer, config, 512, Place())
        assert not read.dropped
        efforts = [chat["reasoning_effort"] for chat in chats(data, os.path.basename(path)[:-6])]
        for sample in read.samples:
            assert (think in sample.ids.tolist()) <= (efforts[sample.line - 1] == "high")
    for word in (*COLOURS, *SHAPES, *SHAPES.values(), *WORDS, *NUMBERS, "pink"):
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(f" {word}")) == 1
    text = "Ünïcödé, 42 [INST] and 北京"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_kinds_stand_beside_the_held_out_sets(data):
    for name in SETS:
        with open(os.path.join(data, f"{name}.kinds"), encoding="utf-8") as file:
            assert len(file.readlines()) == len(chats(data, name)) >= 3


def test_the_model_is_this_model():
    """Every part in its place, and the whole in 8 MB."""
    config = read_config(os.path.join(EXAMPLES, "tiny_config.json"))
    assert config.num_attention_heads > config.num_key_value_heads and not config.tie_word_embeddings
    assert config.rope.yarn and config.rope.factor == 64 and abs(config.rope.attention_factor - 1.41589) < 1e-5
    assert config.vision.spatial_merge_size == 2 and config.vision.patch_size == 14
    sizes = {name: parameter.numel() for name, parameter in build_model(config).named_parameters()}
    fp8 = sum(size for name, size in sizes.items() if re.match(r"layers\..*proj", name))
    assert fp8 + 2 * (sum(sizes.values()) - fp8) < 7.5e6


def test_mistral_common_reads_the_tokenizer_alike(data):
    pytest.importorskip("mistral_common")
    from chat_cases import oracle
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = load_tokenizer(f"{data}/start")
    theirs = MistralTokenizer.from_file(f"{data}/start/tekken.json", ValidationMode.finetuning)
    for chat in chats(data, "text") + [c for c in chats(data, "train") if "image_url" not in json.dumps(c)]:
        ours = encode_chat(tokenizer, chat["messages"], None, chat["reasoning_effort"], training=True)
        assert ours.ids == oracle(theirs, {"tools": None, **chat})


# ---- measuring


@pytest.mark.parametrize(
    "result, right",
    [
        (dict(text="red", tool_calls=[], finish_reason="stop"), True),
        (dict(text="red ", tool_calls=[], finish_reason="stop"), False),
        (dict(text="red", tool_calls=[], finish_reason="length"), False),
        (dict(text="red", tool_calls=[{"name": "f", "arguments": {}}], finish_reason="stop"), False),
    ],
)
def test_what_counts_as_right(result, right):
    thought = {"type": "thinking", "thinking": "It is red."}
    assert is_right(result, {"content": [thought, {"type": "text", "text": "red"}]}) is right


def test_calls_must_be_equal():
    call = {"name": "f", "arguments": {"count": 2}}
    expected = {"content": [], "tool_calls": [{"id": "x", "type": "function", "function": call}]}
    assert is_right(dict(text="", tool_calls=[call], finish_reason="stop"), expected)
    other = {"name": "f", "arguments": {"count": "2"}}
    assert not is_right(dict(text="", tool_calls=[other], finish_reason="stop"), expected)
