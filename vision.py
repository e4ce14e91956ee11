"""The model's eyes: from an image file to the embeddings that stand at its `[IMG]` tokens.

1. **Pixels.** An image is resized to a whole number of cells of 28 × 28 pixels (2 × 2 patches of 14); a cell will be
   one token. The arithmetic is that of mistral-common, which calls OpenCV; here torch does it.
2. **The tower** (Pixtral, arXiv:2410.07073) is a transformer over the patches of all images, laid end to end. A patch
   sees every patch of its own image and none of another. Its position is (row, column): half of a head's frequencies
   turn with the row, half with the column.
3. **The projector** merges the patches of a cell into one vector of the decoder's width.
4. In `MistralMedium.embed` the features replace the embeddings of the `[IMG]` tokens; the tokens between,
   `[IMG_BREAK]` after a row and `[IMG_END]` after the last, are ordinary ones.

An image has at most (1540 / 14)² = 12,100 patches, so attention is the part to be careful with: it runs image by image
through the fused kernel, and no mask is ever built. Images go through the tower a few at a time.

Shapes: N patches of this call, H heads of this rank, D head_dim, C the tower's hidden_size.
"""

import base64
import contextlib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import Config, UserError, VisionConfig, read_file, reading
from parallel import ColumnParallelLinear, Joined, Place, RowParallelLinear, Slice, copy_to_group, divide

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in CLIP's training images (arXiv:2103.00020)


STD = (0.26862954, 0.26130258, 0.27577711)


FEW_ROWS = 512  # see RMSNorm
PATCHES_AT_ONCE = 1 << 14  # images share a pass through the tower up to this many patches; bounds its activations

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


# ------------------------------------------------------------------------------------------------- image files


def image_size(url: str, base: str = "") -> tuple[int, int]:
    """(width, height) in pixels, from the header alone. Arguments and errors as `load_image`."""
    with _opened(url, base) as image:
        return image.size


def image_name(url: str, base: str = "") -> str:
    """A name that images with other content do not have: its hash. Arguments and errors as `load_image`."""
    if url[:5].lower() == "data:":
        return hashlib.sha256(url.encode()).hexdigest()
    return hashlib.sha256(read_file(os.path.join(base, url), 1 << 40)).hexdigest()


def load_image(url: str, base: str = "") -> Image.Image:
    """The image at `url`, a path (relative to the folder `base`) or a base64 `data:` URL, in mode RGB.

    As mistral-common: transparent becomes white, the first frame stands for an animation, the orientation in EXIF is
    ignored. Unlike it, 16-bit grey is scaled to 8 bits, where Pillow's conversion would clip it to white.
    Raises UserError for anything that is not a whole image, and for all other URLs: nothing is ever fetched.
    """
    with _opened(url, base) as image:
        if image.mode.startswith("I"):  # 16-bit grey; older Pillows call it "I"
            grey = np.asarray(image).clip(0, 65535) / 257
            return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
        if image.mode == "RGB":
            return image.copy()
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "WHITE")
        white.paste(image, (0, 0), image)
        return white.convert("RGB")


@contextlib.contextmanager
def _opened(url: str, base: str) -> Iterator[Image.Image]:
    """Open `url`, and turn whatever goes wrong with it, then or while it is used, into a UserError."""
    if url[:5].lower() == "data:":
        name = url if len(url) <= 48 else url[:48] + "…"
        header, _, payload = url.partition(",")
        if not header.lower().endswith(";base64"):
            raise UserError(f"image {name!r}: a data: URL must read data:image/…;base64,…")
        try:
            source = io.BytesIO(base64.b64decode("".join(payload.split()), validate=True))
        except ValueError as error:
            raise UserError(f"image {name!r}: the data: URL is not valid base64 ({error})") from None
    else:
        if re.match(r"[a-z][a-z0-9+.-]*://|(https?|ftp|file|blob):", url, re.IGNORECASE):
            raise UserError(f"image {url!r}: nothing is fetched from the network; give a path or a base64 data: URL")
        name = source = os.path.join(base, url)
        read_file(source)  # refuses a pipe or a device, which could block for ever
    # A broken file can make Pillow's decoders raise anything.
    with reading(f"image {name!r}", "image; it may be cut off or damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(source) as image:
                if image.format == "EPS":  # Pillow would hand it to Ghostscript, which runs the file as a program
                    raise UserError("PostScript is not supported; convert it to PNG")
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UserError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
        except UnidentifiedImageError:
            raise UserError("not an image in a format that Pillow reads") from None


# ------------------------------------------------------------------------------------------------------ pixels


def grid(width: int, height: int, vision: VisionConfig) -> tuple[int, int]:
    """(rows, columns) of `[IMG]` tokens for an image of so many pixels: mistral-common's `ImageEncoder`."""
    ratio = max(height / vision.image_size, width / vision.image_size)
    if ratio > 1:
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    cell = vision.patch_size * vision.spatial_merge_size
    return (height - 1) // cell + 1, (width - 1) // cell + 1


def grid_of(url: str, base: str, vision: VisionConfig) -> tuple[int, int]:
    """`grid` of an image file, of which just the header is read. Arguments and errors as `load_image`."""
    return grid(*image_size(url, base), vision)


def pixels(image: Image.Image, vision: VisionConfig) -> torch.Tensor:
    """An RGB image -> (3, rows · cell, columns · cell) float32, where cell = patch · merge: resized and normalized.

    Bicubic without antialiasing (a = -0.75), as OpenCV's INTER_CUBIC. Pillow's antialiases and differs by whole grey
    levels. In float64, because float32 misplaces the samples of a side of thousands of pixels by up to 0.1 grey
    levels; channel by channel, because a photo of 4000 × 4000 is already 128 MB that way.
    """
    cell = vision.patch_size * vision.spatial_merge_size
    rows, columns = grid(*image.size, vision)
    out = torch.empty(3, rows * cell, columns * cell)
    for i, channel in enumerate(image.split()):
        x = torch.from_numpy(np.array(channel)).double()[None, None]
        x = F.interpolate(x, out.shape[1:], mode="bicubic", align_corners=False)
        out[i] = (x[0, 0] / 255 - MEAN[i]) / STD[i]
    return out


# --------------------------------------------------------------------------------- what decoder and tower share


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv:1910.07467), computed in float32.

    On a CPU the normalized x is rounded before it is scaled, as transformers does; the GPU's fused kernel rounds once.
    A CPU has no such kernel, but one for layer norms, which subtract the mean and divide by the deviation: of (x, -x)
    these are 0 and rms(x). For few rows it is faster than the eight kernels that `rms_norm` starts.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.slices = {"weight": Slice((size,), 0, 0, size)}
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            size = x.shape[-1]
            if x.numel() <= FEW_ROWS * size:
                return self.weight * F.layer_norm(torch.cat((x, -x), -1), (2 * size,), eps=self.eps)[..., :size]
            return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(act(gate(x)) · up(x)). The decoder's `act` is SiLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, place: Place, dtype, keep_fp8=False, act=F.silu):
        super().__init__()
        divide(intermediate_size, place.tp_size, "rows of intermediate_size")
        self.act, self.group, self.sequence = act, place.tp_group, place.sequence_parallel
        self.gate_proj = ColumnParallelLinear(hidden_size, intermediate_size, place, dtype, keep_fp8)
        self.up_proj = ColumnParallelLinear(hidden_size, intermediate_size, place, dtype, keep_fp8)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, place, dtype, keep_fp8)
        self.joined: Joined | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = copy_to_group(x, self.group, self.sequence)
        gate, up = self.joined(x).chunk(2, dim=-1) if self.joined else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act(gate) * up)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None):
    """Turn the pairs (i, i + D/2) of `x` (..., T, D) by the angles of `cos`, `sin` from `rotary_tables`.

    The first of a pair becomes a cos - b sin, the second b cos + a sin: every number times its cosine, plus the other
    one of its pair times its sine, whose sign the table has. `out` may be `x`.
    """
    other = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(torch.mul(x, cos, out=out), other, sin, out=out)


def rotary_tables(angles: torch.Tensor, factor: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles (..., D/2) in radians, float32 -> cosines and signed sines (..., D) for `apply_rotary`, times `factor`."""
    cos, sin = ((f(angles) * factor).to(dtype) for f in (torch.cos, torch.sin))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def run_layer(layer: nn.Module, recompute: bool, *inputs):
    """`layer(*inputs)`. With `recompute` only the inputs are kept, and the backward pass computes the rest once more.

    Activation checkpointing (arXiv:1604.06174). No layer draws random numbers, so no generator's state is kept.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


# --------------------------------------------------------------------------------------------------- the tower


class PatchConv(nn.Module):
    """The strided convolution that embeds patches. They do not overlap, so it is one linear applied to each of them."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        shape = (vision.hidden_size, vision.num_channels, vision.patch_size, vision.patch_size)
        self.slices = {"weight": Slice(shape, 0, 0, shape[0])}
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
        self.head_dim, self.group = vision.head_dim, place.tp_group
        C = vision.hidden_size
        self.q_proj = ColumnParallelLinear(C, C, place, dtype)
        self.k_proj = ColumnParallelLinear(C, C, place, dtype)
        self.v_proj = ColumnParallelLinear(C, C, place, dtype)
        self.o_proj = RowParallelLinear(C, C, place, dtype)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """x (N, C), cos and sin (N, D), lengths: the patches of each image -> (N, C)."""
        x = copy_to_group(x, self.group)
        q, k, v = (
            f(x).view(len(x), -1, self.head_dim).transpose(0, 1) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        # The fused kernels take four dimensions only (with three, a matrix of N × N scores is built): hence [None].
        images = zip(*(t[None].split(lengths, dim=2) for t in (q, k, v)))
        out = torch.cat([F.scaled_dot_product_attention(*qkv)[0] for qkv in images], dim=1)  # (H, N, D)
        return self.o_proj(out.transpose(0, 1).flatten(1))


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
        """Images (3, height, width), each in whole patches and in the run dtype -> (N, C), one after the other."""
        p = self.vision.patch_size
        grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
        x = self.ln_pre(torch.cat([self.patch_conv(image) for image in images]))
        angles = rotary_2d(grids, self.vision.head_dim, self.vision.rope_theta, x.device)
        cos, sin = rotary_tables(angles, 1.0, x.dtype)
        lengths = [rows * columns for rows, columns in grids]
        for layer in self.transformer["layers"]:
            x = run_layer(layer, self.activation_checkpointing, x, cos, sin, lengths)
        return x


# ----------------------------------------------------------------------------------------------- the projector


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
        part = self.merging_layer.slices["weight"]  # row-parallel: each rank takes its columns of the whole input
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
