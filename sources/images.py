"""Image files of any kind -> upright RGB images -> uint8 tensors."""

import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from engine.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # a larger image is taken for a mistake or an attack
Image.MAX_IMAGE_PIXELS = None  # `image_header` checks instead, with a message of its own

Box = tuple[float, float, float, float]  # left, top, right, bottom


def open_image(path: str | Path) -> Image.Image:
    """A file of any common kind as an upright RGB image. Raises UserError that names the file and the fix.

    16-bit, grey, CMYK and palette images are converted, transparent parts become white, of an animation the first
    frame is taken, and the camera's rotation flag is obeyed.
    """
    with image_header(path) as image:
        return to_rgb(image)


@contextmanager
def image_header(path: str | Path):
    """An image of which only the header has been read. Failing to read the rest inside is a UserError too."""
    try:
        image = Image.open(path)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{path} has {width} x {height} pixels, expected at most {MAX_PIXELS:,}: resize it first")
        yield image
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the name, and for annotations the folder (--images)") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that Pillow can read: convert it to JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path} is broken or cut short ({error}): copy it again, or remove its record") from None


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; at least one."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder} has no images in it, expected a folder of files that end in {', '.join(SUFFIXES)}")
    return paths


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> RGB, upright, on white."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow would clip, not scale
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    width, height = image.size[::-1] if sideways else image.size
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
