"""Requests, drafts and whole conversations that the tests of drafting share."""

import random
from dataclasses import dataclass, field

import torch
from helpers import SIZES, load, make_eyes, random_state, randomize, text_fields, to_fp8, write_checkpoint

from generate import Engine
from parallel import Place
from runtime.draft import EAGLE, Eagle, Guesses, Lookup, read_draft
from runtime.requests import Request

IMG, END = 10, 2
CELL = 6  # pixels of a token's side
SMALL = dict(vocab_size=37)  # so that random heads guess right now and then


def make_model(folder, **changes) -> str:
    return make_eyes(folder, "new", None, SMALL | changes, seed=5)


def draft_fields(**changes) -> dict:
    return text_fields("yarn, short", **(SIZES | SMALL | dict(num_hidden_layers=2, vision_config=None) | changes))


def make_draft(folder, seed: int = 0, fp8: str | None = None, whole_fp8: bool = False, **changes) -> dict:
    """A head in the published layout, with random weights; returns what they are, by canonical name.

    `whole_fp8`: `eagle_linear` is FP8, too.
    """
    fields = draft_fields(**changes) | dict(num_hidden_layers=2)
    state = random_state(fields, seed)
    C = fields["hidden_size"]
    del state["embed_tokens.weight"], state["lm_head.weight"]
    state[EAGLE] = randomize(EAGLE, torch.empty(C, 2 * C), torch.Generator().manual_seed(seed))
    stored, meant = to_fp8(state, fp8 == "static") if fp8 else (state, state)
    if whole_fp8:
        scale = stored[EAGLE].abs().max() / 448
        stored[EAGLE] = (stored[EAGLE] / scale).to(torch.float8_e4m3fn)
        meant[EAGLE] = stored[EAGLE].float() * scale
        stored[EAGLE.replace(".weight", ".weight_scale_inv")] = scale
    write_checkpoint(folder, fields, stored, "native", fp8=fp8)
    return meant


class Knows(Guesses):
    """Knows the answers, and says something else with probability `wrong`."""

    def __init__(self, count: int, known: dict[tuple, list[int]], wrong: float, seed: int = 0, device=Place.device):
        super().__init__(count, device)
        self.known, self.wrong, self.draw = known, wrong, random.Random(seed)

    def prepare(self, group) -> None:
        for i, row in enumerate(group.rows):
            ahead = (self.known[key(row.request)][len(row.answer.tokens) :] + [0] * self.count)[: self.count]
            ahead = [token if self.draw.random() >= self.wrong else (token + 1) % 37 for token in ahead]
            group.memory[i] = torch.tensor(ahead)


@dataclass
class Text:
    """A chat so far: its tokens, and the pictures whose tokens are among them."""

    ids: list[int]
    images: list[tuple[str, int]] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)


def words(draw: random.Random, count: int) -> list[int]:
    return [draw.choice([0, 1, *range(11, 37)]) for _ in range(count)]  # no IMG, and no END


def drawn_text(draw: random.Random, seen: list[Text], openings: list[list[int]]) -> Text:
    """One that goes on, one whose end was taken back, or a new one, maybe with pictures and a shared beginning."""
    if seen and (kind := draw.random()) < 0.6:
        old = draw.choice(seen)
        last = max([i for i, id in enumerate(old.ids) if id == IMG], default=0)
        cut = draw.randint(last + 1, len(old.ids)) if kind < 0.3 else len(old.ids)
        return Text(old.ids[:cut] + words(draw, draw.randint(0, 30)), old.images, old.pixels)
    text = Text(draw.choice(openings) + words(draw, draw.randint(1, 40)))
    for _ in range(draw.choice([0, 0, 1, 2])):
        rows, columns, name = draw.randint(1, 3), draw.randint(1, 3), draw.choice("ab")
        count = rows * columns
        noise = torch.Generator().manual_seed(ord(name) * 16 + rows * 4 + columns)
        text.pixels = [*text.pixels, torch.randn(3, rows * CELL, columns * CELL, generator=noise)]
        text.images = [*text.images, (f"{name}{rows}{columns}", count)]
        text.ids += [IMG] * count + words(draw, 3)
    return text


def play(engine: Engine, seed: int, turns: int) -> list[tuple]:
    """Turns of several chats, in batches that change; the engine keeps its caches. (key, answer) of every request."""
    draw, seen, played = random.Random(seed), [], []
    openings = [[], words(draw, 25), words(draw, 70)]
    for _ in range(turns):
        texts = [drawn_text(draw, seen, openings) for _ in range(draw.choice([1, 1, 3, 7, 16]))]
        requests = [
            Request(
                text.ids,
                text.pixels,
                max_new_tokens=draw.randint(0, 40),
                temperature=draw.choice([0.0, 0.7, 1.3]),
                top_p=draw.choice([1.0, 0.8]),
                seed=draw.getrandbits(63),
                logprobs=draw.random() < 0.2,
                images=text.images,
            )
            for text in texts
        ]
        stops, width = set(words(draw, draw.choice([0, 0, 2]))), draw.choice([None, 1, 2, 5, 16])
        answers = engine.generate(requests, lambda i, token, logprob: token in stops, width=width)
        for text, request, answer in zip(texts, requests, answers):
            said = [token for token in answer.tokens if token != IMG]
            seen.append(Text(text.ids + said, text.images, text.pixels))
            played.append((key(request), answer))
    return played


def key(request: Request) -> tuple:
    return tuple(request.prompt), request.seed, request.temperature, request.top_p


def play_with_all(
    ckpt: str, draft: str, seed: int, turns: int, count: int, place: Place = Place()
) -> dict[str, list[tuple]]:
    """What is played without a draft and with each kind of draft of `count` tokens."""
    model, found = load(ckpt, place=place), {}
    known = {}
    for name in ("none", "nothing is right", "some", "everything", "a head", "lookup"):
        guesses = {
            "none": lambda: None,
            "nothing is right": lambda: Knows(count, known, 1.0),
            "some": lambda: Knows(count, known, 0.4),
            "everything": lambda: Knows(count, known, 0.0),
            "a head": lambda: Eagle(read_draft(draft, model).eval(), model, count),
            "lookup": lambda: Lookup(count),
        }[name]()
        engine = Engine(model, END, 400, guesses)
        engine.chunk = 50  # a prompt takes several
        played = play(engine, seed, turns)
        known |= {request: answer.tokens for request, answer in played}
        found[name] = played
    return found
