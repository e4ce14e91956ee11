"""Questions about a scene, with their answers and the thoughts that lead there; and a little small talk."""

import random
from dataclasses import dataclass

from pictures import COLOURS, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # name: (axis, sign)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    thought: str
    call: dict | None = None  # the tool call that answers it, instead of text


class Asker:
    """Questions about one scene. A method for each kind returns one, or None where the scene does not suit it.

    advanced: thoughts say where a shape is before they say what it is, "b2 red star". Columns are a, b, …, rows 1, 2, …
    of the 28 pixels that are a token to the model: it decides where to look next, and then looks there.
    """

    def __init__(self, scene: Scene, rng: random.Random, colours=tuple(COLOURS), advanced: bool = True):
        self.scene, self.rng, self.things, self.colours = scene, rng, scene.things, colours
        self.advanced = advanced

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

    def place(self, thing: Thing, before: str = "", after: str = "") -> str:
        """ "b2" between `before` and `after`, or nothing at all before thoughts are advanced."""
        if not self.advanced:
            return ""
        pixels = [count * side for count, side in zip((self.scene.columns, self.scene.rows), self.scene.cell)]
        column, row = (
            int((place + 0.5) * side / total * -(-round(total) // 28))
            for place, side, total in zip((thing.column, thing.row), self.scene.cell, pixels)
        )
        return f"{before}{'abcdefgh'[column]}{row + 1}{after}"

    def names(self, things: list[Thing]) -> str:
        return ", ".join(self.place(thing, after=" ") + str(thing) for thing in things) or "none"

    def scan(self, axis: int, among: list[Thing] | None = None) -> str:
        order = "From left to right: " if axis == 0 else "From top to bottom: "
        return order + self.names([t for t in self.scene.things_by[axis] if among is None or t in among]) + "."

    def counted(self, plural: str, among: list[Thing]) -> str:
        return f"{plural}: {self.names(self.in_order(among))}: {len(among)}."

    def in_order(self, among: list[Thing]) -> list[Thing]:
        return [t for t in self.scene.things_by[0] if t in among]

    def say(self, *wordings: str) -> str:
        return self.rng.choice(wordings)

    # one step

    def colour(self):
        if (found := self.one()) and found[0] in SHAPES:
            name, thing = found
            text = self.say(
                f"What colour is the {name}?", f"Which colour has the {name}?", f"Name the {name}'s colour."
            )
            return Question("colour", text, thing.colour, f"The {name}{self.place(thing, ' at ')} is {thing.colour}.")

    def shape(self):
        thing = self.rng.choice(self.things)
        if sum(t.colour == thing.colour for t in self.things) == 1:
            c = thing.colour
            text = self.say(f"What shape is {c}?", f"Which shape is {c}?", f"Name the {c} shape.")
            return Question("shape", text, thing.shape, f"The {c} shape{self.place(thing, ' at ')} is a {thing.shape}.")

    def exists(self):
        there = self.rng.random() < 0.5
        thing = self.rng.choice(self.things)
        colour, shape = thing.colour, thing.shape
        if not there:
            colour, shape = self.rng.choice(
                [(self.rng.choice(self.colours), shape), (colour, self.rng.choice(list(SHAPES)))]
            )
        name, among = f"{colour} {shape}", [t for t in self.things if t.shape == shape]
        text = self.say(f"Is there a {name}?", f"Do you see a {name}?", f"Does the picture show a {name}?")
        answer = "yes" if name in map(str, self.things) else "no"
        return Question("exists", text, answer, f"{SHAPES[shape]}: {self.names(self.in_order(among))}.")

    def count(self):
        plural, among = self.group()
        if self.rng.random() < 0.15:
            plural, among = "shapes", self.things
        text = self.say(f"How many {plural} are there?", f"Count the {plural}.", f"What is the number of {plural}?")
        return Question("count", text, str(len(among)), self.counted(plural, among))

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
            return Question("extreme", text, str(found[0]), self.scan(axis))

    def side(self):
        a, b = self.one(), self.one()
        side = self.rng.choice(list(SIDES))
        axis, sign = SIDES[side]
        if a and b and a[1].place(axis) != b[1].place(axis):
            of = side + " of" if axis == 0 else side
            text = self.say(f"Is the {a[0]} {of} the {b[0]}?", f"Do you see the {a[0]} {of} the {b[0]}?")
            answer = "yes" if sign * (a[1].place(axis) - b[1].place(axis)) > 0 else "no"
            return Question("side", text, answer, self.scan(axis, [a[1], b[1]]))

    def beside(self):
        found, side = self.one(), self.rng.choice(list(SIDES))
        axis, sign = SIDES[side]
        if found:
            among = [t for t in self.things if sign * (t.place(axis) - found[1].place(axis)) > 0]
            if len(among) == 1:
                of = side + " of" if axis == 0 else side
                text = self.say(f"What is {of} the {found[0]}?", f"Which shape is {of} the {found[0]}?")
                return Question("beside", text, str(among[0]), self.scan(axis))

    def where(self):
        found, (c, r) = self.one(), (self.scene.columns - 1, self.scene.rows - 1)
        if found and c and r and found[1].column in (0, c) and found[1].row in (0, r):
            place = ("bottom " if found[1].row else "top ") + ("right" if found[1].column else "left")
            text = self.say(f"Where is the {found[0]}?", f"In which corner is the {found[0]}?")
            return Question("where", text, place, f"The {found[0]}{self.place(found[1], ' at ')} is at the {place}.")

    def describe(self):
        """Everything that there is: a lesson rather than a test."""
        parts = list(map(str, self.scene.things_by[0]))
        parts += [f"the digit {self.scene.digit}"] * bool(self.scene.digit)
        parts += [f"the word {self.scene.word}"] * bool(self.scene.word)
        return Question("describe", self.say("Describe the picture.", "What do you see?"), ", ".join(parts), "")

    def everything(self):
        """Where everything is, row by row: another lesson."""
        text = self.say("Where is everything?", "List all shapes.")
        return Question("everything", text, self.names(self.scene.things_by[1]), "")

    def lesson(self):
        """A question about the only thing in a picture; mostly with one word for an answer.

        Right after the question is where a young model looks at the picture first, to find colours, which are easy. In
        the middle of a sentence it has no reason to look before it can tell shapes, and without looking it cannot
        learn to.
        """
        scene = self.scene
        if self.rng.random() < 0.2:
            return self.describe()
        if self.things and self.rng.random() < 0.3:
            return Question("lesson", self.say("What colour is it?", "Which colour is it?"), self.things[0].colour, "")
        name = scene.digit or scene.word or self.things[0].shape
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
            of = side + " of" if axis == 0 else side
            hits = [t for t in among if sign * (t.place(axis) - found[1].place(axis)) > 0]
            scan, ordered = self.scan(axis), [t for t in self.scene.things_by[axis] if t in hits]
            thought = f"{scan} {plural} {of} the {found[0]}: {self.names(ordered)}: {len(hits)}."
            return self.sum(len(hits), f"How many {plural} are {of} the {found[0]}", thought, "count_beside")

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

    def set_light(self):
        (plural, among), found = self.group(0.1), self.one()
        if found and found[0] in SHAPES and self.advanced:
            n = self.rng.randint(1, 9)
            text = self.say(
                f"Flash the light in the {found[0]}'s colour, {NUMBERS[n]} times.",
                f"Set the light to the colour of the {found[0]}, {n} times.",
            )
            call = {"name": "set_light", "arguments": {"colour": found[1].colour, "count": n}}
            thought = f"The {found[0]}{self.place(found[1], ' at ')} is {found[1].colour}."
            return Question("set_light", text, "", thought, call)
        if found and found[0] in SHAPES and among:
            text = self.say(
                f"Set the light to the colour of the {found[0]}, once for each of the {plural}.",
                f"Flash the light in the {found[0]}'s colour, as often as there are {plural}.",
            )
            call = {"name": "set_light", "arguments": {"colour": found[1].colour, "count": len(among)}}
            thought = f"The {found[0]} is {found[1].colour}. {self.counted(plural, among)}"
            return Question("set_light", text, "", thought, call)

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
SINGLE = ("colour", "shape", "exists", "count", "count", "read", "read", "extreme", "beside", "where")
SEVERAL = ("count_beside", "count_beside", "count_sum", "more", "text_sum")
COMPARE = ("side",)  # trained on, but no held-out set has it: the small model does not learn it
OFTEN = ("count", "count", "where", "where", "side")  # what is learned last
# The first part of training has its own shares.
FIRST_SINGLE = ("colour", "shape", "exists", "count", "count", "read", "read", "extreme", "side", "beside", "where")
FIRST_SEVERAL = ("count_beside", "count_beside", "count_sum", "more", "text_sum")
FIRST_OFTEN = ("colour", "colour", "colour", "exists", "exists", "side", "where", "where", "read")
CALLS = ("set_light", "set_light", "press_key", "move_shape")


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


def small_talk(rng: random.Random) -> Question:
    if rng.random() < 0.5:
        text, answer = rng.choice(list(SMALL_TALK.items()))
        return Question("talk", text, answer, "")
    a, b = rng.randint(0, 12), rng.randint(0, 9)
    if rng.random() < 0.5:
        a, sign, result = a + b, "-", a
    else:
        sign, result = "+", a + b
    text = rng.choice((f"What is {a} {sign} {b}?", f"{a} {sign} {b} = ?"))
    return Question("sum", text, str(result), f"{a} {sign} {b} = {result}.")
