"""Image files of any kind -> upright RGB images -> uint8 tensors."""

import math
import os
import re
import warnings
from contextlib import contextmanager, suppress
from io import BytesIO, IOBase
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from engine.errors import UserError, expect, shorten
from engine.files import expect_file

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS, MAX_BYTES = 100_000_000, 1 << 30  # a larger image is taken for a mistake or an attack
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and refuses twice as much, also inside containers
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is said in our words
# What images come in, and what Pillow decodes itself and fast: for EPS, say, it starts another program.
Image.init()
FORMATS = "JPEG PNG WEBP GIF BMP DIB TIFF AVIF JPEG2000 PPM PCX PSD SGI ICO ICNS TGA".split()
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # older Pillows lack some
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {flag: Image.Transpose[turn] for flag, turn in enumerate(TURNS.split(), start=2)}  # by the camera's flag

Box = tuple[float, float, float, float]  # left, top, right, bottom


def open_image(path: str | Path, name: str = "the image") -> Image.Image:
    """A file of any common kind as an upright RGB image. Raises UserError that names the file and the fix.

    16- and 32-bit, grey, CMYK and palette images are converted, transparent parts become white, of an animation the
    first frame is taken, and the camera's rotation flag is obeyed.
    """
    with image_header(path, name) as image:
        return to_rgb(image)


@contextmanager
def image_header(path: str | Path, name: str = "the image"):
    """An image of which only the header has been read. Failing to read the rest inside is a UserError too. name: in
    messages, of what has no path."""
    is_path = isinstance(path, (str, os.PathLike))
    if is_path:
        name = shorten(path)
        expect_file(path, "an image", MAX_BYTES, "check the name, and for annotations the folder (--images)")
    try:
        image = Image.open(path, formats=FORMATS)
        if isinstance(image, JpegImageFile):
            image.fp.seek(0)
            scans = image.fp.read().count(b"\xff\xda")  # each is a pass over all pixels; an image has about ten
            expect(scans < 500, f"has {scans:,} scans, expected fewer than 500: save it again")
        yield image
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    except UnidentifiedImageError:
        kind = "not an image that Pillow can read: convert it to JPEG or PNG"
        empty = is_path and not os.path.getsize(path)
        raise UserError(f"{name} is {'empty: copy it again' if empty else kind}") from None
    except Image.DecompressionBombError as error:
        count = int(re.search("[0-9]+", str(error))[0])
        raise UserError(f"{name} has {count:,} pixels, expected at most {MAX_PIXELS:,}: resize it first") from None
    except Exception as error:  # Pillow raises every kind for a file with wrong bytes in it
        raise UserError(f"{name} is broken or cut short ({error}): copy it again, or remove its record") from None


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; at least one. Hidden ones are none: macOS writes ._a.jpg."""
    found = folder.iterdir() if os.path.isdir(folder) else []
    paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise UserError(f"{folder} has no images in it, expected a folder of files that end in {', '.join(SUFFIXES)}")
    return paths


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> RGB, upright, on white."""
    image.load()
    flag = rotation_flag(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image = image.transpose(UPRIGHT[flag]) if flag in UPRIGHT else image
    image.info = {}  # it has the flag, which has been obeyed
    return image


def to_8_bit(image: Image.Image) -> Image.Image:
    """A grey image of 12- to 32-bit numbers -> 8 bits. Pillow would clip them; what they are says how to scale them."""
    values = np.asarray(image, np.float32)
    low, high = values.min(), values.max()
    tops = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(ExifTags.Base.BitsPerSample) in ((12,), (16,)) and image.mode != "F":
        tops = ((1 << tags[ExifTags.Base.BitsPerSample][0] - (tags.get(339) == (2,))) - 1,)  # signed, by SampleFormat
    top = next((top for top in tops if 0 <= low and high <= top), None)
    expect(top, f"has values from {low:g} to {high:g}, expected 0 to {' or '.join(map(str, tops))}: scale them")
    return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))


def rotation_flag(image: Image.Image) -> int | None:
    """How the camera was held, if the image says so readably."""
    with suppress(Exception):  # Pillow raises every kind for odd entries
        return image.getexif().get(ExifTags.Base.Orientation)


def as_image(image) -> Image.Image:
    """A path, the bytes of an image file, an open one, a Pillow image, or what `as_uint8` takes -> upright RGB."""
    if isinstance(image, (bytes, str, os.PathLike, IOBase)):
        return open_image(BytesIO(image) if isinstance(image, bytes) else image)
    if isinstance(image, (np.ndarray, Tensor)):
        image = Image.fromarray(as_uint8(image))
    expected = "a path, a Pillow image, an array (H, W, 3), a tensor (3, H, W), or the bytes of an image file"
    expect(isinstance(image, Image.Image), f"got {repr(image):.60} as an image, expected {expected}")
    return to_rgb(image)


def as_uint8(image) -> np.ndarray:
    """An array (H, W, C) or tensor (C, H, W) with C of 1, 3 or 4, or either (H, W) -> uint8 (H, W, C), grey (H, W).

    Floats from 0 to 1 (torchvision's ToTensor), integers from 0 to 255, uint16 to 65,535; else UserError.
    """
    is_tensor = isinstance(image, Tensor)
    if is_tensor:
        image = (image.float() if image.is_floating_point() else image).detach().cpu()
    x = np.asarray(image)
    got = f"got {'a tensor' if is_tensor else 'an array'} of {x.dtype} and shape {x.shape} as an image"
    x = np.moveaxis(x, 0, -1) if is_tensor and x.ndim == 3 else x
    fits = x.size and (x.ndim == 2 or x.ndim == 3 and x.shape[2] in (1, 3, 4))
    expect(fits, f"{got}, expected {'(3, H, W)' if is_tensor else '(H, W, 3)'}")
    wanted = "floats from 0 to 1 or integers from 0 to 255: convert it, or pass the image before it is normalised"
    expect(x.dtype.kind in "fiu", f"{got}, expected {wanted}")
    low, high = float(x.min()), float(x.max())
    most = 1 if x.dtype.kind == "f" else 65_535 if x.dtype == np.uint16 else 255
    expect(0 <= low <= high <= most, f"{got} with values from {low:g} to {high:g}, expected {wanted}")
    x = (255 * x).round() if most == 1 else x >> 8 if high > 255 else x
    return x.astype(np.uint8).reshape(x.shape[:2] if x.shape[2:] == (1,) else x.shape)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, H, W); the ViT normalises, on its device."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eval_transform(image: Image.Image, size: int) -> Tensor:
    """Bicubic to size x size, whatever the aspect ratio (as in LAVIS) -> uint8 (3, size, size)."""
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def decode_crop(image: Image.Image, size: int, rng: np.random.Generator) -> tuple[Image.Image, Box]:
    """Paper 3.4: a random crop -> the upright RGB image, and the crop as a box in its pixels.

    A JPEG that has not been decoded yet is decoded at a half, a quarter or an eighth of its size, where the crop then
    still has `size` pixels a side.
    """
    if not isinstance(image, JpegImageFile):
        image = to_rgb(image)
    width, height = image.size[::-1] if rotation_flag(image) in (5, 6, 7, 8) else image.size
    left, top, right, bottom = random_crop(width, height, rng)
    shrink = max(1.0, min(right - left, bottom - top) / size)
    image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
    image = to_rgb(image)
    x, y = image.width / width, image.height / height  # 1 if it has not been shrunk
    return image, (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))


def train_transform(image: Image.Image, box: Box, size: int, rng: np.random.Generator, flip: bool) -> Tensor:
    """The result of `decode_crop`, resized, and if `flip` mirrored half of the time -> uint8 (3, size, size)."""
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return to_tensor(image)


def random_crop(width: int, height: int, rng: np.random.Generator) -> Box:
    """0.5 to 1.0 of the area, with an aspect ratio of 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side_w, side_h = min(width, height * 4 / 3), min(height, width * 4 / 3)  # a very long image: its middle
    left, top = (width - side_w) / 2, (height - side_h) / 2
    return left, top, left + side_w, top + side_h
