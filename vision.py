"""Vision: from pixels to the features that stand at an image's `[IMG]` tokens.

1. **Pixels** come from `runtime/images.py`: an image resized to whole cells of 28 × 28 pixels (2 × 2 patches
   of 14); a cell will be one token.
2. **The tower** (Pixtral, arXiv:2410.07073) is a transformer over the patches of all images, laid end to end. A patch
   attends to every patch of its own image and to none of another. Its position is (row, column): half of a head's
   frequencies turn with the row, half with the column.
3. **The projector** merges the patches of a cell into one vector of the decoder's width.
4. In `MistralMedium.embed` the features replace the embeddings of the `[IMG]` tokens; the tokens between,
   `[IMG_BREAK]` after a row and `[IMG_END]` after the last, are ordinary ones.

An image has at most (1540 / 14)² = 12,100 patches, so attention is the part to be careful with: it runs image by image
through the fused kernel, and no mask is ever built. Images go through the tower a few at a time. The decoder knows
nothing of this file: it is handed a `VisionEncoder`, and a question without an image never comes here.

Shapes, with this model's sizes: N patches of this call, H heads of this rank (16), D head_dim (104), C the tower's
hidden_size (1,664).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Config, MistralMedium, RMSNorm, VisionConfig, rotary_tables, rotate, run_layer
from parallel import ColumnParallelLinear, Part, Place, RowParallelLinear, Slice, copy_to_group, divide

PATCHES_AT_ONCE = 1 << 14  # images share a pass through the tower up to this many patches; bounds its activations

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


class PatchConv(nn.Module):
    """The strided convolution that embeds patches. They do not overlap, so it is one linear applied to each of them."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        shape = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
        self.parts = [Part(Slice(shape, 0, 0, shape[0]))]
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(3, height, width) -> (patches, C), row by row."""
        _, channels, p, _ = self.weight.shape
        _, height, width = image.shape
        x = image.view(channels, height // p, p, width // p, p).permute(1, 3, 0, 2, 4)  # (rows, columns, 3, p, p)
        return F.linear(x.reshape(-1, channels * p * p), self.weight.flatten(1))


def rotary_2d(grids: list[tuple[int, int]], head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """The angle of every pair of dimensions, for the patches of images of (rows, columns) patches: (N, D/2), float32.

    Of the frequencies θ^(-2i/D) the even-numbered turn with the row and the odd-numbered with the column; where D/2
    is odd, the rows have one more.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = []
    for rows, columns in grids:
        row, column = (torch.arange(n, dtype=torch.float32, device=device) for n in (rows, columns))
        by_row = (row[:, None] * frequencies[0::2])[:, None].expand(-1, columns, -1)
        by_column = (column[:, None] * frequencies[1::2])[None].expand(rows, -1, -1)
        angles.append(torch.cat((by_row, by_column), dim=-1).flatten(0, 1))
    return torch.cat(angles)


class VisionAttention(nn.Module):
    """Full attention inside each image. A rank holds H = heads / tp whole heads."""

    def __init__(self, vision: VisionConfig, place: Place, dtype: torch.dtype):
        super().__init__()
        divide(vision.num_attention_heads, place.tp_size, "attention heads of the vision tower")
        C = vision.hidden_size
        self.heads, self.group = vision.num_attention_heads // place.tp_size, place.tp_group
        self.qkv_proj = ColumnParallelLinear(C, {"q_proj": C, "k_proj": C, "v_proj": C}, place, dtype)
        self.o_proj = RowParallelLinear(C, C, place, dtype)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of an image's patches to each other, (1, H, n, D) each; `runtime/cpu.py` has a faster one for CPUs."""
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """x (1, N, C), cos and sin (N, D), lengths: the patches of each image -> (1, N, C)."""
        x = copy_to_group(x, self.group)
        heads = rotate(self.qkv_proj(x), 2 * self.heads, cos, sin)  # (1, 3 H, N, D), queries and keys turned
        images = [image.chunk(3, dim=1) for image in heads.split(lengths, dim=2)]
        out = torch.cat([self.attention(q, k, v) for q, k, v in images], dim=2)  # (1, H, N, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    def __init__(self, vision: VisionConfig, place: Place, dtype: torch.dtype):
        super().__init__()
        act = ACTIVATIONS[vision.hidden_act]
        self.attention_norm = RMSNorm(vision.hidden_size, 1e-5, dtype)
        self.attention = VisionAttention(vision, place, dtype)
        self.ffn_norm = RMSNorm(vision.hidden_size, 1e-5, dtype)
        self.feed_forward = MLP(vision.hidden_size, vision.intermediate_size, place, dtype, act=act)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, lengths)
        return x + self.feed_forward(self.ffn_norm(x))


class VisionTower(nn.Module):
    """The Pixtral tower: patches, a norm, `num_hidden_layers` layers. Names are those of the HF layout."""

    def __init__(self, vision: VisionConfig, place: Place, dtype: torch.dtype):
        super().__init__()
        self.vision = vision
        self.activation_checkpointing = False
        self.patch_conv = PatchConv(vision, dtype)
        self.ln_pre = RMSNorm(vision.hidden_size, 1e-5, dtype)
        layers = [VisionLayer(vision, place, dtype) for _ in range(vision.num_hidden_layers)]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Images (3, height, width), each in whole patches and in the run dtype -> (1, N, C), one after the other."""
        p = self.vision.patch_size
        grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
        x = self.ln_pre(torch.cat([self.patch_conv(image) for image in images])[None])
        angles = rotary_2d(grids, self.vision.head_dim, self.vision.rope_theta, x.device)
        cos, sin = rotary_tables(angles, 1.0, x.dtype)
        lengths = [rows * columns for rows, columns in grids]
        for layer in self.transformer["layers"]:
            x = run_layer(layer, self.activation_checkpointing, x, cos, sin, lengths)
        return x


class PatchMerger(nn.Module):
    """One linear over the patches of a cell: (rows · columns, C) -> (rows · columns / merge², C)."""

    def __init__(self, vision: VisionConfig, place: Place, dtype: torch.dtype):
        super().__init__()
        self.merge, self.group = vision.spatial_merge_size, place.tp_group
        self.merging_layer = RowParallelLinear(vision.hidden_size * self.merge**2, vision.hidden_size, place, dtype)

    def forward(self, x: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        m, cells = self.merge, []
        for image, (rows, columns) in zip(x.split([r * c for r, c in grids]), grids):
            # Within a cell channel-major (channel, row, column), the order that the checkpoint's `unfold` gave.
            cell = image.view(rows // m, m, columns // m, m, -1).permute(0, 2, 4, 1, 3)
            cells.append(cell.reshape(rows * columns // m**2, -1))
        part = self.merging_layer.parts[0].slice  # row-parallel: each rank takes its columns of the whole input
        return self.merging_layer(copy_to_group(torch.cat(cells), self.group)[:, part.start : part.stop])


class Projector(nn.Module):
    """From the tower's width to the decoder's: norm, merge the patches of a cell, linear, exact (erf) GELU, linear."""

    def __init__(self, config: Config, place: Place, dtype: torch.dtype):
        super().__init__()
        C, hidden_size = config.vision.hidden_size, config.hidden_size
        divide(hidden_size, place.tp_size, "dimensions of hidden_size")
        self.group = place.tp_group
        self.norm = RMSNorm(C, config.rms_norm_eps, dtype)
        self.patch_merger = PatchMerger(config.vision, place, dtype)
        self.linear_1 = ColumnParallelLinear(C, hidden_size, place, dtype)
        self.linear_2 = RowParallelLinear(hidden_size, hidden_size, place, dtype)

    def forward(self, x: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """x (N, C), grids: (rows, columns) of each image in patches -> (N / merge², hidden_size)."""
        x = self.patch_merger(self.norm(x), grids)
        return self.linear_2(F.gelu(self.linear_1(copy_to_group(x, self.group))))


def groups_of(images: Iterable[torch.Tensor], patch_size: int) -> Iterator[list[torch.Tensor]]:
    """Runs of images with at most PATCHES_AT_ONCE patches together; a larger image goes alone."""
    group, patches = [], 0
    for image in images:
        count = image.shape[1] * image.shape[2] // patch_size**2
        if group and patches + count > PATCHES_AT_ONCE:
            yield group
            group, patches = [], 0
        group.append(image)
        patches += count
    if group:
        yield group


# ------------------------------------------------------------------------------------- what the model is handed


class VisionEncoder(nn.Module):
    """Tower and projector: what turns images into the features that stand at `[IMG]` tokens."""

    def __init__(self, config: Config, place: Place, dtype: torch.dtype):
        super().__init__()
        place = replace(place, sequence_parallel=False)  # its sequences are patches, of images of any size
        self.vision_tower = VisionTower(config.vision, place, dtype)
        self.multi_modal_projector = Projector(config, place, dtype)
        self.device, self.dtype, self.patch_size = place.device, dtype, config.vision.patch_size

    def forward(self, images: Iterable[torch.Tensor]) -> torch.Tensor:
        """One or more images (3, height, width) in whole cells -> (tokens, C), image after image, row by row.

        Given an iterator, no more images are held than go through the tower together. With gradients the activations
        of all are kept.
        """
        features, p = [], self.patch_size
        for group in groups_of(images, p):
            group = [image.to(self.device, self.dtype) for image in group]
            grids = [(image.shape[1] // p, image.shape[2] // p) for image in group]
            features.append(self.multi_modal_projector(self.vision_tower(group)[0], grids))
        return torch.cat(features)


def build_model(config: Config, place: Place = Place(), dtype=torch.bfloat16, keep_fp8: bool = False) -> MistralMedium:
    """One rank's part of the model, on `meta`, with the vision encoder where the config has one: on the first stage."""
    sees = config.vision is not None and place.first_stage
    return MistralMedium(config, place, dtype, keep_fp8, VisionEncoder(config, place, dtype) if sees else None)
