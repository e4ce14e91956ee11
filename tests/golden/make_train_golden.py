"""Losses and gradient norms of transformers' model with torch's Adam: what 20 steps of train.py have to repeat.

python tests/golden/make_train_golden.py        writes tests/golden/train.json
"""

import json
import os
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]

import torch  # noqa: E402
from helpers import make_checkpoint  # noqa: E402
from train_cases import IMAGES, TEXT, make_chats  # noqa: E402

from parallel import Slice  # noqa: E402
from runtime.chat import encode_chat  # noqa: E402
from runtime.checkpoint import draw  # noqa: E402
from runtime.config import read_config  # noqa: E402
from runtime.images import grid, image_size, load_image, pixels  # noqa: E402
from runtime.tokenizer import load_tokenizer  # noqa: E402

CASES = {  # name -> (config, options of train.py)
    "text": (TEXT, {}),
    "images": (IMAGES, {"optimizer": "adamw", "weight_decay": 0.1, "warmup_steps": 4}),
    "images, tower frozen": (IMAGES, {"freeze": ["vision_tower"], "weight_decay": 0.05, "betas": [0.8, 0.95]}),
    "images, the recipe's freezing": (IMAGES, {"freeze": ["vision_tower", "projector", "embeddings"]}),
    "images, decoder frozen": (IMAGES, {"freeze": ["language_model"], "max_grad_norm": 0}),
    "text, embeddings frozen": (TEXT, {"freeze": ["embeddings"], "micro_batch_size": 4}),
    "images, LoRA": (IMAGES, {"lora_rank": 3, "lora_alpha": 10.0, "lr": 1e-2}),
}
PREFIXES = {
    "vision_tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "embeddings": ("model.embed_tokens.", "model.language_model.embed_tokens."),
    "language_model": ("model.language_model.", "lm_head."),
}


class LowRank(torch.nn.Module):
    """W -> W + scale · B A, from the same random A as ours and B = 0."""

    def __init__(self, name: str, shape: torch.Size, rank: int, scale: float):
        super().__init__()
        start = draw(name, Slice((rank, shape[1]), 0, 0, rank), 0, (3 * shape[1]) ** -0.5)
        self.A, self.B, self.scale = torch.nn.Parameter(start), torch.nn.Parameter(torch.zeros(shape[0], rank)), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * self.B @ self.A


def add_lora(model: torch.nn.Module, rank: int, alpha: float) -> None:
    """Adapters on the decoder's linears, everything else frozen."""
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        if name.endswith("_proj") and "layers." in name and "vision" not in name:
            ours = name[name.index("layers.") :] + ".adapter.lora_A.weight"
            low_rank = LowRank(ours, linear.weight.shape, rank, alpha / rank)
            torch.nn.utils.parametrize.register_parametrization(linear, "weight", low_rank)


def reference(ckpt: str, data: str, options: dict, steps: int = 20, batch_size: int = 6) -> list:
    """[{"step", "loss", "grad_norm"}] of transformers' model and torch's optimizer, sample after sample."""
    import transformers

    config, tokenizer = read_config(ckpt), load_tokenizer(ckpt)
    kind = "Ministral3ForCausalLM" if config.vision is None else "Mistral3ForConditionalGeneration"
    model = getattr(transformers, kind).from_pretrained(ckpt, dtype=torch.float32, attn_implementation="eager")
    frozen = tuple(options.get("freeze", []))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(name.startswith(PREFIXES[f]) for f in frozen))
    if rank := options.get("lora_rank"):
        add_lora(model, rank, options["lora_alpha"])
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if options.get("optimizer") == "adamw" else torch.optim.Adam
    lr = options.get("lr", 1e-3)
    betas, decay = tuple(options.get("betas", (0.9, 0.999))), options.get("weight_decay", 0.0)
    optimizer = kind(trained, lr=lr, betas=betas, eps=1e-8, weight_decay=decay)
    warmup, low = options.get("warmup_steps", 0), 1e-6
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=low)

    base = os.path.dirname(data)
    with open(data, encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    see = (lambda url: grid(*image_size(url, base), config.vision)) if config.vision else None
    chats = [encode_chat(tokenizer, chat, image_grid=see, training=True) for chat in chats]
    lines = []
    for step in range(steps):
        batch = [chats[i % len(chats)] for i in range(step * batch_size, (step + 1) * batch_size)]
        count, total = sum(sum(chat.targets) for chat in batch), 0.0
        optimizer.zero_grad()
        for chat in batch:
            extra = {}
            if chat.images:
                images = [pixels(load_image(url, base), config.vision) for url in chat.images]
                sizes = torch.tensor([image.shape[1:] for image in images])
                height, width = sizes.amax(0).tolist()
                canvas = torch.zeros(len(images), 3, height, width)
                for i, image in enumerate(images):
                    canvas[i, :, : image.shape[1], : image.shape[2]] = image
                extra = {"pixel_values": canvas, "image_sizes": sizes}
            ids = torch.tensor([chat.ids])
            logits = model(input_ids=ids, **extra).logits[0, :-1]
            labels = ids[0, 1:].masked_fill(~torch.tensor(chat.targets[1:]), -100)
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
            if loss.requires_grad:
                loss.backward()
            total += loss.item()
        clip = options.get("max_grad_norm", 1.0) or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        if step < warmup:
            for group in optimizer.param_groups:
                group["lr"] = lr * (step + 1) / warmup
        elif step == warmup:
            for group in optimizer.param_groups:
                group["lr"] = lr
        optimizer.step()
        if step >= warmup:
            schedule.step()
        lines.append({"step": step + 1, "loss": total, "grad_norm": norm.item()})
    return lines


if __name__ == "__main__":
    golden = {}
    for name, (config, options) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            ckpt = make_checkpoint(folder, config)
            data = make_chats(os.path.join(folder, "data"), images=config.vision is not None)
            golden[name] = reference(ckpt, data, options)
    with open(os.path.join(HERE, "train.json"), "w", encoding="utf-8") as file:
        json.dump(golden, file, indent=0)
