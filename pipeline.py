"""What trains: chats as micro-batches, and the schedule in which they go through the pipeline's stages.

**Pipeline parallelism.** `Place.layers` says which layers a stage has. The first stage also has the embedding and the
vision tower, the last the norm and the head. Hidden states walk down the stages through a `Channel`, for training and
generation (`engine.py`) alike.

Training is 1F1B: one forward, one backward (PipeDream-flush, arXiv:2104.04473, figure 4). Micro-batches walk down the
stages, their gradients walk back up. With p stages and m micro-batches (p = 4, m = 6; a number is a forward pass, a
letter the backward pass of the same micro-batch, 1 and a, 2 and b, …):

    stage 0   1 2 3 4 . . . a 5 b 6 c . d . e . f      warm-up: p - 1 forward passes
    stage 1     1 2 3 . . a 4 b 5 c 6 d . e . f                 p - 2
    stage 2       1 2 . a 3 b 4 c 5 d 6 e . f
    stage 3         1 a 2 b 3 c 4 d 5 e 6 f            the last stage turns round at once

After its warm-up a stage alternates (steady), and at the end it has backward passes only (cool-down). Stage s never
holds the activations of more than p - s micro-batches, however many there are; running all forward passes first would
hold m. The dots are the bubble, (p - 1) / (m + p - 1) of the time.

**Chats.** A sample is a chat as token ids, and for each id whether an assistant wrote it: thinking, tool calls and the
end token included. These alone are learned. The model predicts, at every position, the id that comes next, so inputs
are the ids without the last one and targets are the ids without the first:

    ids                     <s>     [INST]  Is it?   [/INST]  Yes      </s>
    did an assistant?       no      no      no       no       yes      yes
    inputs   (tokens)       <s>     [INST]  Is it?   [/INST]  Yes
    targets                 IGNORE  IGNORE  IGNORE   Yes      </s>

Every rank knows the ids of every sample. The order of the data, the shapes of all micro-batches and the number of
targets in a step therefore need no communication later; only the reading is divided among ranks. Images remain files
until their step comes near.

The order of the data is a function of the seed and the epoch, and a step's samples follow from its number. A resumed
run has nothing else to restore.

**Calibration** sends chats through a model to see how large the inputs of its linears become, for static FP8 scales.
"""

import contextlib
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

import fp8
from chat import encode_chat
from checkpoint import Checkpoint, fill, is_quantized
from config import Config, UserError, VisionConfig, parse_line, read_lines
from launch import gather_objects, together
from model import MistralMedium
from parallel import Place, all_gather
from tokenizer import load_tokenizer
from vision import grid_of, load_image, pixels

KEYS = {"messages", "tools", "reasoning_effort"}
IGNORE = -1  # the target at positions that are not learned


# ------------------------------------------------------------------------------------------- stages and their schedule


class Channel:
    """One direction along the pipeline: takes messages from the neighbour behind, sends them to the one ahead.

    `step` is 1 down the stages and -1 up. The directions use two process groups: on one NCCL communicator sends and
    receives wait for each other in the order in which they were posted, and two neighbours that both send first would
    wait for ever. A send runs in the background, and its tensor has to stay alive until the neighbour took it; at most
    `in_flight` of them do, then `send` waits for the oldest.
    """

    def __init__(self, place: Place, dtype: torch.dtype, step: int = 1, in_flight: int = 1):
        self.group = place.pp_group if step == 1 else place.answer_group
        self.behind, self.ahead = place.pp_rank - step, place.pp_rank + step
        self.dtype, self.device, self.in_flight = dtype, place.device, in_flight
        self.sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, x: torch.Tensor) -> None:
        self.flush(self.in_flight - 1)
        x = x.contiguous()
        self.sent.append((dist.isend(x, group=self.group, group_dst=self.ahead), x))

    def receive(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Wait for the next message. Its shape has to be known: no message says how large it is."""
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(x, group=self.group, group_src=self.behind)
        return x

    def flush(self, keep: int = 0) -> None:
        """Wait until at most `keep` messages are in flight."""
        while len(self.sent) > keep:
            self.sent.popleft()[0].wait()


def from_last_stage(x: torch.Tensor, place: Place) -> dist.Work | None:
    """`x` of the last stage into `x` of all, in the background; None where there is one stage."""
    if place.answer_group is None:
        return None
    return dist.broadcast(x, group=place.answer_group, group_src=place.pp_size - 1, async_op=True)


class Pipeline:
    """Runs micro-batches through `run_stage`, this rank's part of the model.

    `run_stage(x, batch)` takes the hidden states (B, T, hidden_size) of the previous stage, None on the first, and
    returns its own; on the last stage it returns the loss (0-d). All that the schedule needs of a batch is `.shape`,
    its (B, T), which may differ from one to the next. `trained` says whether this stage has trained parameters: no
    gradient is sent to stages that have none and come after none.
    """

    def __init__(self, place: Place, run_stage: Callable, hidden_size: int, dtype: torch.dtype, trained: bool):
        self.place, self.run_stage, self.hidden_size = place, run_stage, hidden_size
        everywhere = all_gather(torch.tensor([trained], device=place.device), place.pp_group)[:, 0].tolist()
        self.gradient_up = any(everywhere[: place.pp_rank])  # the previous stage waits for a gradient
        self.gradient_here = self.gradient_up or trained  # this one does
        self.down, self.up = Channel(place, dtype), Channel(place, dtype, step=-1)
        self.held: deque = deque()  # (batch, input, where the graph ends) of micro-batches before their backward pass
        self.most_held = 0

    def train(self, batches: list, before_last_backward: Callable[[], None] = lambda: None) -> None:
        """Forward and backward passes of all `batches`, which every stage gets in the same order."""
        warm_up = self.place.pp_size - 1 - self.place.pp_rank
        for batch in batches:
            # Until the warm-up is over this is a row of forward passes. Then the stage has as many micro-batches as it
            # may hold, and has to finish the oldest before it starts another: one forward, one backward.
            if len(self.held) > warm_up:
                self.backward()
            self.forward(batch)
        while self.held:  # the last pair's backward pass, and the cool-down
            if len(self.held) == 1:
                before_last_backward()
            self.backward()
        self.down.flush()
        self.up.flush()

    @torch.no_grad()
    def evaluate(self, batches: list) -> None:
        """Forward passes only."""
        for batch in batches:
            x = self.run_stage(self.receive(batch), batch)
            if not self.place.last_stage:
                self.down.send(x)
        self.down.flush()

    def shape(self, batch) -> tuple[int, int, int]:
        """Of the hidden states that stages exchange about `batch`, and of their gradients."""
        rows, tokens = batch.shape
        return rows, tokens // self.place.token_parts, self.hidden_size

    def receive(self, batch) -> torch.Tensor | None:
        return None if self.place.first_stage else self.down.receive(self.shape(batch))

    def forward(self, batch) -> None:
        x = self.receive(batch)
        if x is not None and self.gradient_up:
            x.requires_grad_()
        with torch.set_grad_enabled(self.gradient_here):
            out = self.run_stage(x, batch)
        # The backward pass needs to know where the graph ends, but not the values there: they are gone once sent.
        end = get_gradient_edge(out) if out.requires_grad else None
        self.held.append((batch, x, end))
        self.most_held = max(self.most_held, len(self.held))
        if not self.place.last_stage:
            self.down.send(out.detach())

    def backward(self) -> None:
        batch, x, end = self.held.popleft()
        # On the last stage `out` is the loss, whose own gradient is 1: None. Elsewhere the next stage computes it.
        receives = self.gradient_here and not self.place.last_stage
        grad = self.up.receive(self.shape(batch)) if receives else None
        if end is not None:  # no end: nothing that this micro-batch met here is trained, an unused projector say
            torch.autograd.backward([end], [grad])
        if self.gradient_up:
            self.up.send(x.grad)


# --------------------------------------------------------------------------------------------- chats and micro-batches


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
        mine = {}  # line number -> Sample, or what is wrong with the line
        for number, line in together(lambda: read_lines(path)):
            if number % place.world_size == place.rank:
                try:
                    mine[number] = self._read(line, number, tokenizer, config)
                except UserError as error:
                    mine[number] = str(error)
                    break
        # Ranks stop at their own first error. The one to report is the first in the file, the same on every rank.
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
        where = f"{self.path} line {number}"
        chat = parse_line(line, where, KEYS)
        messages, tools, effort = (chat.get(key) for key in ("messages", "tools", "reasoning_effort"))
        see = partial(grid_of, base=self.base, vision=config.vision) if config.vision is not None else None
        try:
            chat = encode_chat(tokenizer, messages, tools, effort, see, training=True)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not any(chat.targets):
            raise UserError(f"{where}: nothing in this chat is trained on; every assistant message has weight 0")
        return Sample(torch.tensor(chat.ids, dtype=torch.int32), torch.tensor(chat.targets), chat.images, number)

    def fingerprint(self) -> str:
        """Changes with the samples: a resumed run must go on with the same ones."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.ids.numpy().tobytes() + repr(sample.images).encode())
        return digest.hexdigest()[:16]


class Order:
    """Which samples a step takes: epoch after epoch, each in an order of its own, cut into global batches.

    A batch may span two epochs. The very last one is smaller where the samples do not fill it.
    """

    def __init__(self, count: int, batch_size: int, epochs: int | None, seed: int, shuffle: bool):
        self.count, self.batch_size, self.epochs = count, batch_size, epochs
        self.seed, self.shuffle = seed, shuffle
        self.steps = -(-count * epochs // batch_size) if epochs else None  # rounded up; None: no end

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

    Padding needs no attention mask. Attention is causal, so no token of a sample sees the padding to its right; and
    what the padding itself computes is not learned from, since its targets are IGNORE.
    """

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the next token, or IGNORE where no assistant wrote it
    lines: list[int]  # (B,) of the file
    images: list[str]  # of all samples, in the order of their tokens
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
        batches.append(MicroBatch(tokens, targets, [sample.line for sample in group], images, sum(lengths)))
    return batches


def decode_images(batches: list[MicroBatch], base: str, vision: VisionConfig | None, dtype: torch.dtype) -> None:
    """Fill in the `pixels` of `batches`, paths relative to `base`. Raises UserError for an image that is broken."""
    for batch in batches:
        batch.pixels = [pixels(load_image(url, base), vision).to(dtype) for url in batch.images]


# ----------------------------------------------------------------------------------------------- calibration


def measure_inputs(model: MistralMedium, batches: Iterable[MicroBatch]) -> dict[str, torch.Tensor]:
    """Static activation scales: the largest input of every decoder linear over `batches`, over 448. By weight name."""
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, inputs):
            amax = inputs[0].abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, amax), amax)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, layer in model.named_modules()
        if is_quantized(f"{name}.weight")
    ]
    with torch.inference_mode():
        for batch in batches:
            features = model.image_features(batch.pixels) if batch.pixels else None
            model(model.embed(batch.tokens, features))
    for handle in handles:
        handle.remove()
    return {name: fp8.scale_of(amax) for name, amax in largest.items()}


def cpu_memory() -> float:
    """Bytes that are free on this machine, within the limits that Slurm or a container sets (control groups)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = sum(1024 * int(line.split()[1]) for line in file if line.startswith(("MemAvailable", "SwapFree")))
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return math.inf
    for _, kind, path in groups:
        if kind in ("", "memory"):  # version 2 and version 1
            folder, name = f"/sys/fs/cgroup/{kind}{path}", "memory.limit_in_bytes" if kind else "memory.max"
            while len(folder) >= len("/sys/fs/cgroup"):
                with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, name)) as file:
                    free = min(free, int(file.read()))  # ValueError: "max", no limit
                folder = os.path.dirname(folder)
    return free


def calibrate(directory: str, chats_file: str, config: Config, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Run the checkpoint, dequantized to BF16, over the chats of a file; see `measure_inputs`."""
    model = MistralMedium(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > (room := cpu_memory()):
        raise UserError(f"the weights take {size / 1e9:.1f} GB, but {room / 1e9:.1f} GB are free: no --calibrate here")
    chats = Chats(chats_file, load_tokenizer(directory, config), config, config.max_position_embeddings, Place())
    fill(model, checkpoint)

    def decoded() -> Iterator:
        for batch in micro_batches(chats.samples, 1, 0):
            decode_images([batch], chats.base, config.vision, torch.bfloat16)
            yield batch
            batch.pixels = []

    return measure_inputs(model, decoded())
