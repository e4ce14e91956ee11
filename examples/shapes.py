"""Pictures of shapes, questions about them, and everything else that the small checkpoint is trained and tested on.

    python examples/shapes.py OUT --chats 280000 --seed 0

OUT then holds the chats that `train.py` reads, each set beside the folder of its pictures, with no picture in two sets:

    train.jsonl                 training chats, in the order in which they are to be read (see `training_chats`)
    val.jsonl, calibrate.jsonl, review.jsonl    the same, to validate, to calibrate, for fine-tunes
    NAME.jsonl                  held-out questions for `evaluate.py`, one a chat; it says what each NAME is
    pink_train.jsonl, pink.jsonl    a colour that occurs nowhere else, for a fine-tune
    start/                      config.json and the tokenizer, learned from the text of val.jsonl (`tiny_tokenizer.py`)

Beside each held-out set, NAME.kinds names the kind of each of its questions. Everything follows from the seed.

A chat about a picture has several turns, because looking costs more than answering. Questions have thoughts
(`questions.py`); they are used with reasoning effort "high" and left out with "none". The sides of a picture have 24
to 140 pixels, seldom more than 112. The model's images go up to 140 pixels (`tiny_config.json`), as the real one's up
to 1540; larger ones are scaled down first.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator

from pictures import COLOURS, NEW_COLOUR, SHAPES, STYLES, WORDS, Style, any_style, draw_one, draw_scene, render
from PIL import Image
from questions import CALLS, FIRST, NUMBERS, OFTEN, SEVERAL, SINGLE, TOOLS, Asker, Question, small_talk
from tiny_tokenizer import write_tekken

# What is learned first, one after the other, as shares of the training: to tell what the only thing in a picture is; to
# read out what is where; to find what has just been named; to answer questions about up to three shapes.
SEEING, READING, FINDING, EASY = 0.007, 0.027, 0.047, 0.1
LATE = 0.5  # from here on, lessons are rarer still


def chat(questions: list[Question], images: list[str], effort: str = "none", offered: tuple[str, ...] = ()) -> dict:
    """Questions and answers as one training chat; with effort "high" the assistant thinks before it answers.

    images: one for each question, from the first on; when they run out, the questions go on about the last.
    """
    messages = []
    for i, question in enumerate(questions):
        content: list[dict] | str = question.text
        if i < len(images):
            content = [{"type": "image_url", "image_url": {"url": images[i]}}, {"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content})
        answer = [{"type": "text", "text": question.answer}] if question.answer else []
        if effort == "high" and question.thought:
            answer.insert(0, {"type": "thinking", "thinking": question.thought})
        messages.append({"role": "assistant", "content": answer})
        if question.call:
            messages[-1]["tool_calls"] = [{"id": f"call{i}", "type": "function", "function": question.call}]
            if i + 1 < len(questions):
                messages.append({"role": "tool", "tool_call_id": f"call{i}", "content": "ok"})
                messages.append({"role": "assistant", "content": "done"})
    tools = {"tools": [TOOLS[name] for name in offered]} if offered else {}
    return {"messages": messages, **tools, "reasoning_effort": effort}


class Album:
    """A folder of pictures, none of them twice and none that `seen`, shared between albums, knows already."""

    def __init__(self, out: str, name: str, seen: set[bytes]):
        self.out, self.folder, self.seen, self.count = out, f"images/{name}", seen, 0

    def add(self, image: Image.Image) -> str | None:
        """The picture's path relative to OUT, or None if it has been drawn before."""
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if digest in self.seen:
            return None
        self.seen.add(digest)
        path = f"{self.folder}/{self.count // 1000}/{self.count}.png"
        os.makedirs(os.path.dirname(os.path.join(self.out, path)), exist_ok=True)
        image.save(os.path.join(self.out, path))
        self.count += 1
        return path


def training_chats(album: Album, count: int, rng: random.Random, start: float = 0.0) -> Iterator[dict]:
    """`count` chats, easy ones first; from the share `start` of training on, so 1 means as they are at its end.

    A model that cannot see yet would guess for long if it was asked at once. From pictures of one thing it learns what
    shapes there are, but not to look at places: it mixes what is anywhere. Lists in the order of places teach that, and
    lists in any order, to find what a word names. All of them come back later, or they would be forgotten.
    """
    made = 0
    while made < count:
        done = start + (1 - start) * made / count
        early, lesson = done < EASY, rng.random() < (1 if done < SEEING else 0.02 if done >= LATE else 0.08)
        if lesson or done < FINDING or (early and rng.random() < 0.4):
            room, ordered = (1, 3)[done >= SEEING], done < READING
            scenes = [draw_one(rng, room) if lesson else draw_scene(rng, 2, 5) for _ in range(8 if lesson else 4)]
            images = [album.add(render(scene, rng, freedom=min(1.0, done / SEEING))) for scene in scenes]
            askers = [Asker(scene, rng) for scene in scenes]
            if all(images):
                made += 1
                yield chat([asker.lesson() if lesson else asker.listed(ordered) for asker in askers], images)
            continue
        shares = (54, 36, 0, 2) if early else (36, 46, 16, 2)
        what = rng.choices(("none", "high", "tools", "text"), shares)[0]
        if what == "text":
            made += 1
            yield chat([small_talk(rng) for _ in range(rng.randint(2, 6))], [], rng.choice(("none", "high")))
            continue
        longest = 140 if not early and rng.random() < 0.3 else 112
        scene = draw_scene(rng, 1 if early or rng.random() < 0.4 else 3, 3 if early else 5, longest=longest)
        asker, effort, offered = Asker(scene, rng), "none", ()
        if what == "none":
            kinds = FIRST if early else SINGLE + OFTEN + (SEVERAL * 2 if rng.random() < 0.5 else ())
            questions = asker.draw(kinds, rng.randint(7, 10))
            if early or rng.random() < 0.4:
                questions.insert(rng.choice((0, len(questions))), asker.listed())
        elif what == "high":
            kinds = FIRST if early else SINGLE + OFTEN + SEVERAL * 4 + ("count_beside",) * 4
            questions, effort = asker.draw(kinds, rng.randint(2, 4)), "high"
        else:
            questions, effort, offered = calls(asker)
        for _ in range(0 if what == "tools" or early else rng.choice((0, 1, 1, 2))):
            place = rng.randint(0, len(questions))
            questions[place:place] = asker.follow_up()
        style = any_style(rng) if not early and rng.random() < 0.4 else Style()
        if questions and (image := album.add(render(scene, rng, style=style))):
            made += 1
            yield chat(questions, [image], effort, offered)


def fine_tuning_chats(
    album: Album, count: int, rng: random.Random, shares: tuple[int, ...], colours: tuple[str, ...], must: str
) -> Iterator[dict]:
    """`count` chats for a fine-tune, in which the word `must` occurs. shares: of questions that stand alone, of chats
    without thoughts, of chats with thoughts, and of those that the model was trained on.

    New examples and old ones should look alike but for what is new: if only one kind had questions that stand alone, a
    model would learn from both that what stands alone is about pink.
    """
    every, made = tuple(dict.fromkeys((*COLOURS, *colours))), 0
    while made < count:
        what = rng.choices(("alone", "none", "high", "as before"), shares)[0]
        if what == "as before":
            made += 1
            yield from training_chats(album, 1, rng, 1.0)
            continue
        alone = what == "alone"
        scene = draw_scene(rng, 1 if alone else 3, 4 if alone else 6, colours=colours, must=must)
        kinds = SINGLE if alone else SINGLE + OFTEN + SEVERAL * 4
        least, most = {"alone": (1, 1), "none": (4, 8), "high": (2, 4)}[what]
        questions = Asker(scene, rng, every).draw(kinds, rng.randint(least, most))
        if len(questions) >= least and any(must in question.text + question.answer for question in questions):
            if image := album.add(render(scene, rng)):
                made += 1
                yield chat(questions, [image], "high" if what == "high" else "none")


def calls(asker: Asker) -> tuple[list[Question], str, tuple[str, ...]]:
    """Questions that want tools, among others; the reasoning effort; and the tools that are offered."""
    rng = asker.rng
    effort = rng.choice(("none", "none", "high"))
    kinds = (*CALLS * 2, *["set_light_counted"] * 2, "no_light")
    questions = asker.draw(kinds, rng.randint(1, 3)) + asker.draw(SINGLE, 1)
    rng.shuffle(questions)
    wanted = {question.call["name"] for question in questions if question.call}
    offered = [name for name in TOOLS if name in wanted or rng.random() < 0.3]
    rng.shuffle(offered)
    return questions, effort, tuple(offered)


def in_even_batches(chats: Iterable[dict], size: int, rng: random.Random) -> Iterator[dict]:
    """The same chats, `size` of about the same length after one another: a step that takes them has little padding.

    Only the chats of eight steps change places, so that what is early stays early.
    """
    chats = iter(chats)
    while group := sorted(itertools.islice(chats, 8 * size), key=length):
        batches = [group[i : i + size] for i in range(0, len(group), size)]
        rng.shuffle(batches)
        yield from itertools.chain.from_iterable(batches)


def length(chat: dict) -> int:
    """Tokens, roughly: an image has some 12, a tool 50, a word or sign 1."""
    words = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in strings(chat["messages"]))
    images = sum(part["type"] == "image_url" for m in chat["messages"] for part in m["content"] if type(part) is dict)
    return words + 12 * images + 50 * len(chat.get("tools", ()))


def write(out: str, name: str, chats: Iterable[dict], kinds: list[str] | None = None) -> None:
    for suffix, lines in (("jsonl", (json.dumps(chat, ensure_ascii=False) for chat in chats)), ("kinds", kinds)):
        if lines is not None:
            with open(os.path.join(out, f"{name}.{suffix}"), "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)


def held_out(
    album: Album,
    count: int,
    rng: random.Random,
    kinds: tuple[str, ...],
    scale: float = 1.0,
    styled: bool = False,
    **scene,
) -> tuple[list[dict], list[str]]:
    """Chats of one question about one picture each, and the questions' kinds. `scene`: what `draw_scene` is told.

    Of the kind "follow_up", a chat has the question before it, too. styled: each picture in one of STYLES, in turn,
    which is then called the kind.
    """
    chats, asked = [], []
    for i in range(count):
        kind, image = rng.choice(kinds), None
        name, style = list(STYLES.items())[i % len(STYLES)] if styled else ("", lambda rng: Style())
        while image is None:
            drawn = draw_scene(rng, **scene)
            asker = Asker(drawn, rng, scene.get("colours", tuple(COLOURS)))
            questions = asker.follow_up() if kind == "follow_up" else asker.draw((kind,), 1)
            if questions and scene.get("must", "") in questions[0].text + questions[0].answer:
                image = album.add(render(drawn, rng, scale, style=style(rng)))
        offered = tuple(TOOLS) if kind in CALLS else ()
        chats.append(chat(questions, [image], "high", offered))
        asked.append(name or questions[-1].kind)
    return chats, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--chats", type=int, default=280000, metavar="N", help="training chats")
    parser.add_argument("--review", type=int, default=1000, metavar="N", help="of review.jsonl, for fine-tunes")
    parser.add_argument("--held-out", type=int, default=1000, metavar="N", help="pictures a held-out set")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="chats a step, of about the same length")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    if os.path.exists(args.out):
        parser.exit(2, f"error: {args.out}: already exists; choose a new folder or remove it\n")
    os.makedirs(args.out)
    out, n, seen = args.out, args.held_out, set()

    def rng(name: str) -> random.Random:
        return random.Random(f"{args.seed} {name}")

    about_shapes = tuple(kind for kind in SINGLE if kind != "read")
    anywhere = tuple(kind for kind in SINGLE if kind != "where")  # such narrow pictures have no four corners
    for name, count, kinds, extra in (
        ("single", n, SINGLE, {}),
        ("counting", n, ("count",), {}),
        ("corners", n, ("where",), {}),
        ("sides", n, ("which_side",), {}),
        ("yes_or_no", n, ("side",), {}),
        ("several", n, SEVERAL, dict(least=2)),
        ("crowded", n, SEVERAL, dict(least=3)),
        ("tools", n, CALLS, {}),
        ("counted_calls", n, ("set_light_counted",), {}),
        ("large", n, SINGLE, dict(scale=2.0)),
        ("wide", n, anywhere, dict(wide=True)),
        ("styles", n, SINGLE, dict(styled=True)),
        ("absent", n, ("absent",), {}),
        ("follow_up", n, ("follow_up",), {}),
        ("pink", n, about_shapes, dict(colours=(*COLOURS, *NEW_COLOUR), must="pink")),
    ):
        write(out, name, *held_out(Album(out, name, seen), count, rng(name), kinds, **extra))
    talk = [small_talk(rng(f"text {i}")) for i in range(n // 4)]
    write(out, "text", [chat([question], []) for question in talk], [question.kind for question in talk])
    for name, count, begin in (("val", n // 2, 1.0), ("calibrate", n // 4, 1.0), ("train", args.chats, 0.0)):
        chats = training_chats(Album(out, name, seen), count, rng(name), begin)
        write(out, name, in_even_batches(chats, args.batch, rng(f"{name} batches")))

    # Pink has to be told from red and purple, which are more frequent beside it for that.
    near = (*COLOURS, "pink", "pink", "red", "purple")
    for name, count, shares, colours, must in (
        ("pink_train", 500, (3, 10, 7, 0), near, "pink"),
        ("review", args.review, (4, 5, 8, 3), tuple(COLOURS), ""),
    ):
        write(out, name, fine_tuning_chats(Album(out, name, seen), count, rng(name), shares, colours, must))

    start = os.path.join(out, "start")
    os.makedirs(start)
    shutil.copy(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny_config.json"), f"{start}/config.json")
    with open(os.path.join(out, "val.jsonl"), encoding="utf-8") as file:
        texts = [text for line in file for text in strings(json.loads(line))]
    texts += [json.dumps(tool) for tool in TOOLS.values()] * 40
    texts += ['{"reasoning_effort": "none"}', '{"reasoning_effort": "high"}'] * 200
    for word in (*COLOURS, *NEW_COLOUR, *SHAPES, *SHAPES.values(), *WORDS, *NUMBERS):
        texts += [word, f" {word}"] * 20
    write_tekken(os.path.join(start, "tekken.json"), texts)


def strings(value) -> Iterator[str]:
    """Every text in a JSON value that the model will read."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key == "arguments":
                yield json.dumps(part)
            elif key not in ("type", "role", "url", "id", "tool_call_id", "tools", "reasoning_effort"):
                yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)
    else:
        yield value


if __name__ == "__main__":
    main()
