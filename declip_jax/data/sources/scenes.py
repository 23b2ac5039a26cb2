"""Captioned scenes drawn on the fly: a data set that needs no download.

Every scene shows one coloured shape, and every caption names both, among details and distractors like those of captions
from the web. A scene is a pure function of its split and index, so the source has random access, is practically endless
and pickles to a few bytes. Three tenths of the pairs of colour and shape occur only in `heldout`: zero-shot accuracy
there measures whether the words were learnt separately, like CLEVR's compositional split (Johnson et al. 2017, CoGenT).

Captions never mention left or right, so they remain true after horizontal flips.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
import math
from typing import NamedTuple

import cv2
import numpy as np

from declip_jax.data.sources.base import Example, Named
from declip_jax.data.storage import indexes

_OVERSAMPLING = 2  # masks are drawn this much larger and then averaged
_MAX_TILT = math.radians(20)


class _Color(NamedTuple):
  rgb: tuple[int, int, int]
  synonyms: tuple[str, ...]


class _Shape(NamedTuple):
  contours: tuple[np.ndarray, ...]  # float [n 2] each, x right and y down, filled by the even-odd rule
  synonyms: tuple[str, ...]


def _arc(start: float, stop: float, radius: float = 1.0, x: float = 0.0) -> np.ndarray:
  """Points of the arc around (x, 0) between two angles in degrees."""
  angle = np.radians(np.linspace(start, stop, 40))
  return np.stack([x + radius * np.cos(angle), radius * np.sin(angle)], 1)


def _star() -> np.ndarray:
  angle = np.pi * np.arange(10) / 5
  radius = np.where(np.arange(10) % 2, 0.42, 1.0)
  return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


def _heart() -> np.ndarray:
  t = np.linspace(0, 2 * np.pi, 48)
  return np.stack([16 * np.sin(t) ** 3, 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)], 1)


def _polygon(*points: tuple[float, float]) -> tuple[np.ndarray]:
  return (np.array(points, float),)


# Far enough apart to survive 32 pixels and the usual colour jitter: hence brown but not orange, and no grey.
COLORS = {
  "red": _Color((222, 32, 36), ("crimson", "scarlet")),
  "yellow": _Color((250, 216, 40), ("golden", "lemon")),
  "green": _Color((36, 150, 56), ("emerald",)),
  "cyan": _Color((52, 214, 220), ("turquoise", "aqua")),
  "blue": _Color((36, 66, 222), ("cobalt", "sapphire")),
  "purple": _Color((132, 36, 168), ("violet",)),
  "pink": _Color((255, 128, 192), ("rose",)),
  "brown": _Color((124, 72, 30), ("chestnut", "chocolate")),
  "white": _Color((248, 248, 248), ("snowy", "ivory")),
  "black": _Color((14, 14, 16), ("ebony", "inky")),
}

_ARM = 0.34  # half the width of the arms of the cross
SHAPES = {
  "circle": _Shape((_arc(0, 360),), ("disc", "disk")),
  "square": _Shape(_polygon((-1, -1), (1, -1), (1, 1), (-1, 1)), ("box",)),
  "triangle": _Shape(_polygon((0, -1), (1.15, 1), (-1.15, 1)), ("pyramid",)),
  "star": _Shape((_star(),), ("pentagram",)),
  "cross": _Shape(
    _polygon(
      *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
      *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ),
    ("plus sign",),
  ),
  "heart": _Shape((_heart(),), ("valentine",)),
  "ring": _Shape((_arc(0, 360), _arc(0, 360, 0.56)), ("hoop", "donut")),
  "crescent": _Shape((np.concatenate([_arc(50, 310), _arc(284, 76, 0.79, 0.45)]),), ("moon",)),
  "arrow": _Shape(
    _polygon((0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)), ("pointer",)
  ),
  "bolt": _Shape(
    _polygon((0.5, -1), (-0.1, -1), (-0.6, 0.2), (-0.1, 0.2), (-0.4, 1), (0.65, -0.3), (0.1, -0.3)), ("lightning",)
  ),
}

# Prompts for zero-shot classification, worded like captions: without the customary full stop.
TEMPLATES = (
  "a {}",
  "a photo of a {}",
  "this is a {}",
  "a picture showing a {} in the middle",
  "a {} on a plain background",
)

# Colours and shapes form a Latin square of which three symbols are held out: in training every colour lacks three
# shapes and every shape lacks three colours.
_PAIRS = tuple((color, shape, (3 * i + j) % 10 < 3) for i, color in enumerate(COLORS) for j, shape in enumerate(SHAPES))
SEEN = tuple((color, shape) for color, shape, held_out in _PAIRS if not held_out)
HELD_OUT = tuple((color, shape) for color, shape, held_out in _PAIRS if held_out)

# split: (pairs of colour and shape, default number of scenes). The order determines the seeds: only append.
_SPLITS = {"train": (SEEN, 100_000), "test": (SEEN, 5_000), "heldout": (HELD_OUT, 3_000)}

_REPEATS = 2.5  # periods of a texture across an object
_TEXTURES = ("solid", "striped", "dotted", "checkered", "outlined")
_EXTENTS = {"small": (0.6, 0.68), "medium": (0.73, 0.81), "large": (0.86, 0.94)}  # longer side, as a share of the image
_FINISHES = ("plain", "shaded", "grainy")
_BACKGROUNDS = {
  "grey": (128, 128, 128),
  "beige": (226, 206, 168),
  "charcoal": (52, 52, 58),
  "navy": (24, 30, 74),
  "olive": (104, 108, 60),
  "lavender": (204, 194, 230),
  "mint": (190, 226, 202),
  "slate": (90, 108, 126),
}
_TONE_JITTER = 6
_MIN_CONTRAST = (120, 70)  # distance in RGB from the background to the first and second tone of an object


def _tones(color: str) -> np.ndarray:
  """The colour itself and the second tone of its textures: darker, for black lighter; float [2 3]."""
  rgb = np.array(COLORS[color].rgb, float)
  return np.stack([rgb, rgb + 80 if color == "black" else 0.66 * rgb])


_VISIBLE_ON = {
  color: tuple(
    name for name, rgb in _BACKGROUNDS.items() if (np.linalg.norm(_tones(color) - rgb, axis=1) > _MIN_CONTRAST).all()
  )
  for color in COLORS
}

# A caption may name the row of a 3 x 3 grid, and whether the object is at a side, but not at which.
_PLACES = (
  (("at the top", "near the top edge"), ("in an upper corner", "in a top corner")),
  (("in the middle", "in the centre"), ("at one side", "off to one side")),
  (("at the bottom", "near the bottom"), ("in a lower corner", "in a bottom corner")),
)
_BACKDROPS = ("on {ground} background", "against {ground} backdrop", "over {ground} wall")
_SENTENCES = (
  "{object} {place}",
  "{object} {backdrop}",
  "{object} {place} {backdrop}",
  "{place}, {object}",
  "{backdrop}, {object}",
  "a photo of {object}",
  "a picture showing {object} {place}",
  "this is {object}",
  "there is {object} {place}",
  "{outline} in {color} {place}",
  "{outline}, {color}, {backdrop}",
  "the color of this {shape} is {color}",
  "{object}",
  "a picture of {object}",
  "{outline} in {color}",
  "look at this {shape}, it is {color}",
)
_DISTRACTORS = (
  "{caption}, for sale, see description",
  "{caption}, taken on a tuesday",
  "{caption} - free shipping",
  "{caption} #art #daily",
  "{caption} (stock image)",
  "photo {number} of 30: {caption}",
  "img_{number} {caption}",
  "new! {caption}",
)
_CANONICAL = 0.75  # share of captions with the class's own word rather than a synonym
# Share of captions that mention size, texture, finish; with more, scenes could be distinguished without their shape.
_DETAILED = 0.3
_DISTRACTED = 0.3


class _Scene(NamedTuple):
  """The contents of an image; lengths are shares of its side, angles in radians."""

  label: int
  color: str
  shape: str
  texture: str
  size: str
  row: int
  column: int
  background: str
  finish: str
  extent: float
  center: tuple[float, float]
  tilt: float
  mirrored: bool


class Scenes(Named):
  """Random access to the scenes of one split; see `open_scenes`.

  Attributes:
    name: the full spec that opens the same scenes.
    classnames: names of the classes, such as "red circle"; only the pairs of this split.
  """

  def __init__(self, split: str, size: int, pixels: int = 64):
    self.split, self.size, self.pixels = split, size, pixels
    super().__init__(f"scenes:{split}/{size}/{pixels}")

  @property
  def classnames(self) -> tuple[str, ...]:
    return tuple(f"{color} {shape}" for color, shape in _SPLITS[self.split][0])

  @cached_property
  def stamp(self) -> str:
    """Changes with the images or captions, as with another version of OpenCV; depends on three scenes."""
    examples = [self[index] for index in sorted({0, self.size // 2, self.size - 1})]
    return indexes.digest([[example["image"].tolist(), example["captions"]] for example in examples])

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Example:
    """Draws one scene: `image` uint8 [pixels pixels 3], two or three `captions`, `label` and `id`.

    Raises:
      IndexError: the index is not in [-len, len).
    """
    if not -self.size <= index < self.size:
      raise IndexError(f"{self.name} has scenes 0 to {self.size - 1}, not {index}")
    index = int(index) % self.size
    rng = np.random.Generator(np.random.Philox(key=[list(_SPLITS).index(self.split), index]))
    scene = _compose(_SPLITS[self.split][0], rng)
    captions = _describe(scene, rng)  # before the image, whose use of `rng` depends on `pixels`
    return {
      "image": _draw(scene, self.pixels, rng),
      "captions": captions,
      "label": scene.label,
      "id": f"scenes/{self.split}:{index}",
    }


def open_scenes(location: str) -> Scenes:
  """Opens the scenes at "split", "split/count" or "split/count/pixels", such as "train/200000/48".

  Scene i of a split shows the same thing for every count and at every resolution.

  Args:
    location: the split is "train", "test" (other scenes with the same pairs of colour and shape) or "heldout" (the
      pairs that "train" and "test" never show); count is the number of scenes; pixels is the side of an image, 64 by
      default and at least 16.

  Raises:
    ValueError: unknown split, or count or pixels out of range.
  """
  split, *numbers = location.split("/")
  if split not in _SPLITS:
    raise ValueError(f"scenes: no split {split!r} in location {location!r}; choose one of {', '.join(_SPLITS)}")
  if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
    raise ValueError(f"scenes: location {location!r} should be split, split/count or split/count/pixels")
  size, pixels = [int(number) for number in numbers] + [_SPLITS[split][1], 64][len(numbers) :]
  if size < 1 or pixels < 16:
    raise ValueError(f"scenes: location {location!r} needs a count of at least 1 and at least 16 pixels")
  return Scenes(split, size, pixels)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
  return options[int(rng.integers(len(options)))]


def _compose(pairs: tuple[tuple[str, str], ...], rng: np.random.Generator) -> _Scene:
  """Draws the contents of a scene."""
  label = int(rng.integers(len(pairs)))
  color, shape = pairs[label]
  size = _pick(tuple(_EXTENTS), rng)
  extent = rng.uniform(*_EXTENTS[size])
  row, column = int(rng.integers(3)), int(rng.integers(3))
  across, down = (extent / 2 + (1 - extent) * (cell + rng.random()) / 3 for cell in (column, row))
  return _Scene(
    label=label,
    color=color,
    shape=shape,
    texture=_pick(_TEXTURES, rng),
    size=size,
    row=row,
    column=column,
    background=_pick(_VISIBLE_ON[color], rng),
    finish=_pick(_FINISHES, rng),
    extent=extent,
    center=(across, down),
    tilt=rng.uniform(-_MAX_TILT, _MAX_TILT),
    mirrored=bool(rng.random() < 0.5),
  )


def _describe(scene: _Scene, rng: np.random.Generator) -> tuple[str, ...]:
  """Two or three captions, each with another sentence."""
  sentences = rng.choice(len(_SENTENCES), size=int(rng.integers(2, 4)), replace=False)
  return tuple(_caption(scene, _SENTENCES[i], rng) for i in sentences)


def _caption(scene: _Scene, sentence: str, rng: np.random.Generator) -> str:
  color = _word(scene.color, COLORS[scene.color].synonyms, rng)
  shape = _word(scene.shape, SHAPES[scene.shape].synonyms, rng)
  size, texture, finish = (
    f"{detail} " if rng.random() < _DETAILED else "" for detail in (scene.size, scene.texture, scene.finish)
  )
  caption = sentence.format(
    object=_with_article(f"{size}{texture}{color} {shape}"),
    outline=_with_article(f"{size}{texture}{shape}"),
    color=color,
    shape=shape,
    place=_pick(_PLACES[scene.row][scene.column != 1], rng),
    backdrop=_pick(_BACKDROPS, rng).format(ground=_with_article(f"{finish}{scene.background}")),
  )
  if rng.random() < _DISTRACTED:
    return _pick(_DISTRACTORS, rng).format(caption=caption, number=int(rng.integers(1, 31)))
  return caption


def _word(name: str, synonyms: tuple[str, ...], rng: np.random.Generator) -> str:
  return name if rng.random() < _CANONICAL else _pick(synonyms, rng)


def _with_article(noun: str) -> str:
  return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _draw(scene: _Scene, pixels: int, rng: np.random.Generator) -> np.ndarray:
  """Renders a scene as uint8 [pixels pixels 3]: every pixel mixes three tones and a grey light."""
  tones = np.array([_BACKGROUNDS[scene.background], *_tones(scene.color)]) + rng.normal(0, _TONE_JITTER, (3, 1))
  tones = np.concatenate([tones, np.ones((1, 3))]).astype(np.float32)
  contours = _place(scene)
  inside = _mask(pixels, lambda canvas: cv2.fillPoly(canvas, _scaled(contours, canvas), 255, cv2.LINE_AA))
  second = inside * _texture(scene, contours, pixels)
  outside = 1 - inside
  shares = np.stack([outside, inside - second, second, outside * _light(scene, pixels, rng)])
  image = shares.reshape(4, -1).T @ tones
  return np.clip(image, 0, 255, out=image).astype(np.uint8).reshape(pixels, pixels, 3)


def _place(scene: _Scene) -> list[np.ndarray]:
  """Tilts the shape's contours, then scales and moves them so that their longer side is exactly `extent`."""
  cos, sin = math.cos(scene.tilt), math.sin(scene.tilt)
  turn = np.array([[cos, sin], [-sin, cos]]) * [[-1 if scene.mirrored else 1], [1]]
  contours = [contour @ turn for contour in SHAPES[scene.shape].contours]
  low, high = contours[0].min(0), contours[0].max(0)
  scale = scene.extent / (high - low).max()
  return [(contour - (low + high) / 2) * scale + scene.center for contour in contours]


def _mask(pixels: int, draw: Callable[[np.ndarray], object]) -> np.ndarray:
  """Anti-aliased mask, float32 [pixels pixels] in [0, 1], of what `draw` paints with 255 on a larger canvas."""
  canvas = np.zeros((pixels * _OVERSAMPLING, pixels * _OVERSAMPLING), np.uint8)
  draw(canvas)
  return cv2.resize(canvas, (pixels, pixels), interpolation=cv2.INTER_AREA) * np.float32(1 / 255)


def _scaled(contours: Sequence[np.ndarray], canvas: np.ndarray) -> list[np.ndarray]:
  return [(contour * len(canvas)).astype(np.int32) for contour in contours]


def _texture(scene: _Scene, contours: list[np.ndarray], pixels: int) -> np.ndarray:
  """Share of the second tone, float32, broadcastable to [pixels pixels]."""
  if scene.texture == "solid":
    return np.zeros((1, 1), np.float32)
  if scene.texture == "outlined":  # half of the line is outside the object and invisible
    width = round(0.1 * scene.extent * pixels * _OVERSAMPLING)
    return _mask(pixels, lambda canvas: cv2.polylines(canvas, _scaled(contours, canvas), True, 255, width, cv2.LINE_AA))
  return _pattern(scene, pixels)


def _pattern(scene: _Scene, pixels: int) -> np.ndarray:
  """Stripes, dots or checks that rotate with the object, equally many for every size, with edges one pixel wide."""
  frequency = 2 * math.pi * _REPEATS / scene.extent
  x, y = (((np.arange(pixels) + 0.5) / pixels - c) * frequency for c in scene.center)
  x, y = x.astype(np.float32), y.astype(np.float32)[:, None]
  cos, sin = math.cos(scene.tilt), math.sin(scene.tilt)
  down = np.cos(cos * y - sin * x)
  if scene.texture == "striped":
    wave = down - np.float32(0.3)  # the first tone, which captions name, has wider stripes
  elif scene.texture == "checkered":
    wave = down * np.cos(cos * x + sin * y)
  else:
    wave = down + np.cos(cos * x + sin * y) - np.float32(0.7)
  return np.clip(0.5 + wave * np.float32(pixels / frequency), 0, 1)


def _light(scene: _Scene, pixels: int, rng: np.random.Generator) -> np.ndarray:
  """The light that the background's finish and up to three faint strokes add, float32 [pixels pixels]."""
  strokes = [rng.random((1, 2)) + [[0, 0], rng.uniform(-0.12, 0.12, 2)] for _ in range(rng.integers(4))]
  width = round(0.03 * pixels * _OVERSAMPLING)
  light = 24 * _mask(
    pixels, lambda canvas: cv2.polylines(canvas, _scaled(strokes, canvas), False, 255, width, cv2.LINE_AA)
  )
  if scene.finish == "shaded":
    light += np.linspace(-24, 24, pixels, dtype=np.float32)[:, None]
  elif scene.finish == "grainy":
    light += 14 * rng.standard_normal((pixels, pixels), dtype=np.float32)
  return light
