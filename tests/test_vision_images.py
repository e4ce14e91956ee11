"""Image files to pixels: equal to mistral-common's (stored, and live where it is installed), and every bad input."""

import base64
import io
import json
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import layout_config, text_fields, vision_fields
from PIL import Image
from processes import run

from model import VisionConfig
from runtime.config import parse_config
from runtime.files import UserError
from runtime.images import MEAN, STD, grid, image_size, load_image, pixels

GOLDEN = os.path.join(os.path.dirname(__file__), "golden", "images.json")


def sizes(patch_size=14, spatial_merge_size=2, image_size=1540) -> VisionConfig:
    tower = vision_fields(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=patch_size,
        image_size=image_size,
    )  # fmt: skip
    raw = layout_config(text_fields(vision_config=tower), "new")[1] | dict(spatial_merge_size=spatial_merge_size)
    return parse_config(raw).vision


def grey_levels(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def data_url(image: Image.Image, kind: str = "PNG", **options) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def golden() -> dict:
    with open(GOLDEN) as file:
        return json.load(file)


# ------------------------------------------------------------------------------------------------------ parity


# All but one: mistral-common does not turn a picture upright.
CASES = [case for case in golden()["images"] if case["name"] != "exif says turned"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_pixels_and_tokens_equal_mistral_common(case):
    config = sizes(**case["sizes"])
    image = load_image(case["url"])
    assert image.mode == "RGB" and image.size == image_size(case["url"])
    rows, columns = grid(*image.size, config)
    tokens = ([1] * columns + [2]) * rows
    assert [*tokens[:-1], 3] == case["tokens"]
    x = pixels(image, config)
    assert x.dtype == torch.float32
    torch.testing.assert_close(grey_levels(x), torch.tensor(case["levels"]), atol=0.02, rtol=0)


def test_grids_equal_mistral_common():
    for width, height, patch, merge, longest, rows, columns in golden()["grids"]:
        assert grid(width, height, sizes(patch, merge, longest)) == (rows, columns), (width, height)


def test_pixels_equal_mistral_common_live():
    """100 fresh sizes from 1 × 1 to 4000 × 1, noise, which is the hardest to resize. Within 0.1 of 255."""
    pytest.importorskip("cv2")
    common = pytest.importorskip("mistral_common.tokens.tokenizers.image")
    seed = random.randrange(1 << 30)
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    cases = [(1, 1), (4000, 1), (1, 4000), (1540, 1540), (1541, 3), (2, 1539), (4000, 3999), (28, 28)]
    while len(cases) < 100:
        longest = draw.choice([3, 40, 300, 4000])
        cases.append((draw.randint(1, longest), draw.randint(1, draw.choice([2, 40, 300]))))
    encoder = common.ImageEncoder(common.ImageConfig(14, 1540, 2), common.SpecialImageIDs(1, 2, 3))
    for width, height in cases:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        columns, rows = encoder._image_to_num_tokens(image)
        assert grid(width, height, sizes()) == (rows, columns), (seed, width, height)
        expected = torch.from_numpy(common.transform_image(image, (columns * 28, rows * 28)).copy())
        difference = (grey_levels(pixels(image, sizes())) - grey_levels(expected)).abs().max()
        assert difference < 0.1, (seed, width, height)


def bicubic(samples: np.ndarray, size: int) -> np.ndarray:
    """OpenCV's INTER_CUBIC in one dimension, float64: Keys' kernel with a = -0.75, the edges repeated."""
    a, out = -0.75, []
    for i in range(size):
        x = (i + 0.5) * len(samples) / size - 0.5
        total = 0.0
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - k)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            total += (near if d <= 1 else far) * samples[min(max(k, 0), len(samples) - 1)]
        out.append(total)
    return np.array(out)


@pytest.mark.parametrize("length", [1, 2, 47, 1539, 4001])
def test_resizing_is_the_bicubic_formula_even_where_sides_are_long(length):
    """In float32 the longest of these lines would be off by 0.1 grey levels."""
    line = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    image = Image.fromarray(np.repeat(line[None, :, None], 3, axis=2))
    columns = grid(length, 1, sizes())[1]
    expected = torch.tensor(np.array(bicubic(line.astype(np.float64), columns * 28)), dtype=torch.float32)
    across, down = pixels(image, sizes()), pixels(image.transpose(Image.Transpose.TRANSPOSE), sizes())
    torch.testing.assert_close(grey_levels(across), expected.expand(3, 28, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(down, across.transpose(1, 2), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- file formats


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    levels = np.array([[0, 128, 129, 30000, 65535]], dtype=np.uint16)
    image = load_image(data_url(Image.fromarray(levels), kind))
    assert np.asarray(image)[0].tolist() == [[x] * 3 for x in (0, 0, 1, 117, 255)]  # round(level / 257)


def test_transparent_becomes_white():
    url = data_url(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert load_image(url).getpixel((1, 1)) == (255, 255, 255)
    half = load_image(data_url(Image.new("RGBA", (2, 2), (200, 0, 100, 51))))
    assert half.getpixel((0, 0)) == (244, 204, 224)  # 255 - (255 - x) / 5


def test_jpeg_and_webp_load():
    image = Image.new("RGB", (37, 20), (10, 200, 90))
    for kind in ("JPEG", "WEBP"):
        loaded = load_image(data_url(image, kind))
        assert loaded.size == (37, 20) and max(abs(a - b) for a, b in zip(loaded.getpixel((5, 5)), (10, 200, 90))) < 4


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    url = data_url(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(url).getpixel((0, 0)) == (255, 0, 0)


def test_paths_are_relative_to_the_base(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (3, 2), "blue").save(tmp_path / "in" / "a:1.png")
    assert image_size("in/a:1.png", str(tmp_path)) == (3, 2)
    assert load_image("a:1.png", str(tmp_path / "in")).getpixel((2, 1)) == (0, 0, 255)
    assert image_size(str(tmp_path / "in" / "a:1.png"), "elsewhere") == (3, 2)


# ---------------------------------------------------------------------------------------------------- bad input


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def encoded(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def truncated(kind: str, length: int | None = None) -> str:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return encoded(file.getvalue()[: length or len(file.getvalue()) // 2])


BAD = {
    "http": ("http://example.com/a.png", "nothing is fetched"),
    "https": ("HTTPS://example.com/a.png", "nothing is fetched"),
    "file": ("file:///etc/hostname", "nothing is fetched"),
    "bucket": ("s3://bucket/a.png", "nothing is fetched"),
    "missing": ("no/such.png", "no such file"),
    "empty path": ("", "is a folder"),
    "folder": (".", "is a folder"),
    "device": ("/dev/zero", "a pipe or a device"),
    "zero byte": ("a\0b.png", "no such file"),
    "text": ("text.png", "not an image"),
    "empty file": ("empty.png", "not an image"),
    "zero size png": (encoded(png(0, 5)), "not an image"),
    "zero size ppm": (encoded(b"P6 0 4 255\n"), "image"),
    "truncated png": (truncated("PNG"), "cut off"),
    "truncated jpeg": (truncated("JPEG"), "cut off"),
    "truncated gif": (truncated("GIF"), "cut off"),
    "truncated bmp": (truncated("BMP"), "cut off"),
    "truncated tiff": (truncated("TIFF"), "image"),
    "truncated in the header": (truncated("TIFF", 100), "not an image"),  # of which Pillow warns twice
    "truncated webp": (truncated("WEBP"), "image"),
    "header promises more": (encoded(png(300, 300)), "cut off"),
    "bomb, warning": (encoded(png(10_000, 10_000)), "more than 89478485 pixels"),
    "bomb, error": (encoded(png(60_000, 60_000)), "more than 89478485 pixels"),
    "postscript": (encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"), "PostScript"),
    "no base64": ("data:image/svg+xml,<svg/>", ";base64,"),
    "no comma": ("data:image/png;base64", ";base64,"),
    "bad alphabet": ("data:image/png;base64,%%%%", "and valid base64"),
    "bad padding": ("data:image/png;base64,aGVsbG8", "and valid base64"),
    "no payload": ("data:image/png;base64,", "not an image"),
    "line break": ("no\nsuch.png", "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, recwarn):
    (tmp_path / "text.png").write_text("this is not an image\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    url, words = BAD[name]
    base = "" if url.startswith("/") else str(tmp_path)
    with pytest.raises(UserError) as error:
        load_image(url, base)
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 400
    shown = url[:20] if url[:5] == "data:" else repr(url)[1:-1]
    assert shown in message
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert not recwarn.list


def test_sizes_of_bad_images_are_errors_too():
    for name in ("http", "missing", "text", "bomb, warning", "bomb, error", "bad padding", "zero size png"):
        with pytest.raises(UserError):
            image_size(BAD[name][0])


# -------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
sys.path.append("tests")
import torch
from runtime.config import parse_config
from helpers import layout_config, text_fields, vision_fields
from vision import build_model
from runtime.images import load_image, pixels

torch.set_num_threads(2)
path, count = sys.argv[1], int(sys.argv[2])
tower = vision_fields(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=1540
)
fields = text_fields("plain", vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
config = parse_config(layout_config(fields | {"vision_config": tower}, "new")[1])
model = build_model(config, dtype=torch.float32).to_empty(device="cpu")
with torch.no_grad():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features = model.vision(pixels(load_image(path), config.vision) for _ in range(count))
    assert features.shape == (count * 55 * 55, 16)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("count", [4, pytest.param(32, marks=[pytest.mark.slow, pytest.mark.time_limit(300)])])
def test_memory_of_large_images(count, tmp_path):
    """Images of 1540 × 1540, 12,100 patches each, from file to features: 400 MiB for one at a time, 1 MiB for each.

    A matrix of scores alone would be 1.2 GB for one image, and the pixels of 32 are 0.9 GB.
    """
    path = str(tmp_path / "page.bmp")
    Image.effect_noise((1540, 1540), 50).convert("RGB").save(path)
    ended = run("-c", MEASURE, path, count, seconds=280)
    assert ended.status == 0, ended.err
    assert int(ended.out) / 1024 < 400 + count


# ------------------------------------------------------------------------------------- inputs that people have


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_upright(kind, mode, tmp_path):
    """Size and pixels equal those of the picture that a person sees, for each way in which a camera is held."""
    if kind == "JPEG" and mode == "RGBA":
        pytest.skip("JPEG has no such mode")
    seen = Image.effect_noise((31, 20), 90).convert("RGB")
    seen.paste("red", (3, 2, 12, 6))
    turn_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of what the camera did
    for value in (None, 0, 1, 9, *turn_back):
        stored = seen.transpose(Image.Transpose(turn_back[value])) if value in turn_back else seen
        stored, exif, path = stored.convert(mode), Image.Exif(), str(tmp_path / f"{value}.{kind}")
        if value is not None:
            exif[0x0112] = value
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        stored.save(path, kind, exif=exif, **options)
        assert image_size(path) == load_image(path).size == (31, 20), value
        plain = str(tmp_path / f"plain.{kind}")
        (seen if mode in ("RGB", "RGBA") else seen.convert(mode)).save(plain, kind, **options)
        apart = np.abs(np.asarray(load_image(path), int) - np.asarray(load_image(plain), int))
        assert apart.mean() < (6 if kind == "JPEG" else 1e-9), (value, apart.mean())


def test_damaged_exif_is_no_reason(tmp_path):
    Image.new("RGB", (9, 4), "blue").save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    assert image_size(str(tmp_path / "a.png")) == load_image(str(tmp_path / "a.png")).size == (9, 4)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(dtype, tmp_path):
    """32-bit TIFFs of microscopes and maps would become black or white."""
    path = str(tmp_path / "a.tiff")
    Image.fromarray((np.random.rand(7, 5) * 1000).astype(dtype)).save(path)
    with pytest.raises(UserError, match="32-bit numbers.*convert it to 8 bits"):
        load_image(path)


@pytest.mark.parametrize("mode, colour", [("RGB", (10, 200, 30)), ("L", 77)])
def test_a_transparent_colour_is_white(mode, colour, tmp_path):
    """PNG's tRNS, as transparency is everywhere else."""
    path, image = str(tmp_path / "a.png"), Image.new(mode, (6, 4), colour)
    image.putpixel((2, 1), 0 if mode == "L" else (0, 0, 0))
    image.save(path, transparency=colour)
    found = np.asarray(load_image(path))
    expected = np.full((4, 6, 3), 255)
    expected[1, 2] = 0
    assert np.array_equal(found, expected)
