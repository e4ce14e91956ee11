"""An image file -> pixels: opened, flattened, resized and normalized as mistral-common does."""

import base64
import contextlib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from model import VisionConfig
from runtime.files import UserError, read_file, reading, require

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in CLIP's training images (arXiv:2103.00020)

STD = (0.26862954, 0.26130258, 0.27577711)


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
        payload = re.sub(r"^[^,]*;base64,|\s", "", url, flags=re.IGNORECASE)
        try:
            source = io.BytesIO(base64.b64decode(payload, validate=True))
        except ValueError as error:
            raise UserError(f"image {name!r}: should read data:image/…;base64,… and valid base64 ({error})") from None
    else:
        remote = re.match(r"[a-z][a-z0-9+.-]*://|(https?|ftp|file|blob):", url, re.IGNORECASE)
        require(not remote, f"image {url!r}: nothing is fetched from the network; give a path or a base64 data: URL")
        name = source = os.path.join(base, url)
        read_file(source)  # refuses a pipe or a device, which could block for ever
    # A broken file can make Pillow's decoders raise anything.
    with reading(f"image {name!r}", "image; it may be cut off or damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(source) as image:
                # Pillow would hand PostScript to Ghostscript, which runs the file as a program.
                require(image.format != "EPS", "PostScript is not supported; convert it to PNG")
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UserError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
        except UnidentifiedImageError:
            raise UserError("not an image in a format that Pillow reads") from None


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
