"""What a rank reads, holds, computes backwards and says to the others: its part, and no more."""

import json
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from helpers import Tokens, layout_config, make_eyes, random_tokens, text_fields, write_json
from processes import run_ranks
from safetensors.torch import save_file

import fp8
from generate import Engine
from parallel import Place
from runtime.checkpoint import Checkpoint, fill
from runtime.config import read_config
from runtime.launch import find_place
from runtime.optimizer import held_tensors
from runtime.requests import Request
from vision import build_model

# ------------------------------------------------------------------------------------------------------ gradients


def gradients(directory: str, place: Place) -> dict:
    """The features of two images, the losses of the text around them, and every parameter's gradient with its part."""
    config = read_config(directory)
    model = build_model(config, place, torch.float32)
    fill(model, Checkpoint(directory))
    draw = torch.Generator().manual_seed(2)
    images = [torch.randn(3, rows * 6, columns * 6, generator=draw) for rows, columns in ((2, 3), (1, 2))]
    features = model.vision(images)
    tokens = torch.tensor([[20, *[10] * 6, 30, 40, *[10] * 2, 50, 60]])
    x = model(model.embed(tokens, features))
    losses = model.lm_head.cross_entropy(model.logits(x[0]), (tokens[0] * 7 + 3) % config.vocab_size)
    losses.mean().backward()
    found = {t.name: (t.part, t.sharers, t.rows.rows_of(t.parameter.grad)) for t in held_tensors(model)}
    return {"features": features.detach(), "losses": losses.detach(), "gradients": found}


def gradients_on_a_rank(directory: str, tp: int) -> dict:
    return gradients(directory, find_place(tp, 1))


@pytest.mark.parametrize("tp, tied", [(2, False), (4, True)])
def test_gradients(tp, tied, tmp_path):
    """Forward and backward through tower, projector and decoder; with tp 4 two ranks share a key/value head.

    The gradient of a shared part is the sum of what its sharers find; of all else each rank finds the whole.
    """
    directory = make_eyes(tmp_path, "new", None, dict(tie_word_embeddings=tied))
    expected = gradients(directory, Place())
    ranks = run_ranks(gradients_on_a_rank, tp, directory, tp)
    for rank in ranks:
        for name in ("features", "losses"):
            torch.testing.assert_close(rank[name], expected[name], atol=1e-5, rtol=1e-4)
    for name, (_, _, whole) in expected["gradients"].items():
        assert whole.abs().max() > 0
        found = torch.zeros_like(whole)
        for rank in ranks:
            part, sharers, grad = rank["gradients"][name]
            inside = max(0, min(part.stop, whole.shape[part.dim]) - part.start)
            grad, target = grad.narrow(part.dim, 0, inside), found.narrow(part.dim, part.start, inside)
            if sharers > 1:
                target += grad
            elif part.local_shape == part.shape:
                torch.testing.assert_close(grad, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-3, msg=name)
                target.copy_(grad)
            else:
                target.copy_(grad)
        torch.testing.assert_close(found, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-3, msg=name)
    if tp == 4:
        assert any(sharers > 1 for _, sharers, _ in ranks[0]["gradients"].values())


# ---------------------------------------------------------------------------------------------------- what is said


def conversation(directory: str, tp: int, pp: int, prompt: list[int], count: int, sampler: dict) -> list:
    """(what, bytes) of every message of a request, in the order in which this rank sends or joins them."""
    place, said = find_place(tp, pp), []
    config = read_config(directory)
    model = build_model(config, place, torch.float32)
    fill(model, Checkpoint(directory))

    def listen(name: str) -> None:
        real = getattr(dist, name)

        def call(*arguments, **options):
            tensor = next((a for a in arguments if isinstance(a, torch.Tensor)), None)
            said.append((name, None if tensor is None else tensor.numel() * tensor.element_size()))
            return real(*arguments, **options)

        setattr(dist, name, call)

    for name in dir(dist):  # everything that takes a group talks to it
        if callable(getattr(dist, name)) and name.startswith(
            ("all_", "broadcast", "isend", "send", "recv", "irecv", "reduce", "gather", "scatter", "barrier", "batch_")
        ):
            listen(name)
    Engine(model, Tokens.eos_id, 64).generate([Request(prompt, max_new_tokens=count, **sampler)])
    return list(said)


@pytest.mark.parametrize("sampler", [{}, dict(temperature=1.0, seed=1), dict(temperature=1.0, top_p=0.9, seed=1)])
def test_what_ranks_say(sampler, tmp_path):
    """Prefill and decode at TP=2 and at TP=2 × PP=2: two all-reduces a layer and one for the embedding, four numbers
    for the token, the hidden states at a border of stages, the token's way back; logits for top-p, and for it alone."""
    directory = make_eyes(tmp_path, "new", None, dict(vision_config=None))
    config, prompt, count = read_config(directory), random_tokens(9, 301), 4
    layers, nucleus = config.num_hidden_layers, sampler.get("top_p", 1) < 1
    padded = -(-config.vocab_size // 2)

    def passes(tokens: int, stage_layers: int, first: bool, last: bool) -> list:
        hidden = 4 * tokens * config.hidden_size  # float32
        said = [("all_reduce", hidden)] if first else [("recv", hidden)]
        said += [("all_reduce", hidden)] * (2 * stage_layers)
        if not last:
            return [*said, ("isend", hidden)]
        return said + [("all_gather", 4 * padded)] * nucleus + [("all_gather", 4 * 8)]

    for rank in run_ranks(conversation, 2, directory, 2, 1, prompt, count, sampler):
        expected = passes(len(prompt), layers, True, True)
        for _ in range(count - 1):
            expected += passes(1, layers, True, True)
        assert rank == expected
    for i, rank in enumerate(run_ranks(conversation, 4, directory, 2, 2, prompt, count, sampler)):
        first, expected = i < 2, []
        for step in range(count):
            tokens, stage_layers = len(prompt) if step == 0 else 1, layers - layers // 2 if first else layers // 2
            expected += [*passes(tokens, stage_layers, first, not first), ("broadcast", 2 * 8)]
        assert rank == expected


# ---------------------------------------------------------------------------------------------------- what is read


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def load_on_a_rank(directory: str, tp: int, pp: int, keep_fp8: bool, dtype=torch.bfloat16, block: int = 0) -> dict:
    place, peak, done = find_place(tp, pp), 0, False
    fp8.BLOCK = block or fp8.BLOCK

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.003)

    thread = threading.Thread(target=watch)
    before = anonymous()
    thread.start()
    checkpoint = Checkpoint(directory)
    model = build_model(read_config(directory), place, dtype, keep_fp8)
    fill(model, checkpoint)
    done = True
    thread.join()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    norms = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 1)
    return dict(
        peak=peak, before=before, read=checkpoint.bytes_read, weights=sum(sizes), largest=max(sizes), norms=norms
    )


def write_large(directory, layers: int = 17) -> int:
    """An FP8 checkpoint of more than 1 GB, written file by file; returns the bytes of its tensors."""
    fields = text_fields(
        "yarn", vocab_size=32_003, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    name, contents = layout_config(fields, "text", "static")
    write_json(os.path.join(directory, name), contents)
    C, F, V, q, kv = 2048, 8192, 32_003, 2048, 1024
    shapes = {"self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C)}
    shapes |= {"self_attn.o_proj": (C, q), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}
    weight_map, total = {}, 0

    def write(file: str, tensors: dict) -> None:
        nonlocal total
        save_file(tensors, os.path.join(directory, file))
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    for layer in range(layers):
        tensors, stem = {}, f"model.layers.{layer}"
        for name, shape in shapes.items():
            tensors[f"{stem}.{name}.weight"] = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
            for scale in ("weight_scale_inv", "activation_scale"):
                tensors[f"{stem}.{name}.{scale}"] = torch.tensor(0.01, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{name}.weight"] = torch.ones(C, dtype=torch.bfloat16)
        write(f"model-{layer + 1:05d}.safetensors", tensors)
    for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        write(f"model-{layers + i + 1:05d}.safetensors", {name: torch.ones(V, C, dtype=torch.bfloat16)})
    write(f"model-{layers + 3:05d}.safetensors", {"model.norm.weight": torch.ones(C, dtype=torch.bfloat16)})
    write_json(os.path.join(directory, "model.safetensors.index.json"), {"weight_map": weight_map})
    return total


@pytest.mark.slow
@pytest.mark.time_limit(400)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_a_rank_reads_and_holds_its_part(tmp_path):
    """1.3 GB in FP8 at TP=2 × PP=2, dequantized and kept: bytes read, and anonymous memory at its peak."""
    total = write_large(tmp_path)
    assert total > 1e9
    try:
        for keep_fp8 in (False, True):
            ranks = run_ranks(load_on_a_rank, 4, str(tmp_path), 2, 2, keep_fp8, seconds=180)
            print(json.dumps(dict(total=total, keep_fp8=keep_fp8, ranks=ranks)))
            norms = sum(rank["norms"] for rank in ranks)
            read = sum(rank["read"] for rank in ranks)
            assert 0.99 * total < read <= 1.02 * total + norms
            for rank in ranks:
                assert rank["read"] < 0.27 * total
                assert rank["peak"] < rank["weights"] + rank["largest"] + 400e6
                assert rank["peak"] > rank["weights"]
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_filling_holds_no_weight_twice(dtype, tmp_path):
    """Beyond the weights there is what was read of one of them, and a block of it dequantized or cast."""
    write_large(tmp_path, layers=2)
    (rank,) = run_ranks(load_on_a_rank, 1, str(tmp_path), 1, 1, False, dtype, 1 << 20)
    largest = 2 * 32_003 * 2048  # of the embedding, which is stored in BF16
    # What was there before may be given back meanwhile: some megabytes, once in many runs.
    assert 0.95 * rank["weights"] < rank["peak"] - rank["before"] < rank["weights"] + largest + 24e6
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()


def test_a_rank_opens_only_its_files(tmp_path):
    """A file that only the last stage needs may be missing on the first stage's machine for all it knows."""
    directory = make_eyes(tmp_path, "new", None, {})
    opened = run_ranks(files_of_a_rank, 4, directory, 2, 2)
    assert opened[0] == opened[1] and opened[2] == opened[3]


def files_of_a_rank(directory: str, tp: int, pp: int) -> list[str]:
    place, opened = find_place(tp, pp), []
    checkpoint = Checkpoint(directory)
    real = checkpoint.file
    checkpoint.file = lambda path: (opened.append(os.path.basename(path)), real(path))[1]
    fill(build_model(read_config(directory), place, torch.float32), checkpoint)
    return sorted(set(opened))
