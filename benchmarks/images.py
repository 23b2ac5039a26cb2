"""What each image operation costs in the two engines of `declip_jax.data.images`, and how far apart their results are.

  python benchmarks/images.py [--image photo.jpg] [--size 224] [--seconds 1]

The engine "exact" is Pillow throughout and costs what torchvision's transforms on Pillow images do, within a few per
cent; `benchmarks/input.py` measures torchvision itself. Both sides are given the same draws, take turns, and are
measured in CPU time of one thread, so that other work on the machine disturbs them little. Differences are in levels of
255: the mean over views and pixels, the mean of the worst view, the greatest of all.
"""

import argparse
from collections.abc import Callable
from functools import partial
import pathlib
import time

import cv2
import numpy as np

from declip_jax.data import images
from declip_jax.data.images import geometry
from declip_jax.data.recipes import RECIPES

Work = Callable[[np.random.Generator], np.ndarray]


def synthetic_photo(height: int, width: int, rng: np.random.Generator) -> bytes:
  """A JPEG of quality 90 with detail at all scales, with about as many bytes per pixel as a photo."""
  octaves = [rng.normal(size=(2**i, 2**i, 3)) / 2 ** (0.9 * i) for i in range(1, 9)]
  pixels = sum(cv2.resize(octave, (width, height), interpolation=cv2.INTER_CUBIC) for octave in octaves)
  grain = 6 * rng.normal(size=(height, width, 1))
  pixels = np.clip(128 + 90 * pixels + grain, 0, 255).astype(np.uint8)
  return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def operations(data: bytes, size: int, engine: images.EngineName) -> dict[str, Work]:
  """The rows of the table, each from a generator to pixels: single operations, then whole examples from bytes on."""
  do, pixels = images.ENGINES[engine], images.decode(data)
  height, width, _ = pixels.shape
  view = images.eval_view(pixels, images.EvalView(size))

  def crop(rng: np.random.Generator, interpolation: str = "bilinear") -> np.ndarray:
    return do.cut(
      pixels, 1, geometry.random_resized_crop(height, width, size, rng, (0.2, 1.0), (3 / 4, 4 / 3)), interpolation
    )

  def jitter(rng: np.random.Generator, operation: str) -> np.ndarray:
    low, high = (-0.1, 0.1) if operation == "hue" else (0.6, 1.4)
    return do.jitter(view, [(operation, rng.uniform(low, high))])

  def example(rng: np.random.Generator, recipe: str) -> np.ndarray:
    photo = images.open_photo(data)
    plans = [images.draw(a, photo.height, photo.width, size, rng) for a in RECIPES[recipe].augmentations]
    return np.stack(images.make(photo, plans, engine=engine))

  return {
    "crop, bilinear": crop,
    "crop, bicubic": partial(crop, interpolation="bicubic"),
    **{name: partial(jitter, operation=name) for name in ("brightness", "contrast", "saturation", "hue")},
    "grayscale": lambda rng: do.grayscale(view),
    "blur": lambda rng: do.blur(view, rng.uniform(0.1, 2.0)),
    "solarize": lambda rng: do.solarize(view),
    "flip": lambda rng: do.flip(view),
    **{f"`{name}`, decoding and all": partial(example, recipe=name) for name in ("clip", "openai", "slip", "declip")},
  }


def measure(works: list[Work], seconds: float) -> list[float]:
  """CPU milliseconds per call of each; they take turns of 10 calls until `seconds` have passed."""
  spent, turns, end = [0.0] * len(works), 0, time.perf_counter() + seconds
  while not turns or time.perf_counter() < end:
    for side, work in enumerate(works):
      rng, before = np.random.default_rng(turns), time.process_time()
      for _ in range(10):
        work(rng)
      spent[side] += time.process_time() - before
    turns += 1
  return [1e3 * cpu / turns / 10 for cpu in spent]


def difference(works: list[Work], draws: int = 40) -> tuple[float, float, int]:
  """Mean over all results, mean of the worst one, and maximum, in levels."""
  apart = []
  for seed in range(draws):
    first, second = (work(np.random.default_rng(seed)).astype(int) for work in works)
    apart.append(np.abs(first - second))
  return float(np.mean(apart)), max(float(one.mean()) for one in apart), int(np.max(apart))


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--image", type=pathlib.Path, help="a JPEG to use (default: a synthetic one of 375 x 500)")
  parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
  parser.add_argument("--seconds", type=float, default=1.0, help="time spent per row")
  arguments = parser.parse_args()
  cv2.setNumThreads(0)
  data = arguments.image.read_bytes() if arguments.image else synthetic_photo(375, 500, np.random.default_rng(0))
  photo = images.open_photo(data)
  kilobytes = len(data) / 1000
  print(f"{photo.height} x {photo.width} pixels, {kilobytes:.0f} kB, views of {arguments.size} pixels; per core:\n")
  print(
    "| work | exact ms | fast ms | faster | mean difference | of the worst | maximum |\n|---|---|---|---|---|---|---|"
  )
  rows = [operations(data, arguments.size, engine) for engine in ("exact", "fast")]
  for name in rows[0]:
    works = [row[name] for row in rows]
    mean, worst, largest = difference(works)  # first, for it also fills the cache of filters
    exact, fast = measure(works, arguments.seconds)
    print(f"| {name} | {exact:.2f} | {fast:.2f} | {exact / fast:.1f} x | {mean:.2f} | {worst:.2f} | {largest} |")


if __name__ == "__main__":
  main()
