"""The 1F1B schedule: its order, what it holds, and its gradients, on stages that are single matrices."""

from dataclasses import dataclass

import pytest
import torch
from processes import run_ranks

from parallel import Pipeline
from runtime.launch import find_place

SIZE = 6


@dataclass
class Batch:
    number: int
    shape: tuple[int, int]


def weight(stage: int) -> torch.Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(stage)) / 2


def first_input(batch: Batch) -> torch.Tensor:
    return torch.randn(*batch.shape, SIZE, generator=torch.Generator().manual_seed(100 + batch.number))


def work(stages: int, shapes: list, trained: list[bool]) -> dict:
    """One stage's process: its gradient, and what happened when."""
    place = find_place(1, stages)
    rank, W, events = place.pp_rank, weight(place.pp_rank).requires_grad_(trained[place.pp_rank]), []

    class Stage(torch.autograd.Function):  # notes when its backward pass runs
        @staticmethod
        def forward(ctx, x, W, number):
            ctx.save_for_backward(x, W)
            ctx.number = number
            return torch.tanh(x @ W)

        @staticmethod
        def backward(ctx, grad):
            events.append(("backward", ctx.number))
            x, W = ctx.saved_tensors
            grad = grad * (1 - torch.tanh(x @ W) ** 2)
            return grad @ W.T, x.flatten(0, -2).T @ grad.flatten(0, -2), None

    def stage(x, batch):
        events.append(("forward", batch.number))
        x = Stage.apply(first_input(batch) if x is None else x, W, batch.number)
        return x.square().sum() if place.last_stage else x

    pipeline = Pipeline(place, stage, SIZE, torch.float32, trained[rank])
    pipeline.train([Batch(i, shape) for i, shape in enumerate(shapes)])
    result = {"events": events, "grad": W.grad, "most_held": pipeline.most_held}
    return {**result, "left": len(pipeline.held)}


def run(stages: int, shapes: list, trained: list[bool] | None = None) -> list[dict]:
    return run_ranks(work, stages, stages, shapes, trained or [True] * stages)


def expected_gradients(stages: int, shapes: list) -> list[torch.Tensor]:
    weights = [weight(stage).requires_grad_() for stage in range(stages)]
    for i, shape in enumerate(shapes):
        x = first_input(Batch(i, shape))
        for W in weights:
            x = torch.tanh(x @ W)
        x.square().sum().backward()
    return [W.grad for W in weights]


@pytest.mark.parametrize("stages, count", [(1, 3), (2, 5), (4, 7), (4, 2), (3, 1), (2, 0)])
def test_schedule(stages, count):
    """Gradients are exact, stages take turns as 1F1B says, and hold as few micro-batches as it promises."""
    shapes = [(1 + i % 2, 3 + 2 * i % 7) for i in range(count)]
    results = run(stages, shapes)
    for stage, (result, grad) in enumerate(zip(results, expected_gradients(stages, shapes))):
        if count:
            torch.testing.assert_close(result["grad"], grad)
        warm_up = min(stages - 1 - stage, count)
        order = [("forward", i) for i in range(warm_up)]
        for i in range(count - warm_up):
            order += [("forward", warm_up + i), ("backward", i)]
        order += [("backward", i) for i in range(count - warm_up, count)]
        assert result["events"] == order
        assert result["most_held"] == min(stages - stage, count) and result["left"] == 0


def test_nothing_is_sent_to_stages_that_train_nothing():
    shapes = [(1, 4), (2, 3), (1, 5)]
    results = run(4, shapes, [False, False, True, False])
    grads = expected_gradients(4, shapes)
    kinds = [{kind for kind, _ in result["events"]} for result in results]
    assert kinds == [{"forward"}, {"forward"}, {"forward", "backward"}, {"forward", "backward"}]
    torch.testing.assert_close(results[2]["grad"], grads[2])
    assert [result["grad"] is None for result in results] == [True, True, False, True]


def test_outputs_are_freed_once_sent(monkeypatch):
    """The graph is kept by its end alone; the hidden states that were sent are not."""
    import weakref

    from parallel import Place

    sent = []

    class FakeChannel:
        def send(self, x):
            sent.append(weakref.ref(x))

        def flush(self):
            pass

    W = weight(0).requires_grad_()
    pipeline = Pipeline(Place(pp_size=2), lambda x, batch: first_input(batch) @ W, SIZE, torch.float32, True)
    pipeline.down = FakeChannel()
    pipeline.gradient_here = True
    outputs = []
    run_stage = pipeline.run_stage

    def watched(x, batch):
        out = run_stage(x, batch)
        outputs.append(weakref.ref(out))
        return out

    pipeline.run_stage = watched
    pipeline.forward(Batch(0, (1, 4)))
    assert pipeline.held[0][2] is not None and outputs[0]() is None and sent[0]() is None
    torch.autograd.backward([pipeline.held[0][2]], [torch.ones(1, 4, SIZE)])
    assert W.grad is not None
