"""Frames of a demo scene, drawn with numpy.

Legend: T frames, H/W pixels. Colours are RGB in 0…255. Objects are mirror-symmetric, so that the direction of motion
can only be told from several frames.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlmcap.demo.grammar import Scene

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIZE = 128  # pixels a side of a frame
NUM_FRAMES = 16
FPS = 8
_MARGIN = 64  # the background is larger than the frame by this much, for the camera to move in
_HORIZON = 0.52  # share of the height, from the top

_SKY = {  # top, bottom, light on the ground
    "아침": ((150, 190, 230), (250, 205, 190), 0.85),  # morning
    "한낮": ((70, 150, 240), (185, 225, 255), 1.0),  # noon
    "해 질 녘": ((120, 60, 110), (250, 130, 40), 0.6),  # dusk
    "한밤": ((8, 10, 35), (30, 35, 80), 0.45),  # midnight
}
_DARK, _WHITE, _GLOW, _PINK, _CYAN = (25, 25, 25), (245, 245, 245), (255, 185, 110), (240, 90, 200), (120, 240, 235)
_COLOUR = {
    "빨간": (225, 25, 25),  # red
    "파란": (25, 60, 230),  # blue
    "노란": (250, 220, 20),  # yellow
    "하얀": (250, 250, 250),  # white
    "초록": (20, 170, 50),  # green
}


def _grid(size: int) -> tuple[Image, Image]:
    """Returns row and column coordinates in 0…1, each (size, size)."""
    axis = np.linspace(0, 1, size, dtype=np.float32)
    return np.broadcast_to(axis[:, None], (size, size)), np.broadcast_to(axis[None, :], (size, size))


def _sky(scene: Scene, size: int, rng: np.random.Generator) -> Image:
    top, bottom, light = _SKY[scene.time]
    y, x = _grid(size)
    mix = np.clip(y / _HORIZON, 0, 1)[..., None]
    sky = np.asarray(top, np.float32) * (1 - mix) + np.asarray(bottom, np.float32) * mix
    if scene.time == "한밤" and scene.weather == "맑음":
        sky[rng.random((size, size)) < 0.006] = 230  # stars
    if scene.weather == "맑음":  # a sun or a moon
        cx, cy = rng.uniform(0.3, 0.7), rng.uniform(0.22, 0.3)
        disc = (x - cx) ** 2 + (y - cy) ** 2 < 0.06**2
        sky[disc] = (240, 240, 220) if scene.time == "한밤" else (255, 245, 170)
    else:
        grey = np.float32(150 * light + 20)  # of clouds, darker with less light
        sky = sky * 0.45 + grey * 0.55
    if scene.weather == "흐림":
        for _ in range(14):
            cx, cy, w, h = rng.uniform(0, 1), rng.uniform(0, 0.3), rng.uniform(0.1, 0.2), rng.uniform(0.04, 0.08)
            cloud = ((x - cx) / w) ** 2 + ((y - cy) / h) ** 2 < 1
            sky[cloud] = sky[cloud] * 0.3 + 0.7 * rng.uniform(70, 110) * (0.4 + 0.6 * light)
    return np.asarray(sky, np.float32)


def _ground(scene: Scene, size: int, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Colours of the ground in daylight and where it covers the sky."""
    y, x = _grid(size)
    image = np.zeros((size, size, 3), np.float32)
    below = y > _HORIZON
    phase = rng.uniform(0, 6.28)
    if scene.place == "바다":  # sea: waves and islets
        image[:] = (20, 85, 150)
        image[np.sin(y * 90 + 2 * np.sin(x * 12 + phase)) > 0.75] = (150, 200, 225)
        islets = _landmarks(lambda u, v: (u / 0.09) ** 2 + (v / 0.1) ** 2 < 1, x, y - _HORIZON, rng) & (
            y < _HORIZON + 0.02
        )
        image[islets] = (110, 95, 80)
        return image, below | islets
    if scene.place == "산자락":  # hillside: a snowy ridge and pines
        ridge = np.minimum(
            *(np.abs(x - cx) * rng.uniform(0.9, 1.3) + 0.3 for cx in (rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9)))
        )
        image[:] = (60, 95, 60)
        image[y < ridge + 0.1] = (215, 215, 220)
        image[y > 0.75] = (45, 75, 40)
        pines = _landmarks(lambda u, v: (np.abs(u) < 0.35 * (v + 0.24)) & (v < 0), x, y - 0.76, rng)
        image[pines] = (20, 45, 30)
        return image, (y > ridge) | pines
    if scene.place == "도심":  # city: houses with windows over a street
        width = size // 9
        height = np.repeat(rng.uniform(0.22, 0.5, 12), width)[:size]
        shade = np.repeat(rng.uniform(90, 150, 12), width)[:size]
        image[:] = shade[None, :, None]
        window = ((np.arange(size) % width)[None, :] % 6 > 2) & ((np.arange(size) % 8)[:, None] > 3)
        image[window & (y < 0.85)] = (245, 225, 130)
        image[y > 0.85] = (70, 70, 75)
        return image, y > height[None, :]
    if scene.place == "강변":  # riverside: a winding river in grass
        image[:] = (85, 150, 65)
        centre = 0.5 + 0.18 * np.sin(y * 9 + phase)
        image[np.abs(x - centre) < 0.06 + 0.3 * (y - _HORIZON)] = (60, 140, 205)
        return image, below
    if scene.place == "궁궐":  # palace: red columns under a roof
        image[:] = (190, 170, 135)
        wall = (np.abs(x - 0.5) < 0.36) & (y < 0.8)
        image[wall] = (220, 205, 180)
        image[wall & (np.sin(x * 55) > 0.6)] = (165, 40, 30)
        eave = 0.42 - 0.5 * np.maximum(np.abs(x - 0.5) - 0.2, 0) ** 1.2
        roof = (np.abs(x - 0.5) < 0.44) & (y > eave - 0.13) & (y < eave + 0.08)
        image[roof] = (45, 60, 65)
        return image, (y > 0.72) | roof | (wall & (y > 0.42))
    image[:] = (205, 185, 70)  # field: furrows and trees
    image[np.sin((x - 0.5) / (y - _HORIZON + 0.12) * 14 + phase) > 0.3] = (130, 160, 50)
    trees = _landmarks(
        lambda u, v: (u**2 + (v + 0.08) ** 2 < 0.07**2) | ((np.abs(u) < 0.015) & (np.abs(v) < 0.03)),
        x,
        y - _HORIZON,
        rng,
    )
    image[trees] = (40, 75, 35)
    return image, below | trees


def _landmarks(shape: Callable[[Image, Image], Mask], x: Image, y: Image, rng: np.random.Generator) -> Mask:
    """Returns the mask of two objects of a shape; without them waves and slopes look the same when the camera pans."""
    left, right = rng.uniform(0.22, 0.42), rng.uniform(0.58, 0.78)
    return shape(x - left, y) | shape(x - right, y)


def _background(scene: Scene, rng: np.random.Generator) -> Image:
    size = SIZE + _MARGIN
    image = _sky(scene, size, rng)
    ground, covered = _ground(scene, size, rng)
    light = _SKY[scene.time][2] * (1.0 if scene.weather == "맑음" else 0.8)
    # The ground takes 8 % of the colour at the horizon.
    image[covered] = ground[covered] * light + (np.asarray(_SKY[scene.time][1], np.float32) * 0.08)
    if scene.weather == "눈":
        image[covered] = image[covered] * 0.65 + 0.35 * 235 * light
    return image


def _camera(background: Image, scene: Scene, t: float, pan: int) -> Image:
    """Returns the frame that the camera sees at time `t` in 0…1; `pan` is +1 or -1."""
    total = background.shape[0]
    crop, left, top = float(SIZE), _MARGIN / 2, _MARGIN / 2  # the middle of the background
    if scene.camera == "이동":  # pan
        left = _MARGIN * (t if pan > 0 else 1 - t)
    if scene.camera == "확대":  # zoom
        crop = total - (total - 80) * t  # from the whole background to 80 pixels of it
        left = top = (total - crop) / 2
    # Nearest neighbours are enough for flat colours.
    steps = np.arange(SIZE, dtype=np.float32) / SIZE * crop
    rows = np.clip(top + steps, 0, total - 1).astype(np.int64)
    columns = np.clip(left + steps, 0, total - 1).astype(np.int64)
    return background[rows[:, None], columns[None, :]].copy()


def _object_layers(name: str, u: Image, v: Image) -> list[tuple[Mask, tuple[int, int, int] | None]]:
    """Masks of an object's parts, from back to front, with their colours; None is the colour that the caption names.

    Coordinates run from -1 to 1 around the centre, u to the right and v down; every mask is its own mirror image.
    """
    across, down = np.abs(u), np.abs(v)
    if name == "풍선":  # balloon
        return [((across < 0.06) & (v > 0.3) & (v < 1.4), _DARK), (u**2 + (v + 0.25) ** 2 < 0.75, None)]
    if name == "방패연":  # kite
        inner = (across < 0.62) & (down < 0.62)
        tails = (np.abs(across - 0.5) < 0.14) & (v > 0.8) & (v < 1.7)
        return [
            (tails, _PINK),
            ((across < 0.9) & (down < 0.9), _WHITE),
            (inner, None),
            (inner & (np.abs(across - down) < 0.14), _DARK),
        ]
    if name == "갈매기":  # gull
        wings = (np.abs(v - 0.1 + (0.6 - 1.2 * np.abs(across - 0.6))) < 0.27) & (across < 1.25)
        return [(wings, None), (wings & (across > 0.85), _DARK)]
    if name == "드론":  # drone
        body = (np.abs(0.9 * across - down) < 0.2) & (across < 0.8) | (across < 0.45) & (down < 0.35)
        beam = (v > 0.3) & (v < 1.5) & (across < 0.15 + 0.4 * v)
        return [(beam, _CYAN), (body, _DARK), ((across - 0.72) ** 2 + (down - 0.66) ** 2 < 0.1, None)]
    shell = (across < 0.55) & (down < 0.75)  # paper lantern
    return [(u**2 + v**2 < 1.5, _GLOW), (shell, None), ((across < 0.3) & (down < 0.95) & (down > 0.7), _DARK)]


def _draw_object(frame: Image, scene: Scene, cx: float, cy: float, radius: float) -> None:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    u, v = (x - cx) / radius, (y - cy) / radius
    # A first pass in dark, larger by 1 / 0.9; the second covers all but its rim.
    for mask, colour in _object_layers(scene.object, u * 0.9, v * 0.9):
        if colour is None:
            frame[mask] = _DARK  # a dark outline, so that no sky swallows the colour
    for mask, colour in _object_layers(scene.object, u, v):
        frame[mask] = _COLOUR[scene.colour] if colour is None else colour


def _fall(frame: Image, scene: Scene, drops: NDArray[np.float64], step: int) -> None:
    """Draws rain or snow; `drops` (N, 2) are positions in 0…1 that wrap around."""
    if scene.weather == "비":  # rain
        x0, y0 = drops[:, 0] * SIZE, (drops[:, 1] + 0.11 * step) % 1 * SIZE
        for k in range(9):  # streaks of nine pixels, slightly slanted
            frame[((y0 + k) % SIZE).astype(int), ((x0 - k * 0.35) % SIZE).astype(int)] = (175, 195, 225)
    if scene.weather == "눈":  # snow
        # snow drifts sideways and falls more slowly
        x0, y0 = (drops[:, 0] + 0.01 * step) % 1 * SIZE, (drops[:, 1] + 0.03 * step) % 1 * SIZE
        for dy in range(3):
            for dx in range(3):
                frame[((y0 + dy) % SIZE).astype(int), ((x0 + dx) % SIZE).astype(int)] = (250, 250, 255)


def render(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Renders the clip of a scene, uint8 (T, H, W, 3): `NUM_FRAMES` frames of `SIZE` × `SIZE`."""
    rng = np.random.default_rng(seed)
    background = _background(scene, rng)
    drops = rng.random((70, 2))
    pan = int(rng.choice((-1, 1)))
    start, end = rng.uniform(0.15, 0.28), rng.uniform(0.72, 0.85)
    if scene.direction == "왼쪽":  # towards the left
        start, end = end, start
    height, wobble, radius = rng.uniform(0.25, 0.6), rng.uniform(-0.06, 0.06), rng.uniform(20, 24)
    frames = np.empty((NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    for step in range(NUM_FRAMES):
        t = step / (NUM_FRAMES - 1)
        frame = _camera(background, scene, t, pan)
        _draw_object(
            frame, scene, (start + (end - start) * t) * SIZE, (height + wobble * np.sin(6.28 * t)) * SIZE, radius
        )
        _fall(frame, scene, drops, step)
        frames[step] = np.clip(frame, 0, 255)
    return frames
