"""Images per second and core: decoding and the views of `declip_jax.data.images`, against the same chain in Pillow.

  python benchmarks/images.py [--image photo.jpg] [--size 224] [--seconds 2]

The rival does what torchvision does with Pillow images (decode, crop, jitter, grey, blur, flip, all in Pillow), written
out here so that torchvision need not be installed. Both sides draw the same crops and factors from the same seeds, take
turns, and are measured in CPU time of one thread, so that other work on the machine disturbs them little. A view alone
starts, for us, from an array and, for the rival, from a Pillow image; rows that decode are the ones to compare.
"""

import argparse
from collections.abc import Callable
import io
import pathlib
import time

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from declip_jax.data import images

Step = Callable[[np.random.Generator], object]


def synthetic_photo(height: int, width: int, rng: np.random.Generator) -> bytes:
  """A JPEG of quality 90 with detail at all scales, with about as many bytes per pixel as a photo."""
  octaves = [rng.normal(size=(2**i, 2**i, 3)) / 2 ** (0.9 * i) for i in range(1, 9)]
  pixels = sum(cv2.resize(octave, (width, height), interpolation=cv2.INTER_CUBIC) for octave in octaves)
  grain = 6 * rng.normal(size=(height, width, 1))
  pixels = np.clip(128 + 90 * pixels + grain, 0, 255).astype(np.uint8)
  return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def pillow_decode(data: bytes) -> Image.Image:
  return Image.open(io.BytesIO(data)).convert("RGB")


def pillow_hue(image: Image.Image, factor: float) -> Image.Image:
  hue, saturation, value = image.convert("HSV").split()
  turned = Image.fromarray(np.asarray(hue) + np.uint8(int(factor * 255) % 256))
  return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def pillow_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  for i in rng.permutation(4):
    if i == 3:
      image = pillow_hue(image, rng.uniform(-0.1, 0.1))
    else:
      enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
      image = enhance(image).enhance(rng.uniform(0.6, 1.4))
  return image


def pillow_weak(image: Image.Image, rng: np.random.Generator, size: int, scale: tuple[float, float]) -> Image.Image:
  top, left, height, width = images.random_resized_crop_box(image.height, image.width, rng, scale)
  return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)


def pillow_strong(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
  view = pillow_weak(image, rng, size, (0.2, 1.0))
  if rng.random() < 0.8:
    view = pillow_jitter(view, rng)
  if rng.random() < 0.2:
    view = ImageOps.grayscale(view).convert("RGB")
  if rng.random() < 0.5:
    view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
  if rng.random() < 0.5:
    view = ImageOps.mirror(view)
  return view


def pillow_eval(image: Image.Image, size: int) -> Image.Image:
  width, height = (size * side // min(image.size) for side in image.size)
  top, left = round((height - size) / 2), round((width - size) / 2)
  return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def cases(data: bytes, size: int) -> dict[str, tuple[Step, Step]]:
  """Per row of the table, our work and the rival's on one image, given the generator to draw from."""
  ours, rival = images.decode(data), pillow_decode(data)
  return {
    "decode": (lambda rng: images.decode(data), lambda rng: np.asarray(pillow_decode(data))),
    "weak_view": (
      lambda rng: images.weak_view(ours, rng, size=size),
      lambda rng: np.asarray(pillow_weak(rival, rng, size, (0.5, 1.0))),
    ),
    "strong_view": (
      lambda rng: images.strong_view(ours, rng, size=size),
      lambda rng: np.asarray(pillow_strong(rival, rng, size)),
    ),
    "eval_view, bicubic": (
      lambda rng: images.eval_view(ours, size=size, interpolation="bicubic"),
      lambda rng: np.asarray(pillow_eval(rival, size)),
    ),
    "CLIP: decode + weak": examples(data, size, weak=1, strong=0),
    "SLIP: decode + weak + 2 strong": examples(data, size, weak=1, strong=2),
    "DeCLIP: decode + 2 strong": examples(data, size, weak=0, strong=2),
  }


def examples(data: bytes, size: int, weak: int, strong: int) -> tuple[Step, Step]:
  """The image half of a training example, from bytes to stacked views."""

  def ours(rng: np.random.Generator) -> np.ndarray:
    image = images.decode(data)
    views = [images.weak_view(image, rng, size=size) for _ in range(weak)]
    return np.stack(views + [images.strong_view(image, rng, size=size) for _ in range(strong)])

  def rival(rng: np.random.Generator) -> np.ndarray:
    image = pillow_decode(data)
    views = [pillow_weak(image, rng, size, (0.5, 1.0)) for _ in range(weak)]
    return np.stack([np.asarray(view) for view in views + [pillow_strong(image, rng, size) for _ in range(strong)]])

  return ours, rival


def measure(steps: tuple[Step, Step], seconds: float) -> tuple[float, float]:
  """CPU milliseconds per image of the two, which take turns of 20 images until `seconds` have passed."""
  spent, turns, end = [0.0, 0.0], 0, time.perf_counter() + seconds
  while not turns or time.perf_counter() < end:
    for side, step in enumerate(steps):
      rng, before = np.random.default_rng(turns), time.process_time()
      for _ in range(20):
        step(rng)
      spent[side] += time.process_time() - before
    turns += 1
  return spent[0] / turns / 20 * 1e3, spent[1] / turns / 20 * 1e3


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--image", type=pathlib.Path, help="a JPEG to use (default: a synthetic one of 375 x 500)")
  parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
  parser.add_argument("--seconds", type=float, default=2.0, help="time spent per row")
  arguments = parser.parse_args()
  cv2.setNumThreads(0)
  data = arguments.image.read_bytes() if arguments.image else synthetic_photo(375, 500, np.random.default_rng(0))
  height, width, _ = images.decode(data).shape
  print(f"{height} x {width} pixels, {len(data) / 1000:.0f} kB, views of {arguments.size} pixels; per core:\n")
  print("| work | ms | images/s | Pillow ms | images/s | faster |\n|---|---|---|---|---|---|")
  for name, steps in cases(data, arguments.size).items():
    ours, rival = measure(steps, arguments.seconds)
    print(f"| {name} | {ours:.2f} | {1e3 / ours:.0f} | {rival:.2f} | {1e3 / rival:.0f} | {rival / ours:.2f} x |")


if __name__ == "__main__":
  main()
