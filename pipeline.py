"""The 1F1B pipeline schedule: one forward, one backward (PipeDream-flush, arXiv:2104.04473, figure 4).

Micro-batches walk down the stages, their gradients walk back up. With p stages and m micro-batches (p = 4, m = 6; a
number is a forward pass, a letter the backward pass of the same micro-batch, 1 and a, 2 and b, …):

    stage 0   1 2 3 4 . . . a 5 b 6 c . d . e . f      warm-up: p - 1 forward passes
    stage 1     1 2 3 . . a 4 b 5 c 6 d . e . f                 p - 2
    stage 2       1 2 . a 3 b 4 c 5 d 6 e . f
    stage 3         1 a 2 b 3 c 4 d 5 e 6 f            the last stage turns round at once

After its warm-up a stage alternates, and at the end it cools down with backward passes only. Stage s never holds the
activations of more than p - s micro-batches, however many there are; running all forward passes first would hold m.
The dots are the bubble, (p - 1) / (m + p - 1) of the time.

Messages in the two directions use two process groups. On one NCCL communicator sends and receives wait for each other
in the order they were posted, and two neighbours that both send first would wait for ever. A message is sent in the
background and its memory freed before the next one goes the same way; by then the neighbour has taken it.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from parallel import Place, all_gather


class MicroBatch(Protocol):
    """All the schedule needs to know: the shape (B, T) of a micro-batch, which may differ from one to the next."""

    shape: tuple[int, int]


class Channel:
    """Messages to one neighbour, at most one of them on its way."""

    def __init__(self, group: dist.ProcessGroup | None, peer: int):
        self.group, self.peer, self.sent = group, peer, None

    def send(self, x: torch.Tensor) -> None:
        self.flush()
        x = x.contiguous()
        self.sent = (dist.isend(x, group=self.group, group_dst=self.peer), x)

    def flush(self) -> None:
        if self.sent is not None:
            self.sent[0].wait()
            self.sent = None


class Pipeline:
    """Runs micro-batches through `stage`, this rank's part of the model.

    `stage(x, batch)` takes the hidden states (B, T, hidden_size) of the previous stage, None on the first, and returns
    its own; on the last stage it returns the loss (0-d). `trained` says whether this stage has trained parameters: no
    gradient is sent to stages that have none and come after none.
    """

    def __init__(self, place: Place, stage: Callable, hidden_size: int, dtype: torch.dtype, trained: bool):
        self.place, self.stage, self.hidden_size, self.dtype = place, stage, hidden_size, dtype
        everywhere = all_gather(torch.tensor([trained], device=place.device), place.pp_group)[:, 0].tolist()
        self.gradient_up = any(everywhere[: place.pp_rank])  # the previous stage waits for a gradient
        self.gradient_here = self.gradient_up or trained  # this one does
        self.down = Channel(place.pp_group, place.pp_rank + 1)
        self.up = Channel(place.answer_group, place.pp_rank - 1)
        self.held: deque = deque()  # (batch, input, where the graph ends) of micro-batches before their backward pass
        self.most_held = 0

    def train(self, batches: list[MicroBatch], before_last_backward: Callable[[], None] = lambda: None) -> None:
        """Forward and backward passes of all `batches`, which every stage gets in the same order."""
        warm_up = min(self.place.pp_size - 1 - self.place.pp_rank, len(batches))
        for batch in batches[:warm_up]:
            self.forward(batch)
        for i, batch in enumerate(batches[warm_up:]):
            self.forward(batch)
            if i == len(batches) - 1:
                before_last_backward()
            self.backward()
        while self.held:
            if len(self.held) == 1:
                before_last_backward()
            self.backward()
        self.down.flush()
        self.up.flush()

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> None:
        """Forward passes only."""
        for batch in batches:
            x = self.stage(self.receive(batch), batch)
            if not self.place.last_stage:
                self.down.send(x)
        self.down.flush()

    def message(self, batch: MicroBatch) -> torch.Tensor:
        """Room for what a neighbour sends about `batch`."""
        rows, tokens = batch.shape
        tokens //= self.place.token_parts
        return torch.empty(rows, tokens, self.hidden_size, dtype=self.dtype, device=self.place.device)

    def receive(self, batch: MicroBatch) -> torch.Tensor | None:
        if self.place.first_stage:
            return None
        x = self.message(batch)
        dist.recv(x, group=self.place.pp_group, group_src=self.place.pp_rank - 1)
        return x

    def forward(self, batch: MicroBatch) -> None:
        x = self.receive(batch)
        if x is not None and self.gradient_up:
            x.requires_grad_()
        with torch.set_grad_enabled(self.gradient_here):
            out = self.stage(x, batch)
        # The backward pass needs to know where the graph ends, but not the values there: they are gone once sent.
        end = get_gradient_edge(out) if out.requires_grad else None
        self.held.append((batch, x, end))
        self.most_held = max(self.most_held, len(self.held))
        if not self.place.last_stage:
            self.down.send(out.detach())

    def backward(self) -> None:
        batch, x, end = self.held.popleft()
        if self.place.last_stage:
            grad = None
        elif self.gradient_here:
            grad = self.message(batch)
            dist.recv(grad, group=self.place.answer_group, group_src=self.place.pp_rank + 1)
        if end is not None:  # no end: nothing that this micro-batch met here is trained, an unused projector say
            torch.autograd.backward([end], [grad])
        if self.gradient_up:
            self.up.send(x.grad)
