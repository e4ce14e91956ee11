"""Pipeline parallelism: messages between neighbouring stages, and the schedule of training.

`Place.layers` says which layers a stage has. The first stage also has the embedding and the vision tower, the last the
norm and the head. Hidden states walk down the stages through a `Channel`, for training and generation (`engine.py`)
alike.

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
"""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from parallel import Place, all_gather


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
