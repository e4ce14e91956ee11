"""A GPU without a GPU: the project's own code as any rank of any topology, at full size, in one CPU process.

FakeTensorMode gives tensors a shape, a dtype and a device (`cuda`) but no memory, and checks in every operation that
devices go together. The "fake" process group talks to nobody. Nothing is computed, so 128B take seconds. On top lies
`Watch`, which sees every operation as CUDA would get it, and records

- kernels, and collectives;
- host syncs: where the host waits for the GPU, or for a copy. Each is a gap in which the GPU runs dry;
- faults: what would fail or be wrong on hardware and passes unseen here;
- which kernel attention takes, by torch's own rules, and where it gets a mask;
- bytes of live CUDA storages, now and at their peak.

The pretence replaces functions of torch, so it has a process of its own, which is `python tests/dry_run.py` under
LD_PRELOAD (guard.cpp says why). It runs the scenarios of `dry_cases.py`: on stdin a line of JSON each, [name, options],
and on stdout a line with what was seen. `Process` is the other side of that.
"""

import collections
import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch._dynamo  # before functions of torch are replaced, since it lists them
import torch.distributed as dist
import torch.nn.functional as F
from processes import ENVIRONMENT, ROOT, kill
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from parallel import Place
from runtime.launch import find_place

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = 512  # the caching allocator rounds up to this

# Operations that make no kernel: views, and what only asks or allocates.
FREE = """alias as_strided chunk detach expand lift lift_fresh narrow permute reshape select slice split
split_with_sizes squeeze t transpose unbind unfold unsqueeze view _unsafe_view _reshape_alias
device is_same_size numel size stride sym_size sym_stride sym_numel sym_storage_offset
empty empty_like empty_strided new_empty new_empty_strided set_ resize_ record_stream _local_scalar_dense"""
FREE = frozenset(FREE.split())

# Called by the project itself or chosen below. Flash-decoding is two kernels: the parts of the keys, and their sum.
FLASH = {"_scaled_dot_product_flash_attention": "flash", "_flash_attention_forward": "flash-decoding"}

KERNELS = torch.library.Library("aten", "IMPL")

# ---------------------------------------------------------------------------------------------- what is watched


def where() -> tuple[str, str]:
    """("file:line", "file function") of the innermost line of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        folder, file = os.path.split(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if folder in (ROOT, os.path.join(ROOT, "runtime")) and not name.startswith(
            "<"
        ):  # older Pythons call a list comprehension <listcomp>
            return f"{file}:{frame.f_lineno}", f"{file} {name}"
        frame = frame.f_back
    return "elsewhere", "elsewhere"  # the backward pass of an operation of torch's own


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Stands above a FakeTensorMode, and sees what comes below autograd: operations as a device gets them."""

    def __init__(self):
        super().__init__()
        self.storages: set[int] = set()
        self.now = self.peak = 0  # bytes
        self.flash_decoding = True
        self.forget()

    def forget(self) -> None:
        """Begin anew, but for the tensors that are there."""
        self.kernels, self.collectives, self.attention = (collections.Counter() for _ in range(3))
        self.syncs = collections.Counter()  # (what, "file:line", "file function")
        self.faults: list[str] = []
        self.masks: list[str] = []  # "file:line" where attention got a mask
        self.before = self.peak = self.now
        self.peak_at = ""

    def report(self) -> dict:
        """What was seen since `forget`, as JSON can have it."""
        return dict(
            kernels=sum(self.kernels.values()), kernel_names=dict(self.kernels.most_common()),
            collectives=dict(self.collectives), attention=dict(self.attention), masks=sorted(set(self.masks)),
            syncs=[[*key, count] for key, count in self.syncs.items()], faults=sorted(set(self.faults)),
            before=self.before, peak=self.peak, peak_at=self.peak_at, after=self.now,
        )  # fmt: skip

    def sync(self, what: str) -> None:
        self.syncs[(what, *where())] += 1

    def fault(self, what: str) -> None:
        self.faults.append(f"{what} at {where()[0]}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        inputs = tensors((args, kwargs))
        devices = {x.device.type for x in inputs}
        if space == "c10d":
            self.collectives[name] += 1
            if len(devices) > 1:
                self.fault(f"{name} of tensors on {' and '.join(sorted(devices))}")
            elif devices == {"cpu"}:
                self.sync(f"{name} on the host")
            return func(*args, **kwargs)
        if name == "_scaled_mm":
            self.check_product(func, args, kwargs)
        out = self.made_up(name, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        made = tensors(out)
        everywhere = devices | {x.device.type for x in made}
        if name in ("_to_copy", "copy_") and everywhere == {"cpu", "cuda"}:
            # From or to pageable memory, which the host has to wait for. Within the GPU's queue it does not.
            self.sync("copy to the GPU" if made[0].device.type == "cuda" else "copy to the host")
        if "cuda" in everywhere and name not in FREE and any(map(torch.Tensor.numel, made)):
            self.kernels[name] += 1 + (name == "_flash_attention_forward")
        if name in FLASH:
            self.attention[FLASH[name]] += 1
        for x in made:
            self.hold(x)
        return out

    def made_up(self, name: str, args: tuple, kwargs: dict):
        """The result of operations that ask for values, which nobody has; None for all others."""
        x = args[0] if args else None
        if name == "_local_scalar_dense":  # x.item(), float(x), x.tolist(), if x:
            if x.device.type == "cuda":
                self.sync("item")
            elif not isinstance(x, FakeTensor) or x.constant is not None:
                return None  # this one is known
            return {torch.bool: True}.get(x.dtype, 1.0 if x.dtype.is_floating_point else 1)
        if name == "nonzero":  # as many as there can be
            if x.device.type == "cuda":
                self.sync("nonzero")
            return torch.zeros(x.numel(), x.dim(), dtype=torch.long, device=x.device)
        if name in ("index", "index_put_", "_index_put_impl_"):
            selected = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if selected and x.device.type == "cuda":
                self.sync("index by bool")
            if selected and name == "index":
                return x.new_empty(selected[0].numel(), *x.shape[selected[0].dim() :])
            return x if selected else None
        if name == "_to_copy" and x.device.type == "cpu" and (kwargs.get("device") or x.device).type == "cuda":
            # The values of a small tensor from the host are known, and torch would copy them in earnest.
            dtype = kwargs.get("dtype") or x.dtype
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=kwargs["device"])
        if name == "exponential_":  # with a generator of the host's; shapes do not change
            return x
        return None

    def check_product(self, func, args: tuple, kwargs: dict) -> None:
        """`_scaled_mm` (M, K) × (K, N) by the rules of cuBLAS on Hopper; torch checks them only with a GPU at hand."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        a, b = given["self"], given["mat2"]
        (M, K), N = a.shape, b.shape[1]
        if K % 16 or N % 16:
            self.fault(f"FP8 product of {(M, K)} and {(K, N)}: K and N are no multiples of 16")
        if a.stride() != (K, 1) or b.stride() != (1, K):
            self.fault(f"FP8 product of strides {a.stride()} and {b.stride()}: not row-major by column-major")
        scales = given["scale_a"], given["scale_b"]
        for scale, side, rowwise in zip(scales, "ab", ((M, 1), (1, N))):
            alone = scale.numel() == 1
            if scale.dtype != torch.float32 or scale.device.type != "cuda" or not scale.is_contiguous():
                self.fault(f"FP8 product with a scale_{side} that is not contiguous float32 on the GPU")
            if not alone and tuple(scale.shape) != rowwise:
                self.fault(f"FP8 product with scale_{side} of shape {tuple(scale.shape)}, not one or {rowwise}")
        alone = {scale.numel() == 1 for scale in scales}
        if M > 1 and len(alone) > 1:
            self.fault("FP8 product with one scale per tensor and one per row")
        if False in alone and given.get("out_dtype") != torch.bfloat16:
            self.fault("FP8 product with a scale per row and a result that is not BF16")
        if False in alone and any(scale.stride(-1) != 1 for scale in scales):  # even if it has one element
            self.fault("FP8 product with a scale per row whose last stride is not 1")

    def hold(self, x: torch.Tensor) -> None:
        """Count the storage of `x` until it is gone."""
        if x.device.type != "cuda":
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // PAGE) * PAGE
        if key not in self.storages:
            self.storages.add(key)
            self.now += size
            weakref.finalize(storage, self.release, key, size)
            if self.now > self.peak:
                self.peak, self.peak_at = self.now, where()[0]

    def release(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def attention(watch: Watch):
    """`F.scaled_dot_product_attention` as it would choose on CUDA without cuDNN (ATen/…/cuda/sdp_utils.cpp).

    Flash takes 16-bit tensors of four dimensions without a mask, and `is_causal` only for T = S. With a mask it is the
    memory-efficient kernel: blocks over the queries alone, so that few queries leave most of a GPU idle. Everything
    else is computed step by step, T × S scores in memory.
    """
    plain = F.scaled_dot_product_attention

    def choose(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.device.type != "cuda":
            return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        masked = attn_mask is not None
        if masked:
            watch.masks.append(where()[0])
        half = q.dtype in (torch.bfloat16, torch.float16)
        dense = q.dim() == 4 and all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[-1] <= 256
        square = q.shape[-2] == k.shape[-2]
        if dense and half and not masked and (square or not is_causal):
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        watch.attention["efficient" if dense and not enable_gqa else "math"] += 1
        bias, grad = None, torch.is_grad_enabled() and q.requires_grad
        if masked:  # a boolean mask becomes a bias
            bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
            bias = bias.masked_fill_(attn_mask.logical_not(), -torch.inf).expand(*q.shape[:3], k.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, bias, grad, 0.0, is_causal, scale=scale)[0]

    return choose


class FusedNorm(torch.autograd.Function):
    """`F.rms_norm` as CUDA has it, and nothing here: one kernel, which keeps the input and a number per row."""

    @staticmethod
    def forward(ctx, x, weight, watch):
        ctx.watch = watch
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        watch.kernels["rms_norm"] += 1
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        ctx.watch.kernels["rms_norm backward"] += 3  # the input's gradient; the weight's, in two steps
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


# ------------------------------------------------------------------------------------------------ the pretence


def pretend() -> Watch:
    """Make this process believe in 8 H100 and other ranks, for good. Returns what watches it."""
    # Not `is_available`: without a GPU FakeTensorMode takes care that tensors made from lists never reach one.
    cuda = torch.cuda
    cuda.device_count, cuda.current_device = lambda: 8, lambda: 0
    cuda.get_device_capability = lambda *device: (9, 0)
    cuda.set_device = cuda.synchronize = cuda._lazy_init = lambda *device: None
    cuda.max_memory_allocated = lambda *device: 0
    dist.all_gather_object = all_gather_object
    model.has_flash_decoding = lambda *arguments: watch.flash_decoding
    # In inference mode operations would come here before they are taken apart into those of the GPU.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # what it raises is reported
    # CUDA has a kernel for it. A build without CUDA knows of none, and would take it apart into eight before the modes
    # see it; what is registered here is never called.
    KERNELS.impl("silu_backward", torch.ops.aten.sigmoid_backward, "CUDA")
    watch = Watch()
    F.scaled_dot_product_attention, norm = attention(watch), F.rms_norm
    F.rms_norm = lambda x, shape, weight, eps: (
        FusedNorm.apply(x, weight, watch) if x.device.type == "cuda" else norm(x, shape, weight, eps)
    )
    return watch


def all_gather_object(values: list, value, group=None) -> None:
    """The other ranks of the fake process group have nothing to say: an empty set, no error."""
    for rank in range(len(values)):
        values[rank] = value if rank == dist.get_rank() else type(value)()


@contextlib.contextmanager
def world(rank: int, tp: int, pp: int) -> Iterator[Place]:
    """On tensors without memory, as `rank` of a grid of tp × pp. Yields its place."""
    if tp * pp > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
    try:
        place = find_place(tp, pp)  # outside, since groups are made of real numbers
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield replace(place, device=torch.device("cuda", 0))
    finally:
        if tp * pp > 1:
            dist.destroy_process_group()
        gc.collect()  # the model's tensors are gone before the next scenario counts its own


def serve() -> None:
    """Scenarios from stdin, reports to stdout."""
    torch.set_num_threads(1)
    watch = pretend()
    import dry_cases

    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, options = json.loads(line)
        try:
            answer = getattr(dry_cases, name)(watch, **options)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=out, flush=True)


# ------------------------------------------------------------------------------------------- the tests' side of it


def why_not() -> str | None:
    """Why there can be no dry run here, if there cannot."""
    if torch.version.cuda or torch.version.hip:
        return "the dry run pretends that a CPU build of torch had a GPU; this build has its own idea of them"
    if not sys.platform.startswith("linux"):
        return "the dry run needs LD_PRELOAD"
    return None if compiler() else "the dry run needs a C++ compiler (g++, or another in CXX)"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library() -> str:
    """guard.cpp as a shared library for this torch; compiled when it is first asked for, and kept among temporary
    files."""
    with open(os.path.join(HERE, "guard.cpp"), encoding="utf-8") as file:
        digest = hashlib.sha256(f"{torch.__version__} {torch.__file__} {file.read()}".encode()).hexdigest()[:16]
    folder = os.path.join(tempfile.gettempdir(), f"dry-run-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path, home = os.path.join(folder, f"guard-{digest}.so"), os.path.dirname(torch.__file__)
    if not os.path.exists(path):
        partial = f"{path}.{os.getpid()}"
        command = [compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"{HERE}/guard.cpp"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-o", partial]
        command += [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
        subprocess.run(command, check=True, timeout=100)
        os.replace(partial, path)
    return path


class Process:
    """A process that runs scenarios, one after the other."""

    def __init__(self):
        environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": library()}
        environment["PYTHONPATH"] = os.pathsep.join([ROOT, HERE])
        command = [sys.executable, os.path.abspath(__file__)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def __call__(self, name: str, **options):
        """What was seen in the scenario `name` of dry_cases.py. The test's time limit bounds the wait."""
        print(json.dumps([name, options]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, f"the dry run ended with status {self.process.wait(10)}"
        answer = json.loads(line)
        assert "failed" not in answer, answer["failed"]
        return answer

    def end(self) -> None:
        kill(self.process)
        self.process.communicate()


if __name__ == "__main__":
    serve()
