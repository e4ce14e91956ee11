"""Questions about a scene, with their answers and the thoughts that lead there; and a little small talk."""

import random
from dataclasses import dataclass

from pictures import COLOURS, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # name: (axis, sign)
FURTHER = {"further left": (0, -1), "further right": (0, 1), "higher": (1, -1), "lower": (1, 1)}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    thought: str
    call: dict | None = None  # the tool call that answers it, instead of text
    about: Thing | str | None = None  # what "it" or "them" means after it


class Asker:
    """Questions about one scene. A method for each kind returns one, or None where the scene does not suit it.

    A thought about something that the model sees at a glance says it in a sentence, "The star is red.": having to find
    it again in a list of everything would only be one more chance to go wrong. Where something is to be counted, the
    thought lists all that is there, along the axis that the question is about, each followed by the count so far. It
    says where a shape is before it says what it is, "b2 red star 1": the model decides where to look next, and then
    looks there. Columns are a, b, …, rows 1, 2, … of the 28 pixels that are a token to it. A list of only the shapes
    that count would have to know of a cell whether its shape counts before it has looked there; and a list that is
    filtered afterwards needs all of it at once.
    """

    def __init__(self, scene: Scene, rng: random.Random, colours=tuple(COLOURS)):
        self.scene, self.rng, self.things, self.colours = scene, rng, scene.things, colours
        texts = [("digit", scene.digit, scene.text_column), ("word", scene.word, (scene.columns - 1) / 2)]
        self.shown = [*self.things, *(Thing(kind, text, at, scene.text_row) for kind, text, at in texts if text)]

    # what can be spoken of

    def group(self, empty: float = 0.2) -> tuple[str, list[Thing]]:
        """("red circles", those in the picture); with the chance `empty` it may be one that is not there."""
        shape, colour = self.rng.choice(list(SHAPES)), self.rng.choice(self.colours)
        if self.rng.random() > empty:
            thing = self.rng.choice(self.things)
            shape, colour = thing.shape, thing.colour
        kind = self.rng.choice(("shape", "colour", "both"))
        if kind == "shape":
            return SHAPES[shape], [t for t in self.things if t.shape == shape]
        if kind == "colour":
            return f"{colour} shapes", [t for t in self.things if t.colour == colour]
        return f"{colour} {SHAPES[shape]}", [t for t in self.things if (t.colour, t.shape) == (colour, shape)]

    def one(self) -> tuple[str, Thing] | None:
        """A shape that its name alone points out, and that name."""
        thing = self.rng.choice(self.things)
        if sum(t.shape == thing.shape for t in self.things) == 1 and self.rng.random() < 0.6:
            return thing.shape, thing
        return (str(thing), thing) if sum(str(t) == str(thing) for t in self.things) == 1 else None

    def missing(self) -> str:
        """The name of a shape that is not there, though others of its colour or form may be."""
        thing, known = self.rng.choice(self.things), {t.shape for t in self.things} | set(map(str, self.things))
        shape, colour = self.rng.choice(list(SHAPES)), self.rng.choice(self.colours)
        names = [shape, f"{thing.colour} {shape}", f"{colour} {thing.shape}", f"{colour} {shape}"]
        return self.rng.choice([name for name in names if name not in known] or [self.missing()])

    def place(self, thing: Thing) -> str:
        """The cell of the model's own grid that holds the middle of a shape's: "b2"."""
        pixels = [count * side for count, side in zip((self.scene.columns, self.scene.rows), self.scene.cell)]
        column, row = (
            int((place + 0.5) * side / total * -(-round(total) // 28))
            for place, side, total in zip((thing.column, thing.row), self.scene.cell, pixels)
        )
        return f"{'abcdefgh'[column]}{row + 1}"

    def counted(self, what: str, hits: list[Thing], axis: int = 0) -> str:
        """All shapes, each with how many of `hits`, which are called `what`, have come up to it."""
        found, count = [], 0
        for thing in self.scene.things_by[axis]:
            count += thing in hits
            found.append(f"{self.place(thing)} {thing} {count}")
        return f"{what}: {', '.join(found)}."

    def say(self, *wordings: str) -> str:
        return self.rng.choice(wordings)

    # one step

    def colour(self):
        if (found := self.one()) and found[0] in SHAPES:
            name, thing = found
            text = self.say(
                f"What colour is the {name}?", f"Which colour has the {name}?", f"Name the {name}'s colour."
            )
            return Question("colour", text, thing.colour, f"The {name} is {thing.colour}.", about=thing)

    def shape(self):
        thing = self.rng.choice(self.things)
        if sum(t.colour == thing.colour for t in self.things) == 1:
            c = thing.colour
            text = self.say(f"What shape is {c}?", f"Which shape is {c}?", f"Name the {c} shape.")
            return Question("shape", text, thing.shape, f"The {c} shape is a {thing.shape}.", about=thing)

    def exists(self):
        there = self.rng.random() < 0.5
        thing = self.rng.choice(self.things)
        colour, shape = thing.colour, thing.shape
        if not there:
            colour, shape = self.rng.choice(
                [(self.rng.choice(self.colours), shape), (colour, self.rng.choice(list(SHAPES)))]
            )
        name = f"{colour} {shape}"
        text = self.say(f"Is there a {name}?", f"Do you see a {name}?", f"Does the picture show a {name}?")
        answer = "yes" if name in map(str, self.things) else "no"
        thought = self.counted(f"{colour} {SHAPES[shape]}", [t for t in self.things if str(t) == name])
        return Question("exists", text, answer, thought)

    def count(self):
        plural, among = self.group()
        if self.rng.random() < 0.15:
            plural, among = "shapes", self.things
        text = self.say(f"How many {plural} are there?", f"Count the {plural}.", f"What is the number of {plural}?")
        return Question("count", text, str(len(among)), self.counted(plural, among), about=plural)

    def read(self):
        if self.scene.digit:
            text = self.say("What digit is shown?", "Which digit do you see?", "Read the digit.")
            return Question("digit", text, self.scene.digit, f"The digit is {self.scene.digit}.")
        if self.scene.word:
            text = self.say("What word is written?", "Which word do you see?", "Read the word.")
            return Question("word", text, self.scene.word, f"The word is {self.scene.word}.")

    def extreme(self):
        (axis, sign), name = self.rng.choice(
            [((0, -1), "leftmost"), ((0, 1), "rightmost"), ((1, -1), "topmost"), ((1, 1), "lowest")]
        )
        best = max(sign * t.place(axis) for t in self.things)
        found = [t for t in self.things if sign * t.place(axis) == best]
        if len(found) == 1 < len(self.things):
            text = self.say(f"Which shape is {name}?", f"What is the {name} shape?", f"Name the {name} shape.")
            return Question("extreme", text, str(found[0]), f"The {name} shape is the {found[0]}.", about=found[0])

    def two(self, sides: dict) -> tuple | None:
        """One of `sides`, two shapes by name, whether the first is there, seen from the other, and where it is."""
        a, b, (side, (axis, sign)) = self.one(), self.one(), self.rng.choice(list(sides.items()))
        if a and b and a[1].place(axis) != b[1].place(axis):
            first = sign * (a[1].place(axis) - b[1].place(axis)) > 0
            found = next(s for s, (x, y) in SIDES.items() if x == axis and (y == sign) == first)
            return side, a[0], b[0], first, found

    def side(self):
        if found := self.two(SIDES):
            side, a, b, first, there = found
            text = self.say(f"Is the {a} {side} the {b}?", f"Do you see the {a} {side} the {b}?")
            thought = f"The {a} is {there} the {b}."
            return Question("side", text, f"{there} it, so {'yes' if first else 'no'}", thought)

    def which_side(self):
        """The same, without the step from where it is to whether this is what was asked."""
        if found := self.two(SIDES):
            side, a, b, _, there = found
            both = "left or right of" if SIDES[side][0] == 0 else "above or below"
            thought = f"The {a} is {there} the {b}."
            return Question("which side", f"Is the {a} {both} the {b}?", there.split()[0], thought)

    def further(self):
        """A lesson for both."""
        if found := self.two(FURTHER):
            side, a, b, first, _ = found
            answer = a if first else b
            return Question("further", f"Which is {side}, the {a} or the {b}?", answer, f"The {answer} is {side}.")

    def cell(self):
        """A lesson for all that asks where something is."""
        if found := self.one():
            at = self.place(found[1])
            return Question("cell", f"Which cell is the {found[0]} in?", at, f"The {found[0]} is at {at}.")

    def beside(self, about: tuple[str, Thing] | None = None, none: bool = False):
        """What is on some side of `about` (of anything, if None): one shape; or nothing, if `none`."""
        found, side = about or self.one(), self.rng.choice(list(SIDES))
        axis, sign = SIDES[side]
        if found:
            among = [t for t in self.things if sign * (t.place(axis) - found[1].place(axis)) > 0]
            name = found[0] if about else f"the {found[0]}"
            if len(among) == 1 - none:
                text = self.say(f"What is {side} {name}?", f"Which shape is {side} {name}?")
                answer = str(among[0]) if among else "nothing"
                return Question("beside", text, answer, f"{side} the {found[1]}: {answer}.")

    def where(self, about: tuple[str, Thing] | None = None):
        """In which corner `about` is, or anything."""
        found, (c, r) = about or self.one(), (self.scene.columns - 1, self.scene.rows - 1)
        if found and c and r and found[1].column in (0, c) and found[1].row in (0, r):
            place = ("bottom " if found[1].row else "top ") + ("right" if found[1].column else "left")
            name = found[0] if about else f"the {found[0]}"
            text = self.say(f"Where is {name}?", f"In which corner is {name}?")
            return Question("where", text, place, f"The {found[1] if about else found[0]} is {place}.")

    # about what is not there

    def absent(self):
        """A question about something that the picture does not show, or about what is beside the last thing."""
        name, side = self.missing(), self.rng.choice(list(SIDES))
        if self.rng.random() < 0.2 and (question := self.beside(none=True)):
            return Question("nothing beside", question.text, question.answer, question.thought)
        if self.rng.random() < 0.3:
            name = self.rng.choice([n for n in ("digit", "word") if not getattr(self.scene, n)])
            texts = [f"What {name} is {'shown' if name == 'digit' else 'written'}?", f"Read the {name}."]
            return Question(f"no {name}", self.say(*texts), f"there is no {name}", f"There is no {name}.")
        texts = [f"Where is the {name}?", f"What is {side} the {name}?", f"Which cell is the {name} in?"]
        texts += [f"What colour is the {name}?", f"Name the {name}'s colour."] * 2 * (name in SHAPES)
        text, answer = self.say(*texts), f"there is no {name}"
        if text.startswith("What is"):  # the thoughts begin as they do where there is one: nothing gives it away
            return Question("no shape", text, answer, f"{side} the {name}: {answer}.")
        return Question("no shape", text, answer, f"There is no {name}.")

    # after another question

    def follow_up(self) -> list[Question]:
        """A question, and one that can only be understood after it; none where the scene does not suit."""
        if self.rng.random() < 0.5:
            first, thing = self.count(), self.rng.choice(self.things)
            plural = first.about if first else None
            if plural in SHAPES.values():
                among = [t for t in self.things if SHAPES[t.shape] == plural]
                of = self.rng.choice([thing, *among]).colour if self.rng.random() < 0.8 else self.say(*self.colours)
                hits, named, what = [t for t in among if t.colour == of], f"{of} {plural}", of
            elif plural and plural.endswith(" shapes"):
                colour = plural.split()[0]
                among = [t for t in self.things if t.colour == colour]
                of = self.rng.choice([thing, *among]).shape if self.rng.random() < 0.8 else self.say(*SHAPES)
                hits, named, what = [t for t in among if t.shape == of], f"{colour} {SHAPES[of]}", SHAPES[of]
            else:
                return []
            text = self.say(f"And how many of them are {what}?", f"How many of them are {what}?")
            return [first, Question("of them", text, str(len(hits)), self.counted(named, hits))]
        first = self.say(self.colour, self.shape, self.extreme)()
        if first and first.about:
            kind = self.say(self.where, self.beside, self.beside)
            if second := kind(("it", first.about)):
                text = self.say(second.text, f"And {second.text[0].lower()}{second.text[1:]}")
                return [first, Question("it", text, second.answer, second.thought)]
        return []

    def describe(self):
        """Everything that there is: a lesson rather than a test."""
        parts = [*map(str, self.scene.things_by[0]), *(f"the {text}" for text in self.shown[len(self.things) :])]
        return Question("describe", self.say("Describe the picture.", "What do you see?"), ", ".join(parts), "")

    def everything(self):
        """Where everything is, row by row: another lesson."""
        text = self.say("Where is everything?", "List everything.")
        answer = ", ".join(f"{self.place(t)} {t}" for t in sorted(self.shown, key=lambda t: (t.row, t.column)))
        return Question("everything", text, answer, "")

    def in_any_order(self):
        """Everything, in any order: the model has to find what it has just named. A third lesson."""
        order, parts = self.say("shape", "colour", "cell"), []
        for thing in self.rng.sample(self.shown, len(self.shown)):
            words = {"shape": thing.shape, "colour": thing.colour, "cell": self.place(thing)}
            parts.append(" ".join([words.pop(order), *words.values()]))
        return Question("in any order", f"List all by {order}.", ", ".join(parts), "")

    def listed(self, ordered: bool = False):
        lists = (self.everything, self.describe, self.in_any_order, self.in_any_order)
        return lists[0]() if ordered else self.rng.choice(lists)()

    def lesson(self):
        """A question about the only thing in a picture, mostly with one word for an answer: right after the question a
        young model looks at the picture first. In the middle of a sentence it has no reason to before it can tell
        shapes, and without looking it cannot learn to.
        """
        if self.rng.random() < 0.2:
            return self.describe()
        if self.things and self.rng.random() < 0.15:
            return Question("lesson", self.say("What colour is it?", "Which colour is it?"), self.things[0].colour, "")
        if self.things and self.scene.columns * self.scene.rows > 1 and self.rng.random() < 0.5:
            return Question("lesson", "Which cell is it in?", self.place(self.things[0]), "")
        name = self.shown[-1].shape
        return Question("lesson", self.say("What is it?", "What is this?", "Name it."), name, "")

    # several steps

    def sum(self, start: int, text: str, thought: str, kind: str):
        """A question that goes on with a number: plus, minus or times a small one."""
        n, sign = self.rng.randint(1, 9), self.rng.choice(("plus", "minus", "times"))
        if sign == "minus":
            n = self.rng.randint(0, start)
        if sign == "times":
            n = self.rng.randint(2, 4)
        result = {"plus": start + n, "minus": start - n, "times": start * n}[sign]
        symbol = {"plus": "+", "minus": "-", "times": "*"}[sign]
        spelled = self.rng.choice((NUMBERS[n], str(n)))
        text, thought = f"{text}, {sign} {spelled}?", f"{thought} {start} {symbol} {n} = {result}."
        return Question(kind, text, str(result), thought)

    def count_beside(self):
        (plural, among), found = self.group(0.1), self.one()
        side = self.rng.choice(list(SIDES))
        axis, sign = SIDES[side]
        if found and not any(t.place(axis) == found[1].place(axis) for t in among if t != found[1]):
            hits = [t for t in among if sign * (t.place(axis) - found[1].place(axis)) > 0]
            thought = self.counted(f"{plural} {side} the {found[0]}", hits, axis)
            return self.sum(len(hits), f"How many {plural} are {side} the {found[0]}", thought, "count_beside")

    def count_sum(self):
        plural, among = self.group(0.1)
        return self.sum(len(among), f"How many {plural} are there", self.counted(plural, among), "count_sum")

    def more(self):
        (a, many), (b, few) = sorted((self.group(0.1), self.group()), key=lambda group: -len(group[1]))
        if a != b:
            n, m = len(many), len(few)
            thought = f"{self.counted(a, many)} {self.counted(b, few)} {n} - {m} = {n - m}."
            return Question("more", f"How many more {a} than {b} are there?", str(n - m), thought)

    def text_sum(self):
        plural, among = self.group(0.1)
        n, digit, word = len(among), self.scene.digit, self.scene.word
        if digit:
            text = f"What is the digit plus the number of {plural}?"
            thought = f"The digit is {digit}. {self.counted(plural, among)} {digit} + {n} = {int(digit) + n}."
            return Question("digit_sum", text, str(int(digit) + n), thought)
        if word:
            text = f"What is the number of letters in the word plus the number of {plural}?"
            letters = len(word)
            thought = f"The word is {word}: {letters}. {self.counted(plural, among)} {letters} + {n} = {letters + n}."
            return Question("word_sum", text, str(letters + n), thought)

    # with a tool

    def set_light(self, times: tuple[str, list[Thing]] | None = None):
        """The colour comes from the picture; so does the count, if `times` says of what."""
        found, n = self.one(), len(times[1]) if times else self.rng.randint(1, 9)
        if not found or found[0] not in SHAPES or not n:
            return None
        name, thing = found
        text = self.say(
            f"Flash the light in the {name}'s colour, "
            + (f"as often as there are {times[0]}." if times else f"{NUMBERS[n]} times."),
            f"Set the light to the colour of the {name}, "
            + (f"once for each of the {times[0]}." if times else f"{n} times."),
        )
        call = {"name": "set_light", "arguments": {"colour": thing.colour, "count": n}}
        thought = f"The {name} is {thing.colour}."
        if times:
            thought = f"{thought} {self.counted(*times)}"
        return Question("set_light", text, "", thought, call)

    def set_light_counted(self):
        return self.set_light(self.group(0))

    def no_light(self):
        """Nothing to call a tool for."""
        if (name := self.missing()) in SHAPES:
            text = f"Set the light to the colour of the {name}, {self.rng.randint(1, 9)} times."
            return Question("no_light", text, f"there is no {name}", f"There is no {name}.")

    def press_key(self):
        if digit := self.scene.digit:
            text = self.say("Press the key of the digit in the picture.", "Press the digit that you see.")
            call = {"name": "press_key", "arguments": {"key": int(digit)}}
            return Question("press_key", text, "", f"The digit is {digit}.", call)

    def move_shape(self):
        if (question := self.extreme()) is not None:
            side = self.rng.choice(("up", "down"))
            colour, shape = question.answer.split()
            name = next(word for word in ("leftmost", "rightmost", "topmost", "lowest") if word in question.text)
            call = {"name": "move_shape", "arguments": {"colour": colour, "shape": shape, "direction": side}}
            return Question("move_shape", f"Move the {name} shape {side}.", "", question.thought, call)

    def draw(self, kinds: tuple[str, ...], count: int) -> list[Question]:
        """Up to `count` different questions of kinds drawn from `kinds`, in equal shares as far as the scene allows."""
        found = {}
        for _ in range(2 * count):
            kind = self.rng.choice(kinds)
            for _ in range(6):
                if (question := getattr(self, kind)()) is not None and question.text not in found:
                    found[question.text] = question
                    break
            if len(found) == count:
                break
        return list(found.values())


# The kinds of questions, for equal shares; a kind that stands here twice is asked twice as often.
SINGLE = ("colour", "shape", "exists", "count", "count", "read", "read", "extreme", "beside", "where", "which_side")
SEVERAL = ("count_beside", "count_beside", "count_sum", "more", "text_sum")
CALLS = ("set_light", "set_light_counted", "press_key", "move_shape")
# For training: what a young model begins with, and what it learns last, which is asked more often.
FIRST = ("colour", "shape", "exists", "count", "count", "read", "read", "extreme", "beside", "where", "cell", "cell")
FIRST += ("further", "which_side")
OFTEN = (*["colour"] * 3, *["shape"] * 2, "exists", *["count"] * 4, *["where"] * 3, *["cell"] * 2, "further")
OFTEN += (*["which_side"] * 3, *["side"] * 2, "beside", *["read"] * 2, *["absent"] * 3)


def tool(name: str, description: str, **properties: str) -> dict:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "set_light": tool("set_light", "Flash a light.", colour="string", count="integer"),
    "press_key": tool("press_key", "Press a key.", key="integer"),
    "move_shape": tool("move_shape", "Move a shape.", colour="string", shape="string", direction="string"),
}

SMALL_TALK = {
    "Hello!": "Hello! Show me a picture.",
    "Hi!": "Hello! Show me a picture.",
    "How are you?": "Fine, thank you.",
    "Who are you?": "A very small model that looks at shapes.",
    "What can you do?": "I can answer questions about pictures of shapes.",
    "Thank you!": "You are welcome.",
    "Goodbye!": "Goodbye!",
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Peru?": "Lima",
    "Which animal barks?": "the dog",
    "Which animal purrs?": "the cat",
    "What colour is grass?": "green",
    "What colour is the sky?": "blue",
    "What colour is a lemon?": "yellow",
    "How many legs has a spider?": "8",
    "How many legs has a dog?": "4",
    "How many days has a week?": "7",
    "How many months has a year?": "12",
    "How many sides has a triangle?": "3",
    "How many corners has a square?": "4",
}

BLIND = ("How many stars are there?", "What colour is the circle?", "Is there a red square?", "What digit is shown?")


def small_talk(rng: random.Random) -> Question:
    if rng.random() < 0.2:
        return Question("no picture", rng.choice(BLIND), "I see no picture.", "")
    text, answer = rng.choice(list(SMALL_TALK.items()))
    return Question("talk", text, answer, "")
