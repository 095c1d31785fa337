"""Reading input images, and the size of the video that is made from one. Needs Pillow, no torch."""

import math

from PIL import Image, ImageOps

MIN_SIDE = 16  # pixels
MAX_ASPECT = 5.0  # longer side over shorter side; the models know nothing like it

TOKEN_PIXELS = 16  # on either side: 8 to a latent pixel, 2 of these to a token


def read_image(path: str) -> Image.Image:
    """Returns an upright RGB image.

    Raises ValueError with one line for a file that is missing, damaged or no image, for transparency, more than 8 bits
    a channel, and for sides that are too small or too unequal.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # decoders of damaged files raise anything
        reason = getattr(error, "strerror", None) or f"not a complete image ({error})"
        raise ValueError(f"cannot read {path}: {reason}") from error
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


def video_size(image_size: tuple[int, int], max_area: int) -> tuple[int, int]:
    """(width, height) of a video that has about the image's aspect ratio and at most max_area pixels, in whole tokens.

    image_size: (width, height) in pixels. Raises ValueError if not even one token fits.
    """
    aspect = image_size[1] / image_size[0]
    areas = (max_area / aspect, max_area * aspect)  # in this order and form: the last bit may decide
    size = tuple(int(math.sqrt(area) // TOKEN_PIXELS) * TOKEN_PIXELS for area in areas)
    if not all(size):
        raise ValueError(f"{max_area} pixels in the shape of {image_size[0]}x{image_size[1]} have no room for a token")
    return size
