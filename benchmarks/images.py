"""Cost of each image operation in the two engines of `declip_jax.data.images`, and the difference of their results.

  python benchmarks/images.py [--image photo.jpg] [--size 224] [--seconds 1]

The engine "exact" is Pillow throughout and as fast as torchvision's transforms on Pillow images, within a few per cent;
`benchmarks/input.py` measures torchvision itself. Both engines have the same random parameters, take turns, and are
measured in CPU time of one thread, which other load on the machine affects little. Differences are in levels of 255:
the mean over views and pixels, the mean of the worst view, and the maximum.
"""

from collections.abc import Callable
from functools import partial
import pathlib
import time

from command import parser
import cv2
import numpy as np

from declip_jax.data import images
from declip_jax.data.images import geometry
from declip_jax.data.recipes import RECIPES

Work = Callable[[np.random.Generator], np.ndarray]


def synthetic_photo(height: int, width: int, rng: np.random.Generator) -> bytes:
  """A JPEG of quality 90 with detail at all scales and about as many bytes per pixel as a photo."""
  octaves = [rng.normal(size=(2**i, 2**i, 3)) / 2 ** (0.9 * i) for i in range(1, 9)]
  pixels = sum(cv2.resize(octave, (width, height), interpolation=cv2.INTER_CUBIC) for octave in octaves)
  grain = 6 * rng.normal(size=(height, width, 1))
  pixels = np.clip(128 + 90 * pixels + grain, 0, 255).astype(np.uint8)
  return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def operations(data: bytes, size: int, engine: images.EngineName) -> dict[str, Work]:
  """The rows of the table, as functions of a random generator: single operations, then whole examples from bytes."""
  module, pixels = images.ENGINES[engine], images.decode(data)
  height, width, _ = pixels.shape
  view = images.eval_view(pixels, images.EvalView(size))

  def crop(rng: np.random.Generator, interpolation: str = "bilinear") -> np.ndarray:
    return module.cut(
      pixels, 1, geometry.random_resized_crop(height, width, size, rng, (0.2, 1.0), (3 / 4, 4 / 3)), interpolation
    )

  def jitter(rng: np.random.Generator, operation: str) -> np.ndarray:
    low, high = (-0.1, 0.1) if operation == "hue" else (0.6, 1.4)
    return module.jitter(view, [(operation, rng.uniform(low, high))])

  def example(rng: np.random.Generator, recipe: str) -> np.ndarray:
    photo = images.open_photo(data)
    params = [images.draw(a, photo.height, photo.width, size, rng) for a in RECIPES[recipe].augmentations]
    return np.stack(images.make(photo, params, engine=engine))

  return {
    "crop, bilinear": crop,
    "crop, bicubic": partial(crop, interpolation="bicubic"),
    **{name: partial(jitter, operation=name) for name in ("brightness", "contrast", "saturation", "hue")},
    "grayscale": lambda rng: module.grayscale(view),
    "blur": lambda rng: module.blur(view, rng.uniform(0.1, 2.0)),
    "solarize": lambda rng: module.solarize(view),
    "flip": lambda rng: module.flip(view),
    **{f"`{name}`, with decoding": partial(example, recipe=name) for name in ("clip", "openai", "slip", "declip")},
  }


def measure(works: list[Work], seconds: float) -> list[float]:
  """CPU milliseconds per call of each function; they take turns of 10 calls until `seconds` have passed."""
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
  """Mean over all results, mean of the worst result, and maximum, in levels."""
  differences = []
  for seed in range(draws):
    first, second = (work(np.random.default_rng(seed)).astype(int) for work in works)
    differences.append(np.abs(first - second))
  return float(np.mean(differences)), max(float(each.mean()) for each in differences), int(np.max(differences))


def main() -> None:
  """Prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument("--image", type=pathlib.Path, help="a JPEG (default: a synthetic one of 375 x 500 pixels)")
  arguments.add_argument("--size", type=int, default=224, help="side of the views in pixels (default: 224)")
  arguments.add_argument("--seconds", type=float, default=1.0, help="time spent per row (default: 1)")
  args = arguments.parse_args()
  cv2.setNumThreads(0)
  data = args.image.read_bytes() if args.image else synthetic_photo(375, 500, np.random.default_rng(0))
  photo = images.open_photo(data)
  kilobytes = len(data) / 1000
  print(f"{photo.height} x {photo.width} pixels, {kilobytes:.0f} kB, views of {args.size} pixels; per core:\n")
  print("| operation | exact ms | fast ms | speedup | mean difference | worst mean | maximum |")
  print("|---" * 7 + "|")
  both = [operations(data, args.size, engine) for engine in ("exact", "fast")]
  for name in both[0]:
    works = [engine[name] for engine in both]
    mean, worst, largest = difference(works)  # first, since it also fills the cache of filters
    exact, fast = measure(works, args.seconds)
    print(f"| {name} | {exact:.2f} | {fast:.2f} | {exact / fast:.1f} x | {mean:.2f} | {worst:.2f} | {largest} |")


if __name__ == "__main__":
  main()
