"""What only makes a CPU faster gives the numbers of the plain formulas."""

import random
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import Letters, later_chunk, load, random_state, random_tokens, text_fields, write_checkpoint
from processes import run_ranks
from request_cases import drawn_requests

from generate import Engine
from model import KVCache, MistralMedium, attend
from parallel import Linear, Part, Slice
from runtime import cpu
from runtime.checkpoint import Checkpoint, fill, initialize
from runtime.config import read_config
from runtime.lora import add_adapters
from runtime.requests import Request
from vision import build_model


def product_of(weight: torch.Tensor) -> cpu.Product:
    """The product of a linear that has this weight."""
    linear = Linear([Part(Slice.of(weight.shape, 0, 0, 1))], torch.bfloat16)
    linear.weight = torch.nn.Parameter(weight)
    return cpu.Product(linear)


@pytest.mark.parametrize("rows", [1, 3, 70, 300])
@pytest.mark.parametrize("kind", [cpu.OneDNNWeight, cpu.FBGEMMWeight, product_of])
def test_bf16_on_a_cpu(kind, rows):
    """Each way to multiply BF16 on this CPU, against float64: a BF16 number beside the exact one at most."""
    if kind is cpu.OneDNNWeight and not cpu.knows_bf16():
        pytest.skip("oneDNN has no BF16 kernels for this CPU")
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(617, 451, generator=generator).mul_(0.02).bfloat16()
    weight[5], weight[7, 3] = weight[5] * 1e-4, 1e-9  # below what FP16 has digits for
    x = torch.randn(min(rows, 2), rows, 451, generator=generator).bfloat16()
    exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    with torch.inference_mode():
        product = kind(weight)
        for found in (product(x), product(x), product(x)):  # the second time in the layout of the kernels
            assert found.dtype == torch.bfloat16 and found.shape == exact.shape and found.is_contiguous()
            bound = exact.abs() * 2**-8 + sizes * 2**-20 + 451 * 3e-8
            assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("largest", [1e-3, 1e5, float("inf"), float("nan")])
def test_what_fp16_cannot_hold(largest, monkeypatch):
    """Weights that are very small or very large, or none at all, are multiplied as they are."""
    monkeypatch.setattr(cpu, "knows_bf16", lambda: False)
    weight = torch.randn(6, 5).bfloat16()
    assert isinstance(cpu.pack(weight), cpu.FBGEMMWeight)
    assert cpu.pack(weight * (largest / weight.abs().max())) is None


def grown_over_lengths(folder: str, dtype: torch.dtype, training: bool) -> float:
    """By how many MB this process grew while the model read prompts, or batches, of 120 more lengths."""
    model, draw = load(folder, dtype).requires_grad_(training), random.Random(0)
    cpu.speed_up(model, inference=not training)

    def read(lengths: list[int]) -> float:
        for length in lengths:
            hidden = model(model.embed(torch.randint(0, 99, (2, length))))
            if training:
                hidden.float().square().mean().backward()
                model.zero_grad()
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    lengths = draw.sample(range(100, 600), 160)
    with torch.set_grad_enabled(training):
        return -read([599, *lengths[:40]]) + read(lengths[40:])


@pytest.mark.parametrize("dtype, training", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_memory_over_many_lengths(dtype, training, tmp_path):
    """What a CPU's kernels keep for every length is bounded: with oneDNN's own limits, 1,024 kernels twice."""
    fields = text_fields(hidden_size=384, intermediate_size=1152, num_hidden_layers=1, vocab_size=99)
    write_checkpoint(tmp_path, fields, random_state(fields))
    (grown,) = run_ranks(grown_over_lengths, 1, str(tmp_path), dtype, training)
    assert grown < 150, grown


@pytest.mark.parametrize("units", ["matrix", "rows", "none"])
@pytest.mark.parametrize("seed", range(12))
def test_products_and_gradients(seed, units, monkeypatch):
    """As CPUs with matrix units, BF16 instructions or neither multiply, on any CPU: no rows to many; and gradients."""
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: units == "matrix")
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: units != "none")
    draw = random.Random(seed)
    some = (draw.randint(0, 2 * cpu.FLOAT32_ROWS),)
    shape = draw.choice([some, some, (1, 1), (), (draw.randint(1, 3), draw.randint(1, 90))]) if seed else (0,)
    torch.manual_seed(seed)
    x, weight = torch.randn(*shape, 37).bfloat16(), torch.randn(draw.randint(1, 90), 37).bfloat16()
    exact, found = (
        [t.detach().to(dtype).requires_grad_() for t in (x, weight)] for dtype in (torch.double, torch.bfloat16)
    )
    product = product_of(found[1].detach())
    product.linear.weight = torch.nn.Parameter(found[1].detach())
    found[1] = product.linear.weight
    results = []
    for multiply, (a, b) in ((F.linear, exact), (lambda a, _: product(a), found)):
        y = multiply(a, b)
        y.square().sum().backward()
        results.append((y.detach(), a.grad, b.grad))
    assert results[1][0].is_contiguous()
    for mine, theirs in zip(results[1], results[0]):
        assert mine.shape == theirs.shape and mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), theirs, rtol=0.03, atol=0.03 * max(1, float(theirs.norm()) / 5))


@pytest.mark.parametrize("seed", range(8))
def test_float32_by_onednn(seed):
    """Products and gradients against float64, for any shape; of a weight or an input that wants none, none."""
    draw = random.Random(seed)
    shape = draw.choice([(draw.randint(64, 99),), (draw.randint(1, 3), draw.randint(64, 99))])
    wants_x, wants_weight = draw.choice([(True, True), (True, False), (False, True)])
    torch.manual_seed(seed)
    columns = draw.randint(1, 90)
    x, weight = torch.randn(*shape, columns, requires_grad=wants_x), torch.randn(draw.randint(1, 90), columns)
    linear = Linear([Part(Slice.of(weight.shape, 0, 0, 1))], torch.float32)
    linear.weight = torch.nn.Parameter(weight, requires_grad=wants_weight)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    found, wanted = cpu.Product(linear)(x).mul_(2), 2 * F.linear(*exact)  # as heads are turned in place
    for y in (found, wanted):
        y.square().sum().backward()
    pairs = (found, wanted), (x.grad, exact[0].grad), (linear.weight.grad, exact[1].grad)
    assert [mine is not None for mine, _ in pairs] == [True, wants_x, wants_weight]
    for mine, theirs in pairs:
        if mine is not None:
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("seed", range(16))
def test_attention_of_training(seed, monkeypatch):
    """Two products, short samples: outputs and gradients against float64, of text and (KV = H, no mask) of patches."""
    draw, dtype = random.Random(seed), (torch.bfloat16, torch.float32)[seed % 2]
    B, KV, heads, T, D = (draw.randint(1, most) for most in (3, 3, 4, 40, 70))
    causal = draw.random() < 0.6
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(B, T, n, D).mul_(draw.choice([0.3, 1, 3])).to(dtype).transpose(1, 2).requires_grad_()
        for n in (KV * heads, KV if causal else KV * heads, KV if causal else KV * heads)
    )
    grad, by_products = torch.randn(B, KV * heads, T, D).to(dtype), []
    products = cpu.attend_by_products
    monkeypatch.setattr(
        cpu, "attend_by_products", lambda *args, **more: by_products.append(1) or products(*args, **more)
    )
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in wide[1:])
    hidden = torch.full((T, T), -torch.inf if causal else 0.0, dtype=torch.double).triu_(1)
    exact = (wide[0] @ keys.mT * D**-0.5 + hidden).softmax(-1) @ values
    found = cpu.attend_fast(q, k, v, causal)
    assert by_products and found.dtype == dtype
    exact.backward(grad.double())
    found.backward(grad)
    for mine, theirs in ((found, exact), *((x.grad, y.grad) for x, y in zip((q, k, v), wide))):
        error = (mine.double() - theirs).norm() / theirs.norm().clamp(min=1e-2 * grad.norm().double())
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-6)


def test_which_attention_of_training(monkeypatch):
    """Two products for short samples with gradients; not where none are wanted, as in validation."""
    monkeypatch.setattr(cpu, "attend_by_products", lambda *_: "products")

    def chosen(dtype: torch.dtype, tokens: int, grad: bool = True):
        q, kv = torch.zeros(1, 2, tokens, 2, dtype=dtype, requires_grad=grad), torch.zeros(1, 1, tokens, 2).to(dtype)
        return isinstance(cpu.attend_fast(q, kv, kv), str)

    assert chosen(torch.bfloat16, 256) and not chosen(torch.bfloat16, 257) and not chosen(torch.bfloat16, 5, grad=False)
    assert chosen(torch.float32, 128) and not chosen(torch.float32, 129) and not chosen(torch.float64, 5)


@pytest.mark.parametrize("case", range(12))
def test_a_later_chunk(case):
    """A chunk attends to itself and to what came before it, apart; together that is one softmax, however steep."""
    q, k, v, _ = later_chunk(case)
    torch.testing.assert_close(cpu.attend_in_two(q, k, v), attend(q, k, v), rtol=2e-5, atol=2e-5)


class Endless(Letters):
    eos_id = -1  # no answer ends by itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    fields = text_fields("yarn, short")
    return write_checkpoint(tmp_path_factory.mktemp("cpu"), fields, random_state(fields, seed=8))


@pytest.mark.skipif(not cpu.knows_bf16() or sys.version_info >= (3, 14), reason="steps are not traced here")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed, adapters", [(1, False), (2, False), (3, True), (4, True)])
def test_traced_steps(seed, adapters, packed, folder, monkeypatch):
    """The numbers of steps that Python runs, whatever the rows and lengths were when a layer was traced."""
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: not packed)
    model = build_model(read_config(folder), dtype=torch.bfloat16)
    if adapters:
        add_adapters(model, 3, 20.0)
    initialize(model, seed) if adapters else fill(model, Checkpoint(folder))
    cpu.speed_up(model)
    steps, engine = model.forward, Engine(model, Endless.eos_id, 4096)
    if packed:
        steps.pack()
    steps.packed = True  # or as if: then nothing ever is
    for turn, rows in enumerate(random.Random(seed).sample((1, 2, 5, 9, 20, 70), k=6)):
        requests, results = drawn_requests(rows, 10 * seed + turn), []
        for forward in (steps.forward, steps):
            model.forward = forward
            results.append(engine.generate(requests, width=1 + turn * 20))
            engine.groups.clear()
        assert [(x.tokens, x.logprobs) for x in results[0]] == [(x.tokens, x.logprobs) for x in results[1]]
    assert sorted(steps.graphs) == [(False, False, 1), (True, True, 1)]  # of several rows and of one


@pytest.mark.skipif(not cpu.knows_bf16() or sys.version_info >= (3, 14), reason="steps are not traced here")
@pytest.mark.parametrize("seed", range(8))
def test_steps_of_several_tokens(seed, folder):
    """As drafts make them: rows at positions of their own, some tokens of each; also a single row that is not aligned.

    Layers that a draft has behind the model's own are not touched.
    """
    draw = random.Random(seed)
    model = build_model(read_config(folder), dtype=torch.bfloat16)
    fill(model, Checkpoint(folder))
    cpu.speed_up(model)
    steps = model.forward
    steps.pack()
    torch.manual_seed(seed)
    for _ in range(12):
        rows, tokens = draw.choice((1, 1, 2, 5)), draw.choice((1, 1, 3, 4))
        starts = torch.randint(0, 20, (rows, 1))
        positions, length = starts + torch.arange(tokens), int(starts.max()) + tokens + draw.randint(0, 3)
        x = torch.randn(rows, tokens, model.config.hidden_size).bfloat16()
        filled = [torch.randn_like(layer) for layer in model.new_cache(rows, 30).layers]
        caches = [KVCache([layer.clone() for layer in filled + filled[:1]]) for _ in range(2)]
        with torch.inference_mode():
            plain, fast = (f(x, model.step(positions, length), c) for f, c in zip((steps.forward, steps), caches))
        assert torch.equal(plain, fast)
        assert all(map(torch.equal, caches[0].layers, caches[1].layers))
    assert len(steps.graphs) > 1


@pytest.mark.parametrize("adapters, tied", [(False, False), (False, True), (True, False)])
def test_packed_by_the_first_steps(adapters, tied, tmp_path):
    """Not before the first token, and only a model that is to answer; BF16 answers stay what they were."""
    fields = text_fields("yarn, short", tie_word_embeddings=tied)
    folder = write_checkpoint(tmp_path, fields, random_state(fields, seed=8))
    plain, fast = (build_model(read_config(folder), dtype=torch.bfloat16) for _ in range(2))
    for model in (plain, fast):
        if adapters:
            add_adapters(model, 3, 6.0)
            initialize(model, seed=1)
            for linear in linears(model):  # else they would change next to nothing
                if linear.adapter:
                    linear.adapter.lora_B.weight.data.mul_(200)
        else:
            fill(model, Checkpoint(folder))
    cpu.speed_up(plain, inference=False)
    cpu.speed_up(fast)
    packs = cpu.pack(torch.ones(2, 2).bfloat16()) is not None  # on this CPU
    prompt, steps = random_tokens(40, 301), 0
    for count in (1, 4, 1):  # the third time the prompt meets packed weights
        wanted, found = (
            Engine(model, Endless.eos_id, 200).generate([Request(prompt, max_new_tokens=count, logprobs=True)])[0]
            for model in (plain, fast)
        )
        steps += count - 1
        inside = [linear for layer in fast.layers.values() for linear in linears(layer)]
        assert len(inside) == 4 * len(fast.layers)
        assert all((linear.weight is None) == (packs and steps > 1) for linear in inside)
        assert (fast.lm_head.multiply.packed is not None) == (packs and steps > 1)  # tied, it is a copy
        assert torch.tensor(found.prompt_logprobs[1:]).sub(torch.tensor(wanted.prompt_logprobs[1:])).abs().max() < 0.2
    assert all(linear.weight is not None for linear in linears(plain))


def linears(model: MistralMedium) -> list[Linear]:
    """Those that are not an adapter's, nor a head without a weight of its own."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    return [layer for name, layer in layers.items() if ".adapter" not in name and layer.parts]
