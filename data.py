"""Chats for training: from lines of JSON to the micro-batches of a step.

A sample is a chat as token ids, with a mask of what assistants wrote: only these tokens are targets of the loss. Every
rank knows the ids of every sample, so that the order of the data, the shapes of all micro-batches and the number of
targets in a step need no communication later; only the reading is shared out. Images stay files until their step comes
near: then a thread decodes them while the model is busy with the step before.

The order of the data is a function of the seed and the epoch, and a step's samples one of its number. That is all that
a resumed run has to know.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from chat import encode_chat
from config import Config, UserError
from launch import gather_objects
from parallel import Place
from vision import grid, image_size, load_image, pixels

KEYS = {"messages", "tools", "reasoning_effort"}
IGNORE = -1  # the target where there is none


@dataclass
class Sample:
    """A chat of T tokens."""

    ids: torch.Tensor  # (T,) int32
    targets: torch.Tensor  # (T,) bool: did an assistant write it?
    images: list[str]  # in the order of their tokens
    line: int  # in the file

    @property
    def target_tokens(self) -> int:
        return int(self.targets.sum())

    def split_answer(self) -> tuple[list[int], list[int]]:
        """(everything before the last assistant turn, that turn with its end token)."""
        start = len(self.targets) - int((~self.targets).flip(0).int().argmax())
        return self.ids[:start].tolist(), self.ids[start:].tolist()


@dataclass
class MicroBatch:
    """B samples side by side, padded on the right. Inputs and targets are the ids without their last, and first, one.

    No mask is needed: attention is causal, so that nothing looks at the padding to its right.
    """

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE where no assistant wrote
    lines: list[int]
    images: list[str]
    length: int  # tokens without padding
    pixels: list[torch.Tensor] = field(default_factory=list)  # the images, once they are decoded

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.tokens.shape)


class Chats:
    """The samples of a file. Raises UserError for the first line that is not a chat to learn from.

    dropped: samples that were left out because they have more than `max_length` tokens; a cut chat would teach the
    model to stop in the middle, and half an image is none.
    """

    def __init__(self, path: str, tokenizer, config: Config, max_length: int, place: Place):
        self.path, self.base = path, os.path.dirname(path)
        try:
            with open(path, "rb") as file:
                lines = file.read().splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        mine = {}  # line number -> Sample, or what is wrong with it
        for number, line in enumerate(lines, 1):
            if line.strip() and number % place.world_size == place.rank:
                try:
                    mine[number] = self._read(line, number, tokenizer, config)
                except UserError as error:
                    mine[number] = f"{path} line {number}: {error}"
                    break
        read = {number: sample for part in gather_objects(mine) for number, sample in part.items()}
        everything = [sample for _, sample in sorted(read.items())]
        if errors := [sample for sample in everything if isinstance(sample, str)]:
            raise UserError(errors[0])
        if not everything:
            raise UserError(f"{path}: is empty; it should hold one chat a line")
        self.samples = [sample for sample in everything if len(sample.ids) <= max_length]
        self.dropped = len(everything) - len(self.samples)
        if not self.samples:
            raise UserError(f"{path}: all {self.dropped} samples are longer than --max-length {max_length}")

    def _read(self, line: bytes, number: int, tokenizer, config: Config) -> Sample:
        try:
            chat = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON ({error})") from None
        if not isinstance(chat, dict) or "messages" not in chat:
            raise UserError("should be an object with 'messages'")
        if strange := set(chat) - KEYS:
            raise UserError(f"unknown key {min(strange)!r}; known are {', '.join(sorted(KEYS))}")

        def image_grid(url: str) -> tuple[int, int]:
            return grid(*image_size(url, self.base), config.vision)

        see = image_grid if config.vision is not None else None
        effort = chat.get("reasoning_effort")
        chat = encode_chat(tokenizer, chat["messages"], chat.get("tools"), effort, see, training=True)
        ids, targets = torch.tensor(chat.ids, dtype=torch.int32), torch.tensor(chat.targets)
        return Sample(ids, targets, chat.images, number)

    def fingerprint(self) -> str:
        """Changes with the samples: a resumed run must go on with the same ones."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.ids.numpy().tobytes() + repr(sample.images).encode())
        return digest.hexdigest()[:16]


class Order:
    """Which samples a step takes: epoch after epoch, each in an order of its own, cut into global batches.

    The very last batch is smaller where the samples do not fill it.
    """

    def __init__(self, count: int, batch_size: int, epochs: int | None, seed: int, shuffle: bool):
        self.count, self.batch_size, self.epochs = count, batch_size, epochs
        self.seed, self.shuffle = seed, shuffle
        self.steps = -(-count * epochs // batch_size) if epochs else None

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


def micro_batches(samples: list[Sample], size: int, pad_id: int, multiple: int = 1) -> list[MicroBatch]:
    """`samples`, in their order, `size` at a time; their padded length is a multiple of `multiple`."""
    batches = []
    for group in (samples[i : i + size] for i in range(0, len(samples), size)):
        longest = max(len(sample.ids) for sample in group) - 1
        longest += -longest % multiple
        tokens = torch.full((len(group), longest), pad_id)
        targets = torch.full((len(group), longest), IGNORE)
        for i, sample in enumerate(group):
            length = len(sample.ids) - 1
            tokens[i, :length] = sample.ids[:-1]
            targets[i, :length] = sample.ids[1:].long().masked_fill(~sample.targets[1:], IGNORE)
        images = [url for sample in group for url in sample.images]
        length = sum(len(sample.ids) - 1 for sample in group)
        batches.append(MicroBatch(tokens, targets, [sample.line for sample in group], images, length))
    return batches


class ImageReader:
    """Decodes the images of micro-batches in a thread, ahead of their use."""

    def __init__(self, config: Config, dtype: torch.dtype):
        self.config, self.dtype = config, dtype
        self.thread = ThreadPoolExecutor(max_workers=1)

    def start(self, batches: list[MicroBatch], base: str) -> Callable[[], None]:
        """Begin to fill in `pixels`; the returned function waits for it, and raises UserError for a broken image."""

        def decode() -> None:
            for batch in batches:
                batch.pixels = [
                    pixels(load_image(url, base), self.config.vision).to(self.dtype) for url in batch.images
                ]

        future: Future = self.thread.submit(decode)
        return future.result
