"""Chats as micro-batches: samples, their order, padding, images.

A sample is a chat as token ids, and for each id whether an assistant wrote it: thinking, tool calls and the end token
included. These alone are learned. The model predicts, at every position, the id that comes next, so inputs are the ids
without the last one and targets are the ids without the first:

    ids                     <s>     [INST]  Is it?   [/INST]  Yes      </s>
    did an assistant?       no      no      no       no       yes      yes
    inputs   (tokens)       <s>     [INST]  Is it?   [/INST]  Yes
    targets                 IGNORE  IGNORE  IGNORE   Yes      </s>

Every rank knows the ids of every sample. The order of the data, the shapes of all micro-batches and the number of
targets in a step therefore need no communication later; only the reading is divided among ranks. Images remain files
until their step comes near. The order is a function of the seed and the epoch, and a step's samples follow from its
number: a resumed run has nothing else to restore.
"""

import hashlib
import math
import os
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch

from model import Config, VisionConfig
from parallel import Place
from runtime.chat import encode_chat
from runtime.files import parse_line, read_lines, reading, require
from runtime.images import grid_of, image_name, load_image, pixels
from runtime.launch import gather_objects, together

KEYS = ("messages", "tools", "reasoning_effort")

IGNORE = -1  # the target at positions that are not learned


@dataclass
class Sample:
    """A chat of T tokens."""

    ids: torch.Tensor  # (T,) int32
    targets: torch.Tensor  # (T,) bool: did an assistant write it?
    images: list[str]  # paths or data: URLs, in the order of their tokens
    line: int  # in the file, from 1

    @property
    def target_tokens(self) -> int:
        return int(self.targets.sum())

    def split_answer(self) -> tuple[list[int], list[int]]:
        """(everything before the last assistant turn, that turn with its end token)."""
        # A chat ends with an assistant turn, so seen from its end the first False is the token before that turn.
        start = len(self.targets) - int((~self.targets).flip(0).int().argmax())
        return self.ids[:start].tolist(), self.ids[start:].tolist()


class Chats:
    """The samples of a file. Raises UserError for the first line that is not a chat to learn from.

    dropped: samples that were left out because they have more than `max_length` tokens. They are not cut: a chat that
    breaks off would teach the model to stop in the middle, and an image that breaks off has no meaning.
    """

    def __init__(self, path: str, tokenizer, config: Config, max_length: int, place: Place):
        self.path, self.base = path, os.path.dirname(path)
        lines = together(lambda: read_lines(path))
        require(lines, f"{path}: is empty; it should hold one chat a line")
        # Each rank reads a part of the file. `together` raises the lowest rank's error: the first in the file.
        start, stop = (len(lines) * rank // place.world_size for rank in (place.rank, place.rank + 1))
        own = together(lambda: [self._read(line, number, tokenizer, config) for number, line in lines[start:stop]])
        everything = list(chain(*gather_objects(own)))
        self.samples = [sample for sample in everything if len(sample.ids) <= max_length]
        self.dropped = len(everything) - len(self.samples)
        require(self.samples, f"{path}: all {self.dropped} samples are longer than --max-length {max_length}")

    def _read(self, line: bytes, number: int, tokenizer, config: Config) -> Sample:
        where = f"{self.path} line {number}"
        see = partial(grid_of, base=self.base, vision=config.vision) if config.vision is not None else None
        with reading(where, "chat"):
            chat = parse_line(line, where, KEYS)
            chat = encode_chat(tokenizer, *map(chat.get, KEYS), see, training=True)
            trains = any(chat.targets)
            require(trains, "nothing in this chat is trained on; every assistant message has weight 0")
        return Sample(torch.tensor(chat.ids, dtype=torch.int32), torch.tensor(chat.targets), chat.images, number)

    def fingerprint(self) -> str:
        """Changes with the samples: a resumed run must go on with the same ones."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.ids.numpy().tobytes() + sample.targets.numpy().tobytes())
            digest.update(repr(sample.images).encode())
        return digest.hexdigest()[:16]

    def pictures(self, place: Place) -> dict[str, str]:
        """Line -> a digest of its images' contents. All ranks call this together, and each reads a part of them."""

        def digest(sample: Sample) -> str:
            with reading(f"{self.path} line {sample.line}", "chat"):
                names = "".join(image_name(url, self.base) for url in sample.images)
            return hashlib.sha256(names.encode()).hexdigest()[:16]

        own = [sample for sample in self.samples[place.rank :: place.world_size] if sample.images]
        parts = gather_objects(together(lambda: {str(sample.line): digest(sample) for sample in own}))
        return {line: digest for part in parts for line, digest in part.items()}


class Order:
    """Which samples a step takes: epoch after epoch, each in an order of its own, cut into global batches.

    A batch may span two epochs. The very last one is smaller where the samples do not fill it.
    """

    def __init__(self, count: int, batch_size: int, epochs: int | None, seed: int, shuffle: bool):
        self.count, self.batch_size, self.epochs = count, batch_size, epochs
        self.seed, self.shuffle = seed, shuffle
        self.steps = -(-count * epochs // batch_size) if epochs else math.inf  # rounded up

    def epoch(self, number: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.count))
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        return torch.randperm(self.count, generator=generator).tolist()

    def batch(self, step: int) -> list[int]:
        """The samples of step 1, 2, …, by index."""
        first, last = (step - 1) * self.batch_size, step * self.batch_size
        if self.epochs:
            last = min(last, self.count * self.epochs)
        orders = {n: self.epoch(n) for n in range(first // self.count, (last - 1) // self.count + 1)}
        return [orders[i // self.count][i % self.count] for i in range(first, last)]


@dataclass
class MicroBatch:
    """B samples side by side, padded on the right to T tokens: what goes through the model in one pass.

    Padding needs no attention mask. Attention is causal, so no token attends to the padding on its right; and what is
    computed for the padding itself is not learned from, since its targets are IGNORE.
    """

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the next token, or IGNORE where no assistant wrote it
    lines: list[int]  # (B,) of the file
    images: list[str]  # of all samples, in the order of their tokens
    image_lines: list[int]  # of the file, for each of the images
    length: int  # tokens without padding
    pixels: list[torch.Tensor] = field(default_factory=list)  # one per image, once they are decoded

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.tokens.shape)


def micro_batches(samples: list[Sample], size: int, pad_id: int, multiple: int = 1) -> list[MicroBatch]:
    """`samples`, in their order, `size` at a time. T is the longest sample's inputs, rounded up to `multiple`."""
    batches = []
    for group in (samples[i : i + size] for i in range(0, len(samples), size)):
        lengths = [len(sample.ids) - 1 for sample in group]
        T = -(-max(lengths) // multiple) * multiple
        tokens, targets = torch.full((len(group), T), pad_id), torch.full((len(group), T), IGNORE)
        for i, (sample, length) in enumerate(zip(group, lengths)):
            tokens[i, :length] = sample.ids[:-1]
            targets[i, :length] = sample.ids[1:].long().masked_fill(~sample.targets[1:], IGNORE)
        images = [url for sample in group for url in sample.images]
        image_lines = [sample.line for sample in group for _ in sample.images]
        lines = [sample.line for sample in group]
        batches.append(MicroBatch(tokens, targets, lines, images, image_lines, sum(lengths)))
    return batches


def decode_images(batches: list[MicroBatch], base: str, vision: VisionConfig | None, dtype: torch.dtype) -> None:
    """Fill in the `pixels` of `batches`, paths relative to `base`.

    Raises UserError for an image that is broken, or was removed, and names its line.
    """
    for batch in batches:
        decoded = []
        for i, url in enumerate(batch.images):
            with reading(f"line {batch.image_lines[i]}", "image"):
                decoded.append(pixels(load_image(url, base), vision).to(dtype))
        batch.pixels = decoded
