"""The pipeline's bubble against (p - 1) / (m + p - 1), and what its stages hold against 1F1B's bound.

    python benchmarks/pipeline_bubble.py [--stages 4] [--sleep 0.05]

The bubble is measured with stages that sleep for a forward and twice as long for a backward pass: a schedule's waiting
then shows by itself, however few cores the processes share. The activations are measured with a small decoder, as the
bytes that autograd keeps for backward passes, against p - s times those of one micro-batch on stage s.
"""

import argparse
import multiprocessing
import os
import socket
import sys
import time
import weakref
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import torch
import torch.distributed as dist
from helpers import text_fields

from model import MistralMedium
from parallel import Pipeline
from runtime.checkpoint import initialize
from runtime.config import parse_config
from runtime.launch import find_place
from vision import build_model

COUNTS = (1, 2, 4, 8, 16)  # micro-batches
SIZES = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "num_attention_heads": 4}


@dataclass
class Batch:
    tokens: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.tokens.shape)


class Sleep(torch.autograd.Function):
    """A layer that takes its time."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


def bubble(place, count: int, seconds: float) -> float:
    """The share of time in which this stage does nothing, with `count` micro-batches."""
    weight = torch.ones(1, requires_grad=True)

    def stage(x, batch):
        x = Sleep.apply((torch.zeros(1, 1, 8) if x is None else x) * weight, seconds)
        return x.sum() if place.last_stage else x

    pipeline = Pipeline(place, stage, 8, torch.float32, True)
    batches = [Batch(torch.zeros(1, 1)) for _ in range(count)]
    dist.barrier()
    started = time.perf_counter()
    pipeline.train(batches)
    dist.barrier()  # the step ends when the slowest stage is done
    return 1 - 3 * seconds * count / (time.perf_counter() - started)


def most_saved(place, model: MistralMedium, count: int) -> tuple[int, int]:
    """(bytes kept for backward passes at the worst moment, micro-batches held then) on this stage."""
    live, most, weights = 0, 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    class Kept:
        """What autograd keeps of a saved tensor, counted as long as it lives."""

        def __init__(self, x):
            self.x = x

    def pack(x):
        nonlocal live, most
        kept = Kept(x)
        if x.untyped_storage().data_ptr() not in weights:
            live += x.numel() * x.element_size()
            most = max(most, live)
            weakref.finalize(kept, release, x.numel() * x.element_size())
        return kept

    def release(size):
        nonlocal live
        live -= size

    def stage(x, batch):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x):
            x = model.embed(batch.tokens) if x is None else x
            x = model(x)
            return model.logits(x).logsumexp(-1).mean() if place.last_stage else x

    pipeline = Pipeline(place, stage, model.config.hidden_size, torch.float32, True)
    pipeline.train([Batch(torch.randint(97, (1, 64))) for _ in range(count)])
    return most, pipeline.most_held


def work(rank: int, stages: int, seconds: float, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(stages), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    place = find_place(1, stages)
    bubble(place, 2, 0.0)  # makes the connections
    for count in COUNTS:
        idle = torch.tensor([bubble(place, count, seconds)])
        dist.all_reduce(idle)
        if rank == 0:
            share = (stages - 1) / (count + stages - 1)
            print(f"{stages} stages, {count:2} micro-batches: bubble {float(idle) / stages:.3f}, theory {share:.3f}")
    fields = text_fields("plain", vocab_size=97, num_hidden_layers=2 * stages, num_key_value_heads=2, **SIZES)
    config = parse_config(fields)
    model = build_model(config, place, torch.float32)
    initialize(model, 0)
    one, _ = most_saved(place, model, 1)
    for count in COUNTS[-2:]:
        everywhere = [None] * stages
        dist.all_gather_object(everywhere, (*most_saved(place, model, count), one))
        for s, (most, held, one_batch) in enumerate(everywhere if rank == 0 else []):
            bound = stages - s
            print(
                f"{count:2} micro-batches, stage {s}: holds {held} (bound {bound}), "
                f"{most / 1e6:.2f} MB = {most / one_batch:.2f} times one micro-batch's {one_batch / 1e6:.2f} MB"
            )
            assert held <= bound and most <= bound * one_batch
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--sleep", type=float, default=0.05, help="seconds of a forward pass")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(i, args.stages, args.sleep, port)) for i in range(args.stages)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
