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


ORIENTATION = 0x0112  # EXIF's tag: how a camera was held
# Its values from 2 on, as what makes the picture upright. From 5 on width and height change places.
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
UPRIGHT |= {7: "TRANSVERSE", 8: "ROTATE_90"}


def image_size(url: str, base: str = "") -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header alone. Arguments and errors as `load_image`."""
    with _opened(url, base) as image:
        return image.size[::-1] if orientation(image) >= 5 else image.size


def orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where EXIF does not say, or cannot be read. Pillow turns TIFFs by itself."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # of a damaged block anything
        return 1
    return value if value in UPRIGHT else 1


def image_name(url: str, base: str = "") -> str:
    """A name that images with other content do not have: its hash. Arguments and errors as `load_image`."""
    if url[:5].lower() == "data:":
        return hashlib.sha256(url.encode()).hexdigest()
    return hashlib.sha256(read_file(os.path.join(base, url), 1 << 40)).hexdigest()


def load_image(url: str, base: str = "") -> Image.Image:
    """The image at `url`, a path (relative to the folder `base`) or a base64 `data:` URL, in mode RGB.

    As mistral-common: transparent becomes white, the first frame stands for an animation. Unlike it, a picture is
    turned upright as EXIF says, and 16-bit grey is scaled to 8 bits, where Pillow's conversion would clip it to white.
    Raises UserError for anything that is not a whole image, and for all other URLs: nothing is ever fetched.
    """
    with _opened(url, base) as image:
        turned = UPRIGHT.get(orientation(image))
        if turned:
            image = image.transpose(Image.Transpose[turned])
        if image.mode in ("I", "F"):
            raise UserError("has 32-bit numbers, and nobody can know which of them is white; convert it to 8 bits")
        if image.mode.startswith("I;16"):
            grey = np.asarray(image) / 257
            return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
        if image.mode == "RGB" and "transparency" not in image.info:  # a colour that stands for none
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
        name = os.path.join(base, url)
        read_file(name)  # refuses a pipe or a device, which could block for ever
        source = open(name, "rb")  # not by name: Pillow maps such a TIFF into memory, and then does not turn it
    # A broken file can make Pillow's decoders raise anything.
    with reading(f"image {name!r}", "image; it may be cut off or damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with source, Image.open(source) as image:
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
