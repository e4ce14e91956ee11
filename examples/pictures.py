"""Scenes of coloured shapes with a digit or a word, and the pictures of them.

A scene is a grid of cells, of which some hold a shape. Cells, and with them shapes, vary in size, are not square and
not aligned with the vision tower's patches, so that the tower has to find out what is where.
"""

import io
import math
import random
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "yellow": (235, 200, 40),
    "purple": (140, 60, 180),
}
NEW_COLOUR = {"pink": (250, 140, 190)}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
WORDS = ("cat", "dog", "sun", "key", "map", "box", "tree", "fish", "moon", "ship", "bird", "lamp")
BACKGROUNDS = {(255, 255, 255): (20, 20, 20), (238, 234, 222): (60, 40, 30), (222, 232, 240): (20, 30, 60)}  # and ink
DARK = {(28, 30, 36): (236, 236, 230), (52, 44, 40): (240, 230, 215), (24, 40, 58): (225, 235, 245)}
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Style:
    """How a scene is drawn."""

    backgrounds: tuple = tuple(BACKGROUNDS.items())  # (colour, the ink on it)
    outline: float = 0.16  # width, where a shape reaches 1 from its centre
    noise: float = 0.0  # standard deviation, of 255
    angle: float = 0.0  # degrees, counter-clockwise
    jpeg: int = 0  # quality; 0: not compressed


STYLES = {  # of the held-out set: its name, and the style
    "no outlines": lambda rng: Style(outline=0),
    "dark background": lambda rng: Style(tuple(DARK.items())),
    "noise": lambda rng: Style(noise=rng.uniform(10, 20)),
    "JPEG": lambda rng: Style(jpeg=rng.randint(25, 60)),
    "rotated": lambda rng: Style(angle=rng.choice((-1, 1)) * rng.uniform(3, 9)),
}


def any_style(rng: random.Random) -> Style:
    """For training: all but JPEG, mixed; noise and turns weaker than in the held-out set."""
    return Style(
        tuple((DARK if rng.random() < 0.3 else BACKGROUNDS).items()),
        rng.choice((0.16, 0.16, 0.08, 0)),
        rng.choice((0, 0, rng.uniform(0, 14))),
        rng.choice((0, 0, rng.uniform(-6, 6))),
    )


@dataclass(frozen=True)
class Thing:
    """A shape in a cell of the picture's grid."""

    colour: str
    shape: str
    column: int
    row: int

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    def place(self, axis: int) -> int:
        return (self.column, self.row)[axis]


@dataclass
class Scene:
    """What a picture shows: shapes, at most one of a digit and a word, and the grid's size in cells and pixels."""

    columns: int
    rows: int
    cell: tuple[float, float]
    things: list[Thing]
    digit: str = ""
    word: str = ""
    text_row: int = 0
    text_column: int = 0
    things_by: list[list[Thing]] = field(init=False)  # from left to right, and from top to bottom

    def __post_init__(self):
        self.things_by = [
            sorted(self.things, key=lambda t: (t.column, t.row)),
            sorted(self.things, key=lambda t: (t.row, t.column)),
        ]


def draw_scene(
    rng: random.Random,
    least: int = 1,
    most: int = 4,
    wide: bool = False,
    colours=tuple(COLOURS),
    must: str = "",
    room: int = 3,
    longest: int = 112,
) -> Scene:
    """A random scene of `least` to `most` shapes, fewer where there is no room.

    wide: sides in a ratio above 2.5 instead of below 2.2. must: a colour that at least one shape has. room: the most
    columns and rows. longest: of the sides, in pixels.
    """
    while True:
        columns, rows = rng.randint(1, room), rng.randint(1, room)
        cell = [rng.uniform(26, min(60 if longest <= 112 else 120, longest / n)) for n in (columns, rows)]
        ratio = max(columns * cell[0] / (rows * cell[1]), rows * cell[1] / (columns * cell[0]))
        if (2.5 < ratio < 5) if wide else ratio < 2.2:
            break
    free = [(c, r) for c in range(columns) for r in range(rows)]
    text = {}
    if rng.random() < 0.35 and len(free) > 1:
        if columns > 1 and rows > 1 and rng.random() < 0.5:
            text = dict(word=rng.choice(WORDS), text_row=rng.randrange(rows))
            free = [(c, r) for c, r in free if r != text["text_row"]]
        else:
            column, row = free.pop(rng.randrange(len(free)))
            text = dict(digit=str(rng.randrange(10)), text_row=row, text_column=column)
    rng.shuffle(free)
    few_shapes = rng.sample(list(SHAPES), rng.randint(2, 5))  # so that some occur more than once
    few_colours = rng.sample(colours, rng.randint(2, len(colours)))
    count = min(rng.randint(least, most), len(free))
    things = [Thing(rng.choice(few_colours), rng.choice(few_shapes), *cell) for cell in free[:count]]
    if must and not any(thing.colour == must for thing in things):
        things[0] = Thing(must, things[0].shape, things[0].column, things[0].row)
    return Scene(columns, rows, tuple(cell), things, **text)


def draw_one(rng: random.Random, room: int = 1) -> Scene:
    """A scene of a single shape, digit or word, which fills it or stands somewhere in up to `room` columns and rows."""
    if room > 1 and rng.random() < 0.7:
        scene = draw_scene(rng, 1, 1, room=room)
        return replace(scene, things=[]) if scene.digit or scene.word else scene
    what = rng.choices(("shape", "digit", "word"), (5, 2, 2))[0]
    columns = 2 if what == "word" else 1
    cell = (rng.uniform(24, 36), rng.uniform(33, 46))  # as wide as other pictures, so below 2.2 to 1
    if what == "shape":
        return Scene(1, 1, cell, [Thing(rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), 0, 0)])
    text = dict(digit=str(rng.randrange(10))) if what == "digit" else dict(word=rng.choice(WORDS))
    return Scene(columns, 1, cell, [], **text)


def render(
    scene: Scene, rng: random.Random, scale: float = 1.0, freedom: float = 1.0, style: Style = Style()
) -> Image.Image:
    """The scene as a picture; sizes, places in the cells and colours vary a little.

    `freedom` 0 makes every cell the 28 pixels of a token and puts shapes of one size in the middle; 1 does not.
    """
    s = scale * SUPERSAMPLE
    cw, ch = ((28 + (c - 28) * freedom) * s for c in scene.cell)
    size = [round(n * c / SUPERSAMPLE) * SUPERSAMPLE for n, c in ((scene.columns, cw), (scene.rows, ch))]
    background, ink = (vary(colour, rng, 8) for colour in rng.choice(style.backgrounds))
    image = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        r = min(cw, ch) * (0.4 + freedom * rng.uniform(-0.08, 0.04))
        x = (thing.column + 0.5) * cw + rng.uniform(-1, 1) * (cw / 2 - r) * 0.6 * freedom
        y = (thing.row + 0.5) * ch + rng.uniform(-1, 1) * (ch / 2 - r) * 0.6 * freedom
        colour = (COLOURS | NEW_COLOUR)[thing.colour]
        draw_shape(draw, thing.shape, x, y, r, vary(colour, rng, 14), ink, style.outline)
    if text := scene.digit or scene.word:
        width = cw if scene.digit else scene.columns * cw
        font = ImageFont.load_default(100)
        left, top, right, bottom = font.getbbox(text)
        height = min(ch * (0.8 + freedom * rng.uniform(-0.15, 0.05)), (bottom - top) * width * 0.9 / (right - left))
        font = ImageFont.load_default(100 * height / (bottom - top))
        x = (scene.text_column + 0.5) * cw if scene.digit else scene.columns * cw / 2
        draw.text((x, (scene.text_row + 0.5) * ch), text, fill=ink, font=font, anchor="mm")
    if style.angle:
        image = image.rotate(style.angle, Image.Resampling.BILINEAR, fillcolor=background)
    image = image.reduce(SUPERSAMPLE)
    if style.noise:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, style.noise, (*image.size[::-1], 3))
        image = Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))
    if style.jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=style.jpeg)
        image = Image.open(file).convert("RGB")
    return image


def vary(colour: tuple, rng: random.Random, most: int) -> tuple:
    return tuple(min(255, max(0, c + rng.randint(-most, most))) for c in colour)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple, ink: tuple, outline: float
) -> None:
    """A shape with centre (x, y) that reaches r pixels far, with an outline of `ink` that is `outline` · r wide."""
    width = round(outline * r)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill, ink, width)
        return
    if shape == "square":
        corners = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        corners = [(0, -1), (1, 0.8), (-1, 0.8)]
    elif shape == "star":
        turns = [math.pi * i / 5 for i in range(10)]
        corners = [(q * math.sin(t), -q * math.cos(t)) for q, t in zip([1.1, 0.45] * 5, turns)]
    else:
        corners, arm = [], [(-0.35, -1), (0.35, -1), (0.35, -0.35)]
        for _ in range(4):
            corners, arm = corners + arm, [(-v, u) for u, v in arm]
    draw.polygon([(x + r * u, y + r * v) for u, v in corners], fill, ink, width)
