"""Makes images.json and vision.safetensors beside this file, with mistral-common (and OpenCV) and transformers.

images.json: small image files as data: URLs with the grey levels (3, height, width) that mistral-common feeds the
tower, and the token grids of many sizes. vision.safetensors: two tiny models with random weights, a request with
images for each, and what transformers computes for it. Weights and pixels are float16 numbers, to be small; everything
is computed in float32.

Run: python tests/golden/make_vision_golden.py (needs mistral-common[opencv] and transformers)
"""

import base64
import io
import json
import os
import random
import sys

import numpy as np
import torch
from mistral_common.protocol.instruct.chunk import ImageURL, ImageURLChunk
from mistral_common.tokens.tokenizers.image import DATASET_MEAN, DATASET_STD, ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image
from safetensors.torch import save_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, ".."), os.path.join(HERE, "..", "..")]

from helpers import layout_config, text_fields, vision_fields  # noqa: E402


def pictures(rng: np.random.Generator) -> dict[str, tuple[Image.Image, str, dict]]:
    """One picture of every kind: name -> (image, file format, options of `save`)."""

    def noise(mode: str, height: int, width: int) -> Image.Image:
        return Image.frombytes(mode, (width, height), rng.bytes(height * width * Image.getmodebands(mode)))

    palette = noise("RGB", 7, 10).quantize(9)
    frames = [noise("RGB", 6, 9).quantize(16) for _ in range(3)]
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "rgb, scaled up": (noise("RGB", 5, 7), "PNG", {}),
        "rgb, scaled down": (noise("RGB", 31, 43), "PNG", {}),
        "rgb, as it is": (noise("RGB", 8, 12), "PNG", {}),
        "one pixel": (noise("RGB", 1, 1), "PNG", {}),
        "a line": (noise("RGB", 1, 90), "PNG", {}),
        "a column": (noise("RGB", 90, 1), "PNG", {}),
        "rgba": (noise("RGBA", 9, 6), "PNG", {}),
        "grey": (noise("L", 6, 11), "PNG", {}),
        "grey and alpha": (noise("LA", 6, 11), "PNG", {}),
        "one bit": (noise("L", 9, 9).convert("1"), "PNG", {}),
        "palette": (palette, "PNG", {}),
        "palette, transparent": (palette, "PNG", {"transparency": 3}),
        "palette, alpha for each": (palette, "PNG", {"transparency": bytes([0, 40, 80, 120, 160, 200, 240, 255, 9])}),
        "grey, transparent": (noise("L", 6, 5), "PNG", {"transparency": 100}),
        "cmyk": (noise("CMYK", 7, 5), "TIFF", {}),
        "animation": (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        "exif says turned": (noise("RGB", 4, 13), "PNG", {"exif": turned}),
    }


def data_url(image: Image.Image, kind: str, options: dict) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def make_images() -> None:
    rng, ids, cases = np.random.default_rng(3), SpecialImageIDs(img=1, img_break=2, img_end=3), []
    for i, (name, picture) in enumerate(pictures(rng).items()):
        patch, merge, longest = [(4, 1, 22), (2, 2, 21)][i % 2]
        url = data_url(*picture)
        encoder = ImageEncoder(ImageConfig(patch, longest, merge), ids)
        encoding = encoder(ImageURLChunk(image_url=ImageURL(url=url)))
        mean, std = (np.asarray(x)[:, None, None] for x in (DATASET_MEAN, DATASET_STD))
        levels = (encoding.image * std + mean) * 255
        sizes = dict(patch_size=patch, spatial_merge_size=merge, image_size=longest)
        pixels = [[[round(float(x), 2) for x in row] for row in channel] for channel in levels]
        cases.append(dict(name=name, url=url, sizes=sizes, tokens=encoding.tokens, levels=pixels))
    grids, draw = [], random.Random(3)
    for _ in range(150):
        patch, merge, longest = draw.choice([(14, 2, 1540), (14, 1, 1540), (16, 1, 1024), (14, 2, 1541), (3, 3, 100)])
        size = [
            draw.choice([1, draw.randint(1, 60), draw.randint(1, 4000), longest + draw.randint(-2, 2)]) for _ in "wh"
        ]
        encoder = ImageEncoder(ImageConfig(patch, longest, merge), ids)
        columns, rows = encoder._image_to_num_tokens(Image.new("1", size))
        grids.append([*size, patch, merge, longest, rows, columns])
    with open(os.path.join(HERE, "images.json"), "w") as file:
        json.dump(dict(images=cases, grids=grids), file, separators=(",", ":"))


def tiny(head_dim: int, heads: int, merge: int, act: str) -> dict:
    tower = vision_fields(
        theta=700.0, hidden_size=head_dim * heads, intermediate_size=19, num_hidden_layers=2,
        num_attention_heads=heads, patch_size=3, image_size=40, hidden_act=act,
    )  # fmt: skip
    rope = dict(rope_type="default", rope_theta=900.0, original_max_position_embeddings=512, llama_4_scaling_beta=0.0)
    fields = text_fields(
        vocab_size=23, hidden_size=18, intermediate_size=21, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, rms_norm_eps=1e-3, max_position_embeddings=512, rope_parameters=rope,
        vision_config=tower,
    )  # fmt: skip
    return layout_config(fields, "new")[1] | dict(spatial_merge_size=merge, image_token_index=5)


def make_vision() -> None:
    torch.manual_seed(7)
    tensors, configs = {}, []
    for case, raw in enumerate([tiny(12, 2, 2, "silu"), tiny(20, 1, 1, "gelu")]):
        configs.append(raw)
        model = Mistral3ForConditionalGeneration(Mistral3Config.from_dict(raw)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 1.0 + 0.3 * torch.randn(parameter.shape) if parameter.dim() == 1 else None
                value = spread if spread is not None else torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
                parameter.copy_(value.half())
                tensors[f"{case}.weights.{name}"] = parameter.detach().half()
        cell, token = 3 * raw["spatial_merge_size"], raw["image_token_index"]
        grids = [(3, 2), (1, 4), (2, 2)]
        tokens = [1, 7]
        largest = [cell * max(g[i] for g in grids) for i in (0, 1)]
        padded = torch.zeros(len(grids), 3, *largest)
        for i, (rows, columns) in enumerate(grids):
            image = torch.randn(3, rows * cell, columns * cell).half()
            tensors[f"{case}.image.{i}"] = image
            padded[i, :, : image.shape[1], : image.shape[2]] = image.float()
            tokens += ([token] * columns + [8]) * rows + [9 + i]
        sizes = torch.tensor([[r * cell, c * cell] for r, c in grids])
        ids = torch.tensor([tokens])
        with torch.no_grad():
            features = torch.cat(model.get_image_features(padded, sizes).pooler_output)
            logits = model(input_ids=ids, pixel_values=padded, image_sizes=sizes).logits[0]
        tensors[f"{case}.tokens"] = ids[0]
        tensors[f"{case}.features"] = features
        tensors[f"{case}.logprobs"] = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].contiguous()
    save_file(tensors, os.path.join(HERE, "vision.safetensors"), {"configs": json.dumps(configs)})


if __name__ == "__main__":
    make_images()
    make_vision()
