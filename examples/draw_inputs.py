"""Draws the example input pictures of the image-to-video, first-last-frame and VACE commands.

python -m examples.draw_inputs [--out examples]

wan_i2v.png                    a sailing boat at sunset
wan_i2v_2.png                  a lighthouse at dusk
i2v_input.JPG                  a white cat with sunglasses on a surfboard
flf2v_input_first_frame.png    a blue bird on a branch
flf2v_input_last_frame.png     the bird in flight over the same hills
girl.png                       a girl in a red dress on white, a reference picture for VACE
snake.png                      a green snake on white, the other reference
i2v_tiny_input.png             a purple triangle on yellow, as the demo model i2v-tiny knows them

Shapes are lists of points in pixels of the finished picture. A canvas paints them three times as large, and shrinking
it smooths the edges.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from examples.train_tiny.check_prompts import first_frame
from examples.train_tiny.shapes import Caption
from wan.utils.utils import to_uint8

SCALE = 3
WHITE = "#ffffff"


def rows(text: str) -> np.ndarray:
    """Reads a table, rows separated by spaces and columns by commas."""
    return np.array([row.split(",") for row in text.split()], float)


def points(text: str, x: float = 0, y: float = 0) -> np.ndarray:
    """Reads "x,y x,y ...", counted from (x, y)."""
    return rows(text) + np.array([x, y])


def smooth(path, closed: bool = True, steps: int = 14) -> np.ndarray:
    """A Catmull-Rom curve through the points."""
    path = np.asarray(path, float)
    if closed:
        path = np.concatenate([path[-1:], path, path[:2]])
    else:
        path = np.concatenate([2 * path[:1] - path[1:2], path, 2 * path[-1:] - path[-2:-1]])
    a, b, c, d = (path[i : len(path) - 3 + i, None] for i in range(4))
    t = np.arange(steps)[None, :, None] / steps
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, path[-2:-1]])


def curves(text: str, x: float = 0, y: float = 0) -> np.ndarray:
    """A closed shape of curves separated by "|", which meet in corners."""
    return np.concatenate([smooth(points(part, x, y), closed=False) for part in text.split("|")])


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0, start: float = 0, end: float = 360):
    """Points of an ellipse or of its arc, angles in degrees and clockwise from the right."""
    t = np.radians(np.linspace(start, end, 72))
    return turn(np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1), (x, y), angle)


def turn(path, centre, angle: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return (np.asarray(path, float) - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre


def shift(shapes, dx: float, dy: float):
    return [shift(shape, dx, dy) for shape in shapes] if isinstance(shapes, list) else shapes + np.array([dx, dy])


def mirror(path, x: float) -> np.ndarray:
    return np.asarray(path, float) * (-1, 1) + (2 * x, 0)


def ribbon(path, *widths: float) -> list[np.ndarray]:
    """A round-ended stroke along the curve through the points, its width changing evenly through the given widths."""
    path = smooth(path, closed=False)
    along = np.linspace(0, len(widths) - 1, len(path))
    radius = np.interp(along, np.arange(len(widths)), widths)[:, None] / 2
    ahead = np.gradient(path, axis=0)
    side = ahead[:, ::-1] * (-1, 1) / np.maximum(np.linalg.norm(ahead, axis=1, keepdims=True), 1e-9) * radius
    left, right = path + side, path - side
    pieces = [np.stack([left[i], left[i + 1], right[i + 1], right[i]]) for i in range(len(path) - 1)]
    return pieces + [ellipse(*point, r, r) for point, (r,) in zip(path, radius, strict=True)]


def blade(x: float, y: float, length: float, width: float, angle: float) -> np.ndarray:
    """A leaf or a feather that path from (x, y) along the angle."""
    outline = points("0,0 0.3,-0.5 0.72,-0.42 1,0 0.72,0.42 0.3,0.5")
    return turn(shift(smooth(outline * (length, width)), x, y), (x, y), angle)


def lens(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A flat streak with pointed ends: a ripple or a glint on water."""
    t = np.linspace(-1, 1, 24)
    bulge = (1 - t**2) * height / 2
    outline = np.concatenate([np.stack([t, -bulge], 1), np.stack([t, bulge], 1)[::-1]])
    return outline * (width / 2, 1) + (x, y)


class Canvas:
    def __init__(self, width: int, height: int, *sky: str):
        """A picture filled with a vertical gradient through the colours."""
        self.width, self.height = width, height
        self.image = gradient((width * SCALE, height * SCALE), *(sky or [WHITE]))

    def fill(self, shapes, *colours: str, alpha: float = 1, blur: float = 0, inside=None):
        """Paints the union of the shapes with a vertical gradient, blurred and clipped to the shape `inside`."""
        shapes = shapes if isinstance(shapes, list) else [shapes]
        corners = np.concatenate(shapes)
        low, high = corners.min(0) - 3 * blur - 1, corners.max(0) + 3 * blur + 1
        left, top = np.maximum(np.floor(low), 0).astype(int)
        right, bottom = np.minimum(np.ceil(high), (self.width, self.height)).astype(int)
        if right <= left or bottom <= top:
            return
        size = ((right - left) * SCALE, (bottom - top) * SCALE)
        mask = draw_mask(shapes, size, (left, top)).filter(ImageFilter.GaussianBlur(blur * SCALE))
        if inside is not None:
            inside = inside if isinstance(inside, list) else [inside]
            mask = ImageChops.multiply(mask, draw_mask(inside, size, (left, top)))
        mask = mask.point([round(v * alpha) for v in range(256)])
        paint = gradient((size[0], round((high[1] - low[1] + 2) * SCALE)), *colours)
        above = round((top - low[1]) * SCALE) + SCALE
        paint = paint.crop((0, above, size[0], above + size[1]))
        self.image.paste(paint, (left * SCALE, top * SCALE), mask)

    def line(self, path, width: float, colour: str, alpha: float = 1):
        self.fill(ribbon(path, width), colour, alpha=alpha)

    def glow(self, x: float, y: float, radius: float, colour: str, alpha: float = 1):
        size = round(2 * radius * SCALE)
        offset = np.linspace(-1, 1, 256)
        falloff = np.clip(1 - np.hypot(offset, offset[:, None]), 0, 1) ** 2 * 255 * alpha
        mask = Image.fromarray(falloff.round().astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        corner = (round((x - radius) * SCALE), round((y - radius) * SCALE))
        self.image.paste(Image.new("RGB", mask.size, colour), corner, mask)

    def below(self, y: float) -> np.ndarray:
        return points("0,0 1,0 1,1 0,1") * (self.width, self.height - y) + (0, y)

    def finish(self) -> Image.Image:
        """The picture in its own size. Rounding its levels, most of all on edges, saves a third of a PNG."""
        levels = np.asarray(self.image.resize((self.width, self.height), Image.Resampling.LANCZOS), float)
        contrast = np.abs(np.gradient(levels, axis=1)).max(2, keepdims=True)
        step = np.where(contrast > 12, 15, 3)
        return Image.fromarray((np.round(levels / step) * step).astype(np.uint8))


def gradient(size: tuple[int, int], *colours: str) -> Image.Image:
    rows = np.linspace(0, len(colours) - 1, size[1])
    stops = np.array([ImageColor.getrgb(colour) for colour in colours], float)
    column = np.stack([np.interp(rows, np.arange(len(colours)), channel) for channel in stops.T], 1)
    return Image.fromarray(column.round().astype(np.uint8)[:, None]).resize(size)


def draw_mask(shapes, size: tuple[int, int], corner) -> Image.Image:
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for shape in shapes:
        draw.polygon([tuple(point) for point in (np.asarray(shape, float) - corner) * SCALE], fill=255)
    return mask


def hills(canvas: Canvas, y: float, height: float, seed: int, *colours: str, waves=(1.3, 2.9, 6.1)) -> np.ndarray:
    """Rolling hills from about y to the bottom of the picture; returns the ridge."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-4, canvas.width + 4, 160)
    ridge = y + sum(
        height / wave * np.sin(2 * np.pi * (wave * x / canvas.width + phase))
        for wave, phase in zip(waves, rng.random(len(waves)), strict=True)
    )
    ridge = np.stack([x, ridge], 1)
    bottom = [(canvas.width + 4, canvas.height + 4), (-4, canvas.height + 4)]
    canvas.fill(np.concatenate([ridge, bottom]), *colours)
    return ridge


def cloud(canvas: Canvas, x: float, y: float, width: float, seed: int, light: str, dark: str, alpha: float = 1):
    """A flat-bottomed heap of puffs, light above and dark below, its base at y."""
    rng = np.random.default_rng(seed)
    base = np.array(points("-0.42,-0.1 0.42,-0.1 0.42,0 -0.42,0")) * width + (x, y)
    puffs, cores = [base], [base]
    for t in np.linspace(-1, 1, 7):
        bulge = 1 - t**2
        radius = width * (0.06 + 0.12 * bulge * rng.uniform(0.7, 1.2))
        centre = (x + t * width * 0.42, y - radius * (1 - 0.6 * bulge))
        puffs.append(ellipse(*centre, radius * 1.1, radius))
        cores.append(ellipse(centre[0] + radius * 0.1, centre[1] + radius * (0.1 + 0.2 * bulge), radius, radius * 0.9))
    above = np.array(points("-1,-1 1,-1 1,0 -1,0")) * width + (x, y)
    canvas.fill(puffs, light, light, dark, alpha=alpha, inside=above)
    canvas.fill(cores, dark, alpha=0.3 * alpha, blur=0.8, inside=above)


def ripples(
    canvas: Canvas,
    top: float,
    bottom: float,
    count: int,
    seed: int,
    *colours: str,
    x=None,
    spread=None,
    alpha: float = 0.35,
):
    """Streaks on water, smaller towards the horizon; `x` and `spread` gather them below a light."""
    rng = np.random.default_rng(seed)
    for depth in np.sort(rng.random(count)):
        near = 0.12 + depth
        width = (canvas.width * 0.09 if spread is None else spread) * near * rng.uniform(0.5, 1.5)
        centre = rng.uniform(0, canvas.width) if x is None else x + rng.normal() * spread * 0.3 * near
        y = top + (bottom - top) * depth**1.25
        canvas.fill(lens(centre, y, width, 1 + 3.6 * near * rng.uniform(0.5, 1)), rng.choice(colours), alpha=alpha)


def gull(canvas: Canvas, x: float, y: float, size: float, colour: str):
    wing = [(x, y), (x + size * 0.35, y - size * 0.3), (x + size, y - size * 0.12)]
    for side in (wing, mirror(wing, x)):
        canvas.fill(ribbon(side, size * 0.14, size * 0.12, size * 0.02), colour)


def boat_at_sunset() -> Canvas:
    canvas = Canvas(1280, 720, "#3d2c63", "#8a4a80", "#e2736f", "#ffb36b", "#ffe0a0", "#ffe0a0")
    horizon, sun = 452, 820
    canvas.glow(sun, horizon - 20, 560, "#fff0b8", 0.75)
    canvas.fill(ellipse(sun, horizon - 28, 86, 86), "#fffbe0", "#ffdf8a")
    cloud(canvas, 250, 170, 420, 1, "#f3a08c", "#b5648a", 0.9)
    cloud(canvas, 1050, 122, 360, 2, "#e88f8a", "#9c568a", 0.85)
    cloud(canvas, 560, 268, 250, 3, "#ffc69a", "#e08a86", 0.9)
    cloud(canvas, 1120, 300, 330, 4, "#ffcf9c", "#ea9584", 0.9)
    cloud(canvas, 60, 330, 260, 5, "#ffc79a", "#e58f88", 0.8)
    hills(canvas, horizon - 22, 26, 11, "#d98089", "#e8a08c")
    hills(canvas, horizon + 4, 34, 26, "#a85c86", "#c87a86")

    sea = canvas.below(horizon)
    canvas.fill(sea, "#f7a878", "#c06a86", "#6a467f", "#3b2f66", "#2a2452")
    canvas.fill(ellipse(sun, horizon + 8, 300, 70), "#ffe6a6", alpha=0.55, blur=26, inside=sea)
    ripples(canvas, horizon + 4, 716, 150, 6, "#ffb98a", "#8d5a90", "#221d48", alpha=0.3)
    ripples(canvas, horizon + 3, 690, 70, 7, "#ffe9b0", "#ffc98a", x=sun, spread=130, alpha=0.7)

    x, y = 505, 560
    shadow = [
        lens(x + dx, y + 14 + 11 * i, w, 12)
        for i, (dx, w) in enumerate(points("0,330 -8,300 10,250 -10,210 8,180 -4,130 6,100 0,60"))
    ]
    canvas.fill(shadow, "#2a1f4b", alpha=0.65)
    mast = [(x + 6, y - 10), (x + 2, y - 338)]
    main = curves("-4,-326 -104,-196 -168,-58 | -168,-58 -80,-44 2,-52", x, y)
    jib = curves("12,-300 78,-160 152,-50 | 152,-50 84,-56 22,-46 | 22,-46 36,-160 12,-300", x, y)
    canvas.fill(main, "#fff8e6", "#fff0d4", "#ffd9b4")
    canvas.fill(shift(main, -88, 10), "#a5527f", alpha=0.5, blur=18, inside=main)
    canvas.fill(jib, "#fffdf0", "#fff4da", "#ffe0b8")
    canvas.fill(shift(jib, -74, 8), "#b5607f", alpha=0.5, blur=13, inside=jib)
    for sail, heights in ((main, (110, 180, 250)), (jib, (110, 180))):
        for h in heights:
            seam = ribbon(points("-200,10 0,0 200,12", x, y - h), 1.6)
            canvas.fill(seam, "#c77a80", alpha=0.5, inside=sail)
    canvas.line(mast, 6, "#4a2a45")
    canvas.line([(x - 172, y - 50), (x + 6, y - 42)], 5, "#4a2a45")
    canvas.line([(x + 2, y - 336), (x + 164, y - 40)], 1.4, "#4a2a45")
    pennant = [smooth([(x + 2, y - h), (x - 26, y - h - 6), (x - 58, y - 330)], closed=False) for h in (340, 320)]
    canvas.fill(np.concatenate([pennant[0], pennant[1][::-1]]), "#f0605f", "#c93f5c")
    hull = curves("-186,-38 -20,-24 182,-46 | 182,-46 130,8 70,20 -120,20 -170,2 -186,-38", x, y)
    canvas.fill(hull, "#8e3f52", "#5b2748", "#331b3d")
    canvas.fill(ribbon(points("-186,-30 -20,-16 176,-38", x, y), 7), "#ffe2b8", inside=hull)
    canvas.fill(ellipse(x + 150, y - 30, 60, 40), "#ff9c78", alpha=0.55, blur=14, inside=hull)
    canvas.fill([lens(x - 60, y + 19, 300, 7), lens(x + 70, y + 22, 220, 6)], "#ffd9ae", alpha=0.8)
    for gx, gy, size in ((690, 210, 24), (742, 178, 18), (636, 172, 15), (960, 218, 14)):
        gull(canvas, gx, gy, size, "#5a3560")
    return canvas


def lighthouse() -> Canvas:
    canvas = Canvas(832, 480, "#16204a", "#2c3a78", "#5e5f9f", "#c58aa0", "#f3b594", "#f3b594")
    rng = np.random.default_rng(8)
    for _ in range(70):
        x, y, r = rng.uniform(0, 832), 190 * rng.random() ** 1.4, rng.uniform(0.5, 1.4)
        canvas.fill(ellipse(x, y, r, r), "#fff6dd", alpha=rng.uniform(0.4, 1))
    canvas.glow(190, 96, 150, "#d9d6ff", 0.5)
    canvas.fill(ellipse(190, 96, 30, 30), "#fffdf0", "#f1e6d2")
    for dx, dy, r in ((-9, -6, 6), (8, 8, 8), (10, -11, 4)):
        canvas.fill(ellipse(190 + dx, 96 + dy, r, r), "#d9cfc8", alpha=0.6)
    cloud(canvas, 130, 232, 210, 12, "#a888b4", "#8a76ad", 0.8)
    cloud(canvas, 395, 262, 170, 13, "#d9a0ab", "#b78bad", 0.8)
    cloud(canvas, 330, 150, 120, 14, "#6a68a6", "#5b5c9c", 0.7)
    horizon = 312
    hills(canvas, horizon - 6, 16, 15, "#9a7fa6", "#c08fa0")
    sea = canvas.below(horizon)
    canvas.fill(sea, "#d69a9c", "#6a6aa0", "#34407e", "#1b2655", "#141b42")
    ripples(canvas, horizon + 3, 478, 110, 16, "#f0b8a6", "#7f86be", "#131a3f", alpha=0.3)
    ripples(canvas, horizon + 2, 440, 40, 17, "#fff4dc", "#f7dcc8", x=190, spread=52, alpha=0.7)

    x, lamp = 588, 98
    for beam in ("0,-3 0,3 -648,74 -648,-4", "0,-3 0,3 -648,70 -648,26", "0,-3 0,3 312,-6 312,-56"):
        canvas.fill(points(beam, x, lamp), "#fff3b8", alpha=0.22, blur=3)
    rock = points(
        "392,482 408,452 432,446 446,408 470,400 486,372 520,366 540,350 640,346 700,338 760,344 840,330 840,482"
    )
    canvas.fill(rock, "#6d5a80", "#453c6b", "#262750", "#1a1d40")
    for facet in (
        "486,372 520,366 512,410 470,440 446,408 470,400",
        "540,356 592,356 604,402 566,446 546,410",
        "408,452 432,446 470,440 512,482 400,482",
        "604,402 650,360 690,352 676,420 640,440",
        "566,446 640,440 662,482 548,482",
        "740,364 800,352 840,352 840,400 776,428 748,400",
        "700,450 776,428 800,482 690,482",
    ):
        canvas.fill(points(facet), "#8d7292", "#453d6e", alpha=0.6, inside=rock)
    grass = smooth(
        points("500,378 540,352 640,342 700,336 850,326 850,362 790,356 740,370 690,356 640,368 590,358 545,372")
    )
    canvas.fill(grass, "#6f8f7c", "#3f5f6c")

    house = points("668,346 668,300 764,300 764,344")
    canvas.fill(house, "#efe0d8", "#b7a0b4")
    canvas.fill(points("654,304 676,266 756,266 778,304"), "#b5485a", "#7d3355")
    canvas.fill(points("738,270 738,248 752,248 752,270"), "#8c4a5c")
    for wx in (684, 734):
        canvas.glow(wx + 8, 322, 34, "#ffd67a", 0.6)
        canvas.fill(points("0,312 16,312 16,332 0,332", wx), "#fff0b0", "#ffc766")
        canvas.line([(wx + 8, 312), (wx + 8, 332)], 1.5, "#8c5560")
        canvas.line([(wx, 322), (wx + 16, 322)], 1.5, "#8c5560")
    canvas.fill(points("709,345 709,318 725,318 725,345"), "#7d3355", "#5b2a4c")

    canvas.glow(x, lamp, 130, "#fff2b0", 0.8)

    def tower(top, bottom):
        half = [20 + 18 * (y - 122) / 230 for y in (top, bottom)]
        return np.concatenate(
            [ellipse(x, bottom, half[1], 7, start=0, end=180), ellipse(x, top, half[0], 5, start=180, end=0)]
        )

    body = tower(122, 352)
    canvas.fill(body, "#fbf2e8", "#e6d5d6")
    for top in (152, 222, 292):
        canvas.fill(tower(top, top + 34), "#dc5560", "#c0445c")
    canvas.fill(shift(body, -34, 0), "#ffe0b8", alpha=0.35, blur=8, inside=body)
    canvas.fill(shift(body, 30, 0), "#2f2a60", alpha=0.6, blur=9, inside=body)
    for wy in (196, 268):
        canvas.fill(ellipse(x - 4, wy, 5, 8), "#ffe28a", "#ffc25a")
    canvas.fill(points("-14,120 -14,76 14,76 14,120", x), "#fff6cc", "#ffd877")
    for dx in (-14, 0, 14):
        canvas.line([(x + dx, 76), (x + dx, 120)], 2.2, "#3a2f58")
    canvas.fill(
        np.concatenate([ellipse(x, 76, 20, 5, start=0, end=180), points("-6,54 0,46 6,54", x)]), "#d3505e", "#8f3556"
    )
    canvas.line([(x, 48), (x, 36)], 2, "#8f3556")
    canvas.fill(points("-30,116 30,116 25,126 -25,126", x), "#4a3a66", "#2d2750")
    for dx in (-28, -14, 0, 14, 28):
        canvas.line([(x + dx, 117), (x + dx, 104)], 1.6, "#3a2f58")
    canvas.line([(x - 28, 104), (x + 28, 104)], 1.8, "#3a2f58")
    canvas.glow(x, lamp, 40, "#fffbe0", 0.95)
    for fx, fy, w in ((384, 476, 110), (398, 466, 60), (420, 455, 44), (360, 470, 50), (440, 478, 90), (432, 446, 26)):
        canvas.fill(lens(fx, fy, w, 5), "#e9dcec", alpha=0.75)
    for gx, gy, size in ((440, 190, 14), (474, 208, 11), (300, 214, 10)):
        gull(canvas, gx, gy, size, "#2c3266")
    return canvas


def cat_on_surfboard() -> Canvas:
    canvas = Canvas(832, 480, "#3fa4e4", "#7cc8f0", "#c9edf8", "#e6f8f4", "#e6f8f4")
    canvas.glow(700, 40, 260, "#fffbe0", 0.8)
    cloud(canvas, 150, 110, 210, 21, WHITE, "#d5ecf8")
    cloud(canvas, 640, 82, 170, 22, WHITE, "#dcf0fa")
    cloud(canvas, 745, 176, 200, 23, WHITE, "#dff2f8")
    cloud(canvas, 318, 186, 130, 24, WHITE, "#e0f3f8", 0.8)
    horizon = 246
    hills(canvas, horizon - 30, 40, 31, "#a5d3c4", "#c8e6d4")
    hills(canvas, horizon - 12, 38, 35, "#74bb96", "#a4d6ae")
    hills(canvas, horizon + 8, 30, 37, "#4ea37c", "#7fc290")
    sea = canvas.below(horizon)
    canvas.fill(sea, "#b5efe4", "#5fd3d4", "#2bb0c6", "#1b8fb4", "#14709c")
    ripples(canvas, horizon + 3, 478, 110, 25, "#dffaf4", "#e8fffa", "#128cae", alpha=0.4)

    canvas.fill(smooth(points("150,420 300,440 520,436 700,404 640,450 420,470 220,454")), "#0d6a94", alpha=0.5, blur=6)
    board = smooth(points("-292,3 -230,-17 -90,-25 100,-25 230,-15 296,3 230,17 100,25 -90,25 -230,19", 420, 405))
    board = turn(board, (420, 405), -3)
    canvas.fill(shift(board, 0, 9), "#d8913f", "#b3622f")
    canvas.fill(board, "#ffe9b8", "#ffd083")
    for dy, width, colour in ((-1, 15, "#ef6a5a"), (-15, 3.5, "#2aa7b5"), (13, 3.5, "#2aa7b5")):
        stripe = ribbon(turn([(110, 406 + dy), (740, 406 + dy)], (420, 405), -3), width)
        canvas.fill(stripe, colour, inside=board)
    canvas.fill(ellipse(430, 404, 120, 20, -3), "#8a5a3a", alpha=0.4, blur=7, inside=board)

    x = 430
    tail = points("480,384 536,388 572,366 566,330 548,318")
    canvas.fill(ribbon(tail, 30, 28, 24), "#f6f6fb", "#cfd3e6")
    body = smooth(points("0,208 46,236 68,300 78,360 60,396 0,402 -60,396 -78,360 -68,300 -46,236", x))
    canvas.fill(body, WHITE, "#f8f8fc", "#dfe2f0")
    canvas.fill(shift(body, 64, 22), "#9fa8cc", alpha=0.55, blur=20, inside=body)
    for side in (-1, 1):
        canvas.fill(ellipse(x + side * 56, 384, 30, 18), "#f4f5fb", "#d3d7e8")
    for side in (-1, 1):
        leg = ribbon([(x + side * 22, 300), (x + side * 24, 350), (x + side * 25, 388)], 38, 34, 38)
        canvas.fill(shift(leg, side * 2 + 4, 0), "#9aa3c8", alpha=0.35, blur=5, inside=body)
        canvas.fill(leg, "#fbfbfe", "#fbfbfe", "#e6e8f4")
        canvas.fill(ellipse(x + side * 26, 393, 24, 14), WHITE, "#dde0ee")
        for toe in (-7, 7):
            canvas.line([(x + side * 26 + toe, 391), (x + side * 26 + toe, 401)], 1.8, "#a9aec8")
    tuft = points("-52,226 -40,262 -32,256 -22,282 -13,274 0,300 13,274 22,282 32,256 40,262 52,226", x)
    canvas.fill(shift(tuft, 3, 6), "#9aa3c8", alpha=0.4, blur=4, inside=body)
    canvas.fill(tuft, WHITE, "#fbfbfe")
    head = smooth(points("0,118 42,126 72,160 84,196 66,220 34,236 0,240 -34,236 -66,220 -84,196 -72,160 -42,126", x))
    canvas.fill(shift(head, 2, 16), "#8f99c2", alpha=0.4, blur=9, inside=body)
    ear = smooth(points("10,130 36,104 66,76 74,79 82,118 84,180 44,180", x))
    inner = smooth(points("30,136 46,112 67,91 74,120 74,160", x))
    for flip in (False, True):
        canvas.fill(mirror(ear, x) if flip else ear, WHITE, "#eceef7")
        canvas.fill(mirror(inner, x) if flip else inner, "#ffb9b4", "#ffd9d2")
    canvas.fill(head, WHITE, "#fbfbfe", "#e6e8f4")
    canvas.fill(shift(head, 70, 20), "#a4acd0", alpha=0.5, blur=18, inside=head)
    for side in (-1, 1):
        canvas.fill(ellipse(x + side * 52, 208, 17, 10), "#ff9f9a", alpha=0.4, blur=5)
        canvas.fill(ellipse(x + side * 15, 212, 20, 15), WHITE, "#f1f2f9")
        for dy in (-6, 2, 10):
            whisker = [(x + side * 34, 210 + dy * 0.5), (x + side * 70, 206 + dy), (x + side * 104, 208 + dy * 2)]
            canvas.line(whisker, 1.3, "#8d94b4", 0.8)
    canvas.line([(x, 206), (x, 218)], 2.2, "#8a6a78")
    canvas.line(points("0,218 -10,225 -22,219", x), 2.2, "#8a6a78")
    canvas.line(points("0,218 10,225 22,219", x), 2.2, "#8a6a78")
    canvas.fill(smooth(points("-9,199 0,197 9,199 5,206 0,209 -5,206", x)), "#ff9a9a", "#ea7280")
    glasses = points("8,164 34,160 64,160 66,176 54,194 32,196 14,188", x)
    canvas.line([(x - 82, 164), (x - 60, 165)], 5, "#2b2440")
    canvas.line([(x + 60, 165), (x + 82, 164)], 5, "#2b2440")
    canvas.line(points("-16,169 0,165 16,169", x), 5.5, "#2b2440")
    for flip in (False, True):
        outer = smooth(mirror(glasses, x) if flip else glasses)
        middle = outer.mean(0)
        pane = (outer - middle) * 0.86 + middle
        canvas.fill(outer, "#2b2440")
        canvas.fill(pane, "#3d3a7c", "#8a5aa0", "#ff9a7a")
        for dx, width in ((-8, 9), (6, 3.5)):
            glint = shift(ribbon([(14, -26), (-14, 26)], width), middle[0] + dx, middle[1])
            canvas.fill(glint, WHITE, alpha=0.4, inside=pane)

    crest = "-10,462 60,440 150,428 260,440 380,448 520,440 640,426 740,424 842,446"
    canvas.fill(curves(crest + " | 842,446 842,490 | 842,490 -10,490"), "#7fe0dc", "#35b7ca", "#1b8fb4", alpha=0.92)
    canvas.fill(ribbon(points(crest), 6, 10, 6, 8, 10, 6), WHITE, alpha=0.9)
    for dx, dy, r in ((-14, 2, 13), (4, -3, 10), (18, 4, 12), (34, 2, 8), (-32, 5, 9), (-4, -16, 4), (24, -14, 3)):
        for side, y in ((142, 428), (700, 423)):
            canvas.fill(ellipse(side + dx, y + dy, r, r), WHITE, "#e4fbfa")
    ripples(canvas, 452, 478, 16, 27, "#d8faf4", alpha=0.5)
    return canvas


def morning_hills() -> Canvas:
    """The scene that the two frames with the bird share."""
    canvas = Canvas(1280, 720, "#79bfe6", "#b4def0", "#e9f3e6", "#fdeecb", "#fde3b4", "#fde3b4")
    for radius in (220, 158, 104):
        canvas.fill(ellipse(300, 330, radius, radius), "#fff3c4", alpha=0.32)
    canvas.fill(ellipse(300, 330, 58, 58), "#fffdf0", "#ffe3a0")
    cloud(canvas, 640, 130, 330, 41, WHITE, "#e3f0f4", 0.9)
    cloud(canvas, 130, 190, 260, 42, WHITE, "#eef3ee", 0.85)
    cloud(canvas, 1080, 250, 300, 43, WHITE, "#f3efe0", 0.8)
    hills(canvas, 420, 70, 51, "#b9d6d4", "#e3e6d0", waves=(1.7, 3.7, 8.3))
    hills(canvas, 466, 70, 52, "#8fc2b4", "#cfe0bc")
    hills(canvas, 520, 66, 53, "#63a892", "#a9cd9c")
    ridge = hills(canvas, 580, 60, 54, "#41907c", "#6fae80")
    rng = np.random.default_rng(44)
    for x in np.sort(rng.uniform(20, 1000, 18)):
        y = np.interp(x, *ridge.T) + 6
        size = rng.uniform(26, 48)
        tiers = [
            np.array([(x - size * w, y - size * h), (x, y - size * (h + 0.75)), (x + size * w, y - size * h)])
            for w, h in ((0.34, 0.1), (0.27, 0.5), (0.19, 0.9))
        ]
        canvas.fill(tiers, "#2f7a70", "#3f8c78")
    hills(canvas, 650, 46, 55, "#2c7464", "#1f5a58")
    bark = ribbon(points("1300,470 1140,500 980,520 840,512 730,528"), 46, 34, 26, 18, 7)
    twigs = ribbon(points("1060,512 990,470 950,420"), 16, 9, 4) + ribbon(points("900,516 850,560 790,590"), 12, 7, 3)
    canvas.fill(bark + twigs, "#8a5f4c", "#5b3a38")
    canvas.fill(shift(bark, 0, 12), "#3a2430", alpha=0.5, blur=5, inside=bark)
    leaves = (
        "948,420,-120,62 962,440,-30,56 985,468,-160,52 1010,480,-50,46 792,590,160,56 812,584,60,46 846,562,100,44 "
        "732,528,170,54 748,524,-140,42 1120,492,-70,56 1180,486,-110,60 1170,510,70,54 1240,480,-60,60 "
        "1090,516,110,48 1250,500,100,56"
    )
    for x, y, angle, size in rows(leaves):
        canvas.fill(blade(x, y, size, size * 0.36, angle), "#9fd07a", "#4f9a5e")
        canvas.fill(ribbon(turn([(x, y), (x + size * 0.85, y)], (x, y), angle), 2, 1), "#3c7f56", alpha=0.6)
    for x, y in ((1046, 486), (1206, 464), (905, 502), (770, 566)):
        for angle in range(0, 360, 72):
            petal = turn(ellipse(x + 11, y, 11, 8), (x, y), angle)
            canvas.fill(petal, "#fff3f2", "#f9b9c0")
        canvas.fill(ellipse(x, y, 5, 5), "#f6c04f")
    return canvas


SKY_BLUES = ("#7cbcf5", "#4a8fe0", "#2f62b4")
WING_BLUES = ("#234a94", "#2f66b8", "#4a92e2", "#86c6f8")


def bird_face(canvas: Canvas, x: float, y: float, body: np.ndarray):
    """Beak, cheek and eye of a head around (x, y) that looks to the left."""
    canvas.fill(smooth(points("-38,-8 -56,-3 -74,8 -38,9", x, y)), "#ffc65c", "#e8952f")
    canvas.fill(smooth(points("-38,7 -68,9 -54,15 -38,17", x, y)), "#d27a2c")
    canvas.fill(ellipse(x - 26, y + 18, 20, 14, -15), "#fff1d8", alpha=0.95, blur=2, inside=body)
    canvas.fill(ellipse(x - 12, y - 6, 11.5, 12.5), WHITE)
    canvas.fill(ellipse(x - 14, y - 5, 8.5, 9.5), "#2a2140")
    canvas.fill(ellipse(x - 17.5, y - 9, 3.2, 3.4), WHITE)


def wing(canvas: Canvas, x: float, y: float, first: float, last: float, length: float, shade: float = 0):
    """Four layers of feathers fanned around the shoulder from one angle to the other, the first ones longest."""
    for layer, colour in enumerate(WING_BLUES):
        count = 9 - layer
        for i in range(count):
            t = i / (count - 1)
            reach = length * (1 - 0.45 * t) * (1, 0.78, 0.56, 0.34)[layer]
            feather = blade(x, y, reach, reach * 0.22 + 8, first + t * (last - first))
            canvas.fill(feather, *WING_BLUES[layer : layer + 2][::-1], colour)
            canvas.fill(feather, "#1d2f6a", alpha=shade)


def bird_on_branch() -> Canvas:
    canvas = morning_hills()
    x, y = 880, 440
    for angle, colour in zip((30, 22, 15), WING_BLUES[:3], strict=True):
        canvas.fill(blade(x + 30, y + 10, 160, 30, angle), colour)
    for dx in (-14, 16):
        canvas.line([(x + dx, y + 44), (x + dx - 2, y + 72)], 6, "#c27a42")
        for toe in (-14, 0, 12):
            canvas.line([(x + dx - 2, y + 70), (x + dx + toe - 2, y + 78)], 5, "#c27a42")
    body = smooth(
        points("-34,-126 -64,-112 -77,-84 -75,-52 -86,-14 -66,34 -12,58 42,46 72,10 58,-30 18,-70 -4,-110", x, y)
    )
    canvas.fill(body, *SKY_BLUES)
    belly = smooth(points("-90,-54 -52,-50 -26,-20 -2,20 40,46 0,74 -70,60 -100,0", x, y))
    canvas.fill(belly, "#ffb070", "#ffa066", "#fff0da", blur=3, inside=body)
    canvas.fill(shift(body, 20, 70), "#5a2f55", alpha=0.3, blur=14, inside=body)
    bird_face(canvas, x - 34, y - 84, body)
    for layer, colour in enumerate(WING_BLUES):
        for i in range(3):
            reach = (158, 122, 88, 56)[layer]
            feather = blade(x - 26, y - 44, reach, 50 - 5 * layer, 28 + 9 * i)
            canvas.fill(feather, *WING_BLUES[layer : layer + 2][::-1], colour)
    return canvas


def bird_in_flight() -> Canvas:
    canvas = morning_hills()
    x, y = 500, 270
    wing(canvas, x - 40, y - 4, -118, -50, 200, shade=0.25)
    for angle, layer in ((28, 0), (4, 0), (22, 1), (10, 1), (16, 2)):
        canvas.fill(blade(x + 70, y + 18, 150, 30, angle), WING_BLUES[layer])
    body = smooth(points("-82,-72 -114,-58 -128,-24 -118,4 -84,36 -20,52 50,46 116,36 78,4 10,-22 -50,-48", x, y))
    canvas.fill(body, *SKY_BLUES)
    belly = smooth(points("-136,2 -104,2 -50,6 30,18 84,36 40,70 -60,70 -120,40", x, y))
    canvas.fill(belly, "#ffb070", "#ffa066", "#fff0da", blur=3, inside=body)
    canvas.fill(shift(body, 10, 62), "#5a2f55", alpha=0.3, blur=10, inside=body)
    for dx in (18, 40):
        canvas.line([(x + dx, y + 46), (x + dx + 26, y + 58), (x + dx + 40, y + 56)], 5, "#c27a42")
    bird_face(canvas, x - 84, y - 24, body)
    wing(canvas, x - 14, y + 6, -86, -12, 230)
    return canvas


HAIR = ("#5a3844", "#3a2230", "#2c1826")
SKIN = ("#ffe3cf", "#fccdb2")
RED = ("#f2545b", "#d93a4d", "#b32a48")
GOLD = ("#ffe08a", "#f0b445")


def girl() -> Canvas:
    canvas = Canvas(480, 640)
    x = 240
    canvas.fill(ellipse(x, 596, 120, 14), "#c9c3d4", alpha=0.7, blur=7)
    for side in (-1, 1):
        bun = ellipse(x + side * 84, 96, 42, 40)
        canvas.fill(bun, *HAIR)
        canvas.fill(ellipse(x + side * 84 - 8, 84, 22, 16, -20), "#8a5a64", alpha=0.6, blur=6, inside=bun)
        canvas.fill(ribbon([(x + side * 84, 124), (x + side * 108, 168), (x + side * 102, 214)], 9, 8, 3), *RED[:2])
        canvas.fill(ribbon([(x + side * 80, 124), (x + side * 94, 160), (x + side * 86, 196)], 9, 8, 3), *RED[1:])
    hair = smooth(points("0,84 62,98 100,146 108,210 92,262 40,280 -40,280 -92,262 -108,210 -100,146 -62,98", x))
    canvas.fill(hair, *HAIR)

    for side in (-1, 1):
        foot = x + side * 34
        canvas.fill(ribbon([(x + side * 32, 480), (x + side * 32, 572)], 32, 28), "#e8a894", *SKIN[::-1])
        canvas.fill(ribbon([(x + side * 32, 556), (x + side * 32, 574)], 32), WHITE, "#efe4ea")
        canvas.fill(smooth(points("-24,572 0,566 24,572 28,590 0,599 -28,590", foot)), *RED)
        canvas.line(points("-19,575 0,571 19,575", foot), 4, GOLD[1])
    left_hand, right_hand = (x - 172, 228), (x + 147, 440)
    for hand, fingers in ((left_hand, (-165, -130, -105, -78, -30)), (right_hand, (30, 62, 90, 118, 160))):
        for angle in fingers:
            canvas.fill(turn(ellipse(hand[0] + 20, hand[1], 14, 6.5), hand, angle), "#f8c3a8", "#f3b196")
        canvas.fill(ellipse(*hand, 20, 20), *SKIN)
    for arm, cuff in (
        (points("-56,308 -114,310 -148,264", x), points("-182,258 -163,241 -138,230", x)),
        (points("56,308 104,346 132,402", x), points("116,432 142,425 164,410", x)),
    ):
        sleeve = ribbon(arm, 46, 48, 56)
        canvas.fill(sleeve, *RED)
        canvas.fill(shift(sleeve, -8, -16), "#ff8a80", alpha=0.35, blur=7, inside=sleeve)
        canvas.fill(ribbon(cuff, 13), *GOLD)

    dress = curves(
        "40,276 72,296 76,360 104,440 140,504 | 140,504 70,524 0,530 -70,524 -140,504 | -140,504 -104,440 -76,360 "
        "-72,296 -40,276",
        x,
    )
    canvas.fill(dress, *RED)
    for dx, lean in ((-60, -34), (4, 4), (66, 38)):
        fold = ribbon([(x + dx * 0.6, 380), (x + dx * 0.9, 450), (x + dx + lean, 530)], 4, 14, 30)
        canvas.fill(fold, "#8a1f42", alpha=0.4, blur=6, inside=dress)
    canvas.fill(shift(dress, 96, 20), "#8a1f42", alpha=0.4, blur=18, inside=dress)
    hem = points("-142,494 -70,513 0,519 70,513 142,494", x)
    canvas.fill(ribbon(hem, 13), *GOLD, inside=dress)
    canvas.fill(ribbon([(hx, hy - 18) for hx, hy in hem], 3), GOLD[0], inside=dress)
    canvas.fill(ribbon(points("-84,366 0,376 84,366", x), 16), *GOLD, inside=dress)
    for dx, fy, r in rows("-70,466,9 0,474,10 70,466,9 -36,424,7 38,424,7 -44,326,6 44,326,6"):
        fx = x + dx
        for angle in range(0, 360, 72):
            canvas.fill(turn(ellipse(fx + r, fy, r * 0.85, r * 0.6), (fx, fy), angle), *GOLD)
        canvas.fill(ellipse(fx, fy, r * 0.4, r * 0.4), RED[1])
    canvas.fill(ellipse(x, 284, 46, 14), "#8a1f42", alpha=0.5, blur=6, inside=dress)
    canvas.fill(ribbon(points("-38,278 0,290 38,278", x), 12), *GOLD)
    for y in (312, 340):
        canvas.line([(x - 16, y), (x + 16, y)], 4, GOLD[0])
        canvas.fill(ellipse(x, y, 5.5, 5.5), *GOLD)

    for side in (-1, 1):
        canvas.fill(ellipse(x + side * 90, 214, 15, 19), *SKIN)
    face = smooth(points("0,106 58,122 88,172 88,222 60,264 0,282 -60,264 -88,222 -88,172 -58,122", x))
    canvas.fill(face, *SKIN)
    fringe = curves(
        "-98,206 -96,140 -52,94 0,86 52,94 96,140 98,206 | 98,206 74,172 52,156 | 52,156 34,170 4,172 | 4,172 "
        "2,160 -8,148 | -8,148 -40,172 -70,174 -98,206",
        x,
    )
    canvas.fill(shift(fringe, 0, 8), "#c0736c", alpha=0.35, blur=5, inside=face)
    canvas.fill(fringe, *HAIR[:2])
    canvas.fill(ribbon(points("-66,132 0,112 66,132", x), 4, 12, 4), "#9a6a70", alpha=0.6, blur=3, inside=fringe)
    for side in (-1, 1):
        ex = x + side * 40
        canvas.fill(ellipse(x + side * 60, 244, 17, 10), "#ff8f86", alpha=0.5, blur=5, inside=face)
        canvas.fill(ellipse(ex, 216, 17, 22), "#2c1826", "#6a3a3c")
        canvas.fill(ellipse(ex, 226, 10, 8), "#b5705a", alpha=0.8, blur=2)
        canvas.fill(ellipse(ex - 5, 207, 6.5, 7.5), WHITE)
        canvas.fill(ellipse(ex + 6, 224, 3, 3.5), WHITE, alpha=0.9)
        lashes = [(ex - side * 13, 199), (ex + side * 3, 193), (ex + side * 17, 200), (ex + side * 23, 198)]
        canvas.fill(ribbon(lashes, 2, 6, 5, 2), HAIR[2])
        canvas.fill(ribbon([(ex - side * 8, 180), (ex + side * 6, 179), (ex + side * 18, 185)], 3, 4.5, 2), HAIR[1])
        canvas.fill(ellipse(x + side * 84, 128, 22, 12, side * 35), *RED[:2])
    canvas.fill(ellipse(x, 238, 4, 2.6), "#eea088")
    canvas.fill(smooth(points("-17,250 0,254 17,250 10,263 0,268 -10,263", x)), "#b83a4a", "#e8707a")
    return canvas


GREENS = ("#a8ec6a", "#62cc4c", "#2f9a48")


def tube(canvas: Canvas, path: np.ndarray, *widths: float) -> list[np.ndarray]:
    """A stretch of the snake, lit from the upper left."""
    shape, w = ribbon(path, *widths), max(widths)
    canvas.fill(shape, GREENS[2])
    canvas.fill(shift(shape, -0.1 * w, -0.16 * w), GREENS[1], blur=0.09 * w, inside=shape)
    light = ribbon(shift(path[1:-1], -0.1 * w, -0.22 * w), *(v * 0.25 for v in widths))
    canvas.fill(light, GREENS[0], alpha=0.8, blur=0.07 * w, inside=shape)
    return shape


def snake() -> Canvas:
    canvas = Canvas(480, 640)
    x = 240
    canvas.fill(ellipse(x + 6, 590, 205, 22), "#bfc9c4", alpha=0.7, blur=8)
    tube(canvas, points("350,560 410,566 444,528 428,478 446,452"), 56, 48, 36, 22, 6)
    low, high = (x, 530, 140, 36), (x, 472, 96, 26)
    for ring, width in ((low, 74), (high, 66)):
        tube(canvas, ellipse(*ring, start=180, end=360)[::6], width)
    shape = tube(canvas, points("20,480 66,400 50,330 -4,270 0,170", x), 78, 78, 74, 70, 66)
    plates = points("4,480 50,400 37,336 -14,276 -8,170", x)
    belly = ribbon(plates, 46, 44, 42, 40, 40)
    canvas.fill(belly, "#fff6c4", "#f3dc86", inside=shape)
    path = smooth(plates, closed=False)
    for (px, py), (dx, dy) in list(zip(path, np.gradient(path, axis=0), strict=True))[4::4]:
        tilt = np.degrees(np.arctan2(dy, dx))
        edge = ribbon(turn(points("0,-26 6,0 0,26", px, py), (px, py), tilt), 2.4)
        canvas.fill(edge, "#d9b75c", alpha=0.8, inside=belly)
    canvas.fill(ellipse(x, 218, 60, 26), "#1f6a3c", alpha=0.5, blur=9, inside=shape)
    for ring, width in ((low, 74), (high, 66)):
        front = ellipse(*ring, start=0, end=180)[::6]
        shape = tube(canvas, front, width)
        for i, (px, py) in enumerate(ellipse(*ring, start=25, end=155)[::14]):
            canvas.fill(ellipse(px, py - 10 + 4 * (i % 2), 13, 9), "#2f9a48", alpha=0.55, inside=shape)
    head = smooth(points("0,78 58,84 96,124 104,168 66,206 0,216 -66,206 -104,168 -96,124 -58,84", x))
    bulges = [ellipse(x + side * 50, 96, 43, 44) for side in (-1, 1)]
    canvas.fill([head, *bulges], *GREENS)
    canvas.fill(shift(head, -14, -20), GREENS[0], alpha=0.45, blur=16, inside=head)
    canvas.fill(ellipse(x, 186, 70, 26), "#d6f5a0", alpha=0.55, blur=9, inside=head)
    for side in (-1, 1):
        ex = x + side * 50
        canvas.fill(ellipse(ex, 98, 33, 36), WHITE, "#e6f2ee")
        canvas.fill(ellipse(ex - side * 5, 102, 22, 26), "#1d2b3a", "#2f5a54")
        canvas.fill(ellipse(ex - side * 5, 116, 13, 9), "#7fd0a0", alpha=0.7, blur=2.5)
        canvas.fill(ellipse(ex - side * 5 - 7, 91, 8, 9), WHITE)
        canvas.fill(ellipse(ex - side * 5 + 8, 112, 3.6, 4), WHITE, alpha=0.9)
        canvas.fill(ellipse(x + side * 76, 166, 17, 10), "#ff9f8c", alpha=0.6, blur=4, inside=head)
        canvas.fill(ellipse(x + side * 11, 154, 3.4, 4.6, side * 20), "#1f7a40")
    for side in (-1, 1):
        fork = [(x + 8, 190), (x + 10, 216), (x + 10 + side * 4, 226), (x + 10 + side * 11, 235)]
        canvas.fill(ribbon(fork, 9, 8, 6, 3), "#ee5a64", "#d43d55")
    canvas.fill(ribbon(points("-60,172 -32,189 0,193 32,189 60,172", x), 3, 5, 5, 5, 3), "#1f6a3c")
    return canvas


PICTURES = {
    "wan_i2v.png": boat_at_sunset,
    "wan_i2v_2.png": lighthouse,
    "i2v_input.JPG": cat_on_surfboard,
    "flf2v_input_first_frame.png": bird_on_branch,
    "flf2v_input_last_frame.png": bird_in_flight,
    "girl.png": girl,
    "snake.png": snake,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples"), help="folder for the pictures")
    args = parser.parse_args()

    for name, draw in PICTURES.items():
        path = args.out / name
        draw().finish().save(path, optimize=True, quality=86)
        print(f"{path}  {path.stat().st_size / 1000:.0f} KB")
    triangle = first_frame(Caption("purple", "triangle", "right", "yellow"), seed=1)
    Image.fromarray(to_uint8(triangle.permute(1, 2, 0))).save(args.out / "i2v_tiny_input.png")


if __name__ == "__main__":
    main()
