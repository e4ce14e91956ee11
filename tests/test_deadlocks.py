"""No schedule ends with ranks that wait for each other: the project's Pipeline and Engine under NCCL's rules.

Gloo is too kind to show it: its messages need no order among those of other pairs, and its sends need no receiver.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import text_fields
from nccl_rules import Recorder, Step, standing_still

from generate import Engine
from parallel import Pipeline, Place
from runtime.checkpoint import initialize
from runtime.config import parse_config
from runtime.launch import find_place
from runtime.optimizer import Optimizer
from runtime.requests import Request
from vision import build_model

VARIANTS = {"streams": {}, "drained": dict(drained=True), "one queue": dict(one_queue=True)}


def record(stages: int, work: Callable[[Recorder, Place], None], start: bool = False, **options) -> list[Recorder]:
    """What each stage asks for in `work`; with `start` also while it finds its place."""
    recorders = []
    for rank in range(stages):
        with Recorder(rank, stages, **options) as recorder:
            place = find_place(1, stages)
            if not start:
                recorder.trace.clear()
                recorder.pairs.clear()
            work(recorder, place)
        recorders.append(recorder)
    return recorders


def traces(recorders: list[Recorder]) -> list[list[Step]]:
    return [recorder.trace for recorder in recorders]


# -------------------------------------------------------------------------------------------------------- training


class Stage(torch.autograd.Function):
    """A forward and a backward kernel."""

    @staticmethod
    def forward(ctx, x, weight, kernel):
        ctx.kernel = kernel
        kernel()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.kernel()
        return grad, torch.zeros(()), None


def training(count: int, trained: list[bool] | None = None, one_group: bool = False) -> Callable:
    """A step of `count` micro-batches, with an embedding at both ends, and a validation."""

    def work(recorder: Recorder, place: Place) -> None:
        if one_group:
            place = replace(place, answer_group=place.pp_group)
        train = trained is None or trained[place.rank]
        weight = torch.zeros((), requires_grad=train)

        def run_stage(x, batch):
            x = Stage.apply(torch.zeros(1, 2, 4) if x is None else x, weight, recorder.kernel)
            return x.sum() if place.last_stage else x

        pipeline = Pipeline(place, run_stage, 4, torch.float32, train)
        batches = [SimpleNamespace(shape=(1, 2)) for _ in range(count)]
        pipeline.train(batches)
        if trained is None and place.rank in (0, place.pp_size - 1):
            Optimizer._add_other_end(SimpleNamespace(place=place), torch.zeros(2))
        torch.zeros(1).tolist()  # the norm
        recorder.collective(None)
        pipeline.evaluate(batches)
        recorder.collective(None)

    return work


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_training_ends(stages):
    """Few micro-batches, where stages run dry, and many."""
    drawn = random.Random(stages).sample(range(stages + 1, 17), 3)
    for count in (1, stages, *drawn):
        recorded = traces(record(stages, training(count)))
        for name, options in VARIANTS.items():
            assert standing_still(recorded, **options) == [], (name, count)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_training_with_frozen_stages_ends(stages):
    rng = random.Random(stages)
    for frozen in range(stages):
        trained = [rng.random() < 0.5 for _ in range(stages)]
        trained[frozen] = False
        trained[frozen - 1] = True
        recorded = traces(record(stages, training(rng.randint(1, 9), trained), gathered=trained))
        for name, options in VARIANTS.items():
            assert standing_still(recorded, **options) == [], (name, trained)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_one_group_for_both_directions_does_not_end(stages):
    """The control: the rules can tell. From the second micro-batch on, two neighbours both send first."""
    for count in (1, 2, random.Random(stages).randint(3, 16)):
        recorded = traces(record(stages, training(count, one_group=True)))
        for name, options in VARIANTS.items():
            assert len(standing_still(recorded, **options)) == (stages if count > 1 else 0), (name, count)


# ------------------------------------------------------------------------------------------------------ generation


def tiny(place: Place):
    """As many layers as stages at least, each as small as can be."""
    fields = text_fields(num_hidden_layers=place.pp_size + 1)
    model = build_model(parse_config(fields), place, torch.float32)
    initialize(model, 0)
    return model


def generation(seed: int) -> Callable:
    """Batches of drawn requests, one after the other."""

    def work(recorder: Recorder, place: Place) -> None:
        rng, model = random.Random(seed), tiny(place)
        model.register_forward_pre_hook(lambda *_: recorder.kernel())
        engine = Engine(model, -1, 4096)
        engine.chunk = rng.choice([4, 8, 16, 64])
        for _ in range(2):
            count = rng.choice([1, 2, 5, 9])
            prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 40))] for _ in range(count)]
            asked = [Request(prompt, [], rng.randint(0, 6), logprobs=rng.random() < 0.3) for prompt in prompts]
            engine.generate(asked, width=rng.choice([None, 1, 3]), stop=(lambda: False) if rng.random() < 0.7 else None)
            recorder.collective(None)

    return work


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_generation_ends(stages):
    for seed in range(4):
        recorded = traces(record(stages, generation(10 * stages + seed)))
        for name, options in VARIANTS.items():
            assert standing_still(recorded, **options) == [], (name, seed)


# ------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_pairs_that_talk_have_talked(stages):
    """Before the weights are read, and without waiting for each other in a ring."""
    at_start = record(stages, lambda recorder, place: None, start=True)
    for name, options in VARIANTS.items():
        assert standing_still(traces(at_start), **options) == [], name
    for work in (training(3), generation(stages)):
        for later, before in zip(record(stages, work), at_start):
            assert later.pairs and later.pairs <= before.pairs
