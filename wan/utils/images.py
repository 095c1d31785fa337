"""Reading input images, and the size of the video that is made from one. Needs no torch."""

import math

from PIL import Image, ImageOps

MIN_SIDE = 16  # pixels
MAX_ASPECT = 5.0  # longer side over shorter side; the models know nothing like it

LATENT_STRIDE, PATCH = 8, 2  # pixels to a latent pixel, latent pixels to a token, on either side


def read_image(path: str) -> Image.Image:
    """Returns an upright RGB image.

    Raises ValueError with one line for a file that is missing, damaged or no image, for transparency, more than 8 bits
    a channel, and for sides that are too small or too unequal.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path}: not a complete image ({error})") from error
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"cannot use {path}: {width}x{height} pixels, it needs at least {MIN_SIDE} on either side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"cannot use {path}: {width}x{height} pixels, one side may be {MAX_ASPECT:g} times the other")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"cannot use {path}: it has more than 8 bits a channel, convert it first")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError(f"cannot use {path}: parts of it are transparent (alpha channel), flatten it first")
    return image.convert("RGB")


def latent_size(image_size: tuple[int, int], max_area: int) -> tuple[int, int]:
    """(rows, columns) of the latent of a video that has about the image's aspect ratio and at most max_area pixels.

    image_size: (width, height) in pixels. Raises ValueError if not even one token fits.
    """
    width, height = image_size
    aspect = height / width
    rows, columns = (
        int(math.sqrt(area) // LATENT_STRIDE // PATCH * PATCH) for area in (max_area * aspect, max_area / aspect)
    )
    if not rows or not columns:
        raise ValueError(f"a video of {max_area} pixels in the shape of {width}x{height} has no room for a token")
    return rows, columns
