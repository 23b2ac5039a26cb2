"""Speed of the input pipeline per core: images to views, captions to tokens, and reading one of 400 M samples.

  make bench-input                                       installs the other libraries in an environment and runs this
  python benchmarks/input.py --source "webdataset:data/train-{0000..0003}.tar" --quick

Views: images per second (of the data set; an image has one to three views) for each recipe. "fast" and "exact" are the
engines of `declip_jax.data.images`; "device" is the host's share with `config.data.augment_on="device"`. All three make
the texts of the recipe as well. The other libraries make views only: "torchvision" with its transforms on Pillow
images, ToTensor and Normalize, like the loaders of SLIP, DeCLIP and open_clip; "Pillow" with the same operations
without torchvision and tensors. "decoding" is our decoder at full resolution alone.

Tokens: captions per second, and those of OpenAI's tokenizer as open_clip ships it. That one caches every word, and is
warmed up with as many other captions, so that frequent words cost nothing and rare ones do.

All figures are CPU time of one thread, from bytes in memory. The functions take turns on the same images, round after
round, so that other load on the machine affects all alike; figures are medians over the rounds, "x torchvision" those
of the ratios to torchvision. Libraries that are not installed are skipped.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import io
import itertools
import json
import multiprocessing
from pathlib import Path
import random
import tarfile
import tempfile
import time
from typing import Any

from command import parser
import cv2
import grain
from images import synthetic_photo
import numpy as np
from optional_imports import optional_import
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from declip_jax.data import images
from declip_jax.data.make_views import MakeViews, Masking, Rendering
from declip_jax.data.recipes import RECIPES, Recipe, get_recipe
from declip_jax.data.sources import BadSample, Example, open_source
from declip_jax.data.sources.webdataset import Fields, WebDataset
from declip_jax.data.storage import indexes
from declip_jax.data.text.tokenizer import OpenAI, Tokenizer

GOALS = {("declip", "fast"): 2.5, ("declip", "device"): 4.0, ("clip", "fast"): 1.5, ("tokens", "plain"): 10.0}
RECIPE_ROWS = (*RECIPES, "open_clip")
Work = Callable[[Any], object]


torch, transforms = optional_import("torch"), optional_import("torchvision.transforms")
open_clip = optional_import("open_clip")


def main() -> None:
  """Prints the tables."""
  arguments = parser(__doc__)
  arguments.add_argument(
    "--source", action="append", default=[], help="also measure images of a source, such as webdataset:...; repeatable"
  )
  arguments.add_argument(
    "--recipes", nargs="+", choices=RECIPE_ROWS, default=RECIPE_ROWS, metavar="RECIPE", help="recipes (default: all)"
  )
  arguments.add_argument("--size", type=int, default=224, help="side of a view in pixels (default: 224)")
  arguments.add_argument("--images", type=int, default=64, help="images of each source (default: 64)")
  arguments.add_argument("--seconds", type=float, default=3, help="seconds for each figure (default: 3)")
  arguments.add_argument(
    "--samples", type=int, default=400_000_000, help="samples of the synthetic index (default: 400 M)"
  )
  arguments.add_argument("--quick", action="store_true", help="check that everything runs: 0.3 seconds for each figure")
  args = arguments.parse_args()
  seconds = 0.3 if args.quick else args.seconds
  cv2.setNumThreads(0)
  if torch:
    torch.set_num_threads(1)
  else:
    print("torchvision is not installed: make bench-input installs it\n")

  reached = bench_views("photos", photos(args.images), args, seconds)
  for spec in args.source:
    bench_views(spec, sample(spec, args.images), args, seconds)
  reached |= bench_tokens(args.source, seconds)
  bench_index(args.samples, seconds)
  if reached:
    print_row("goal", "speedup", "measured")
    print_row(*["---"] * 3)
  for (label, column), goal in GOALS.items():
    if (label, column) in reached:
      print_row(f"{label}, {column}", goal, f"{reached[label, column]:.1f}")


def alternate(works: dict[str, Work], items: Sequence[Any], seconds: float, block: int) -> dict[str, np.ndarray]:
  """CPU seconds per item of each function, `[rounds]`; in a round all process the same block, in changing order.

  A turn should last milliseconds, so that refilling the processor's caches after the previous turn does not dominate.
  """
  spent: dict[str, list[float]] = {name: [] for name in works}
  blocks = itertools.cycle([items[i : i + block] for i in range(0, len(items), block)])
  names, end = list(works), time.perf_counter() + seconds * len(works)
  while len(spent[names[0]]) < 4 or time.perf_counter() < end:
    items_of_round = next(blocks)
    for name in names:
      before = time.thread_time()
      for item in items_of_round:
        works[name](item)
      spent[name].append((time.thread_time() - before) / len(items_of_round))
    names = names[1:] + names[:1]
  return {name: np.array(spent[name][1:]) for name in works}  # the first round warms up


def figures(spent: dict[str, np.ndarray], ours: Sequence[str], baseline: str) -> tuple[list[str], dict[str, float]]:
  """Cells of a row: items per second of each function, then the speedup of each of `ours` over the baseline."""
  rates = [f"{1 / np.median(times):,.0f}" for times in spent.values()]
  speedups = {name: float(np.median(spent[baseline] / spent[name])) for name in ours if baseline in spent}
  return rates + [f"{ratio:.2f} x" for ratio in speedups.values()], speedups


def print_row(*cells: object) -> None:
  """Prints a row of a Markdown table."""
  print("|", " | ".join(map(str, cells)), "|", flush=True)


# Views.


def photos(count: int) -> list[Example]:
  """Synthetic JPEG photos of 500 x 375 pixels with captions, as costly to decode as pairs from the web."""
  rng = np.random.default_rng(0)
  texts = captions(count, 0.0)
  return [
    Example(image=synthetic_photo(375, 500, rng), captions=(texts[i],), label=-1, id=f"photo:{i}") for i in range(count)
  ]


def sample(spec: str, count: int) -> list[Example]:
  """Usable examples at regular intervals of a source."""
  source, found = open_source(spec), []
  for index in np.linspace(0, len(source) - 1, min(count, len(source)), dtype=int):
    try:
      example = source[int(index)]
      images.decode(example["image"])
    except BadSample:
      continue
    found.append({**example, "captions": example["captions"] or ("a photo",)})
  return found


def bench_views(
  name: str, examples: list[Example], args: argparse.Namespace, seconds: float
) -> dict[tuple[str, str], float]:
  """Prints the table of one source; returns the speedup over torchvision by row and column."""
  kilobytes = np.mean([len(e["image"]) for e in examples if isinstance(e["image"], bytes)]) / 1000
  shapes = np.array([(p.width, p.height) for p in (images.open_photo(e["image"]) for e in examples)])
  width, height = np.median(shapes, axis=0)
  print(f"{name}: {len(examples)} images, {kilobytes:.0f} kB, median {width:.0f} x {height:.0f} pixels; ", end="")
  print(f"views of {args.size} pixels; images per second and core:\n")
  ours, reached, done = ("fast", "exact", "device"), {}, {}
  header = ["recipe", "views", "decoding", *ours, *(["torchvision"] if transforms else []), "Pillow"]
  print_row(*header, *(f"{engine} x torchvision" for engine in ours if transforms))
  print_row(*["---"] * (len(header) + 3 * bool(transforms)))
  for label in args.recipes:
    # open_clip crops less than the others, and interpolates differently.
    recipe = get_recipe("clip", {"weak_scale": (0.9, 1.0)}) if label == "open_clip" else RECIPES[label]
    interpolation = "bicubic" if label == "open_clip" else "bilinear"
    if (same := done.setdefault((recipe.augmentations, interpolation), label)) != label:
      print_row(label, len(recipe.image_views), f"same as {same}")
      continue
    spent = alternate(view_makers(recipe, args.size, interpolation), examples, seconds, block=8)
    cells, speedups = figures(spent, ours, "torchvision")
    print_row(label, len(recipe.image_views), *cells)
    reached |= {(label, engine): ratio for engine, ratio in speedups.items()}
  print()
  return reached


def view_makers(recipe: Recipe, size: int, interpolation: str) -> dict[str, Work]:
  """Functions from an example to its views."""
  rng = np.random.default_rng(0)
  masking = Masking(patch_grid=size // 16)
  make = {
    name: MakeViews(recipe, Tokenizer(77), Rendering(size, interpolation, engine, place), masking)
    for name, engine, place in (("fast", "fast", "host"), ("exact", "exact", "host"), ("device", "fast", "device"))
  }
  works: dict[str, Work] = {"decoding": lambda example: images.decode(example["image"])}
  for name, views in make.items():
    works[name] = lambda example, views=views: views(example, rng)
  if transforms:
    chains = [torchvision_chain(augmentation, size, interpolation) for augmentation in recipe.augmentations]

    def by_torchvision(example: Example) -> list[Any]:
      image = Image.open(io.BytesIO(example["image"])).convert("RGB")
      return [chain(image) for chain in chains]

    works["torchvision"] = by_torchvision

  def by_pillow(example: Example) -> list[np.ndarray]:
    image = Image.open(io.BytesIO(example["image"])).convert("RGB")
    return [pillow_view(image, a, size, interpolation, rng) for a in recipe.augmentations]

  return works | {"Pillow": by_pillow}


def torchvision_chain(a: images.Augmentation, size: int, interpolation: str) -> Callable[[Image.Image], Any]:
  """The transforms of SLIP's, DeCLIP's and open_clip's loaders for such a view, and no others."""
  mode = transforms.InterpolationMode(interpolation)

  def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*a.blur_radius)))

  chain = [transforms.RandomResizedCrop(size, scale=a.scale, ratio=a.ratio, interpolation=mode)]
  if a.crop == "square":
    chain = [transforms.Resize(size, interpolation=mode), transforms.RandomCrop(size)]
  if a.jitter_probability:
    chain.append(transforms.RandomApply([transforms.ColorJitter(*a.jitter)], p=a.jitter_probability))
  if a.grayscale_probability:
    chain.append(transforms.RandomGrayscale(p=a.grayscale_probability))
  if a.blur_probability:
    chain.append(transforms.RandomApply([blur], p=a.blur_probability))
  if a.solarize_probability:
    chain.append(transforms.RandomSolarize(128, p=a.solarize_probability))
  if a.flip_probability:
    chain.append(transforms.RandomHorizontalFlip(a.flip_probability))
  return transforms.Compose([*chain, transforms.ToTensor(), transforms.Normalize(*images.IMAGENET_MEAN_STD)])


def pillow_view(
  image: Image.Image, augmentation: images.Augmentation, size: int, interpolation: str, rng: np.random.Generator
) -> np.ndarray:
  """A view made by Pillow alone."""
  params = images.draw(augmentation, image.height, image.width, size, rng)
  crop = params.crop
  top, left, height, width = crop.box
  resample = Image.Resampling[interpolation.upper()]
  view = image.crop((left, top, left + width, top + height)).resize((crop.width, crop.height), resample)
  view = view.crop((crop.left, crop.top, crop.left + size, crop.top + size))
  enhance = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
  for operation, factor in params.jitter:
    if operation != "hue":
      view = enhance[operation](view).enhance(factor)
      continue
    hue, saturation, value = view.convert("HSV").split()
    hue = hue.point([(level + int(factor * 255)) % 256 for level in range(256)])
    view = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
  if params.grayscale:
    view = ImageOps.grayscale(view).convert("RGB")
  if params.blur is not None:
    view = view.filter(ImageFilter.GaussianBlur(params.blur))
  if params.solarize:
    view = ImageOps.solarize(view)
  return np.asarray(ImageOps.mirror(view) if params.flip else view)


# Tokens.


def captions(count: int, foreign: float) -> list[str]:
  """Captions like those on the web: 4 to 24 words, some ending in file names or dates.

  The words are those of OpenAI's vocabulary, with frequencies by Zipf's law. One in twelve joins two of them and takes
  several tokens, like names and rare words.

  Args:
    count: number of captions.
    foreign: share of captions with characters beyond ASCII.
  """
  rng, encoder = np.random.default_rng(1), OpenAI()
  words = [
    encoder.decode([int(index)]).strip() for index in np.flatnonzero(encoder.word_marks()[1]) if index >= 512
  ]  # no single bytes
  words = [word for word in words if word.isascii() and word.isalpha()]
  chances = 1 / np.arange(10, len(words) + 10)
  chosen = rng.choice(words, (2, count, 24), p=chances / chances.sum()).tolist()
  made = []
  for first, second in zip(*chosen, strict=True):
    length = int(rng.integers(4, 25))
    text = " ".join(a + b if rng.random() < 1 / 12 else a for a, b in zip(first[:length], second, strict=False))
    text = text.capitalize() + str(rng.choice(["", "", ".", "!", " #travel", ", 12 May 2013", " - IMG_2041"]))
    if rng.random() < foreign:
      text += str(rng.choice([" – café de l’Opéra", " &amp; friends", " “at home”", " 東京", " naÃ¯ve"]))
    made.append(text)
  return made


def read_captions(spec: str, count: int) -> list[str]:
  """The first captions of examples at regular intervals of a source."""
  source, found = open_source(spec), []
  for index in np.linspace(0, len(source) - 1, min(count, len(source)), dtype=int):
    with contextlib.suppress(BadSample):
      found += source[int(index)]["captions"][:1]
  return found


def bench_tokens(sources: list[str], seconds: float) -> dict[tuple[str, str], float]:
  """Prints the table of tokenizers; returns our speedup over OpenAI's."""
  texts = {"plain": captions(20_000, 0.0), "1 in 10 beyond ASCII": captions(20_000, 0.1)}
  texts |= {spec: read_captions(spec, 20_000) for spec in sources}
  tokenizer, openai = Tokenizer(77), open_clip.tokenizer.SimpleTokenizer() if open_clip else None
  works: dict[str, Work] = {"declip_jax": lambda text: tokenizer([text])}
  works |= {"OpenAI's, in open_clip": lambda text: openai([text])} if openai else {}
  print("Captions per second and core, to 77 tokens each:\n")
  print_row("captions", *works, *(["speedup"] if openai else []))
  print_row(*["---"] * (2 + 2 * bool(openai)))
  reached = {}
  for name, captions_of_row in texts.items():
    half = len(captions_of_row) // 2
    for work in works.values():
      for text in captions_of_row[:half]:
        work(text)
    spent = alternate(works, captions_of_row[half:], seconds, block=500)
    cells, speedups = figures(spent, ("declip_jax",), "OpenAI's, in open_clip")
    print_row(name, *cells)
    if openai:
      reached["tokens", name] = speedups["declip_jax"]
  print()
  return reached


# The index of a large data set.


def bench_index(count: int, seconds: float) -> None:
  """Prints the cost of opening a WebDataset in a worker process and of reading one of its samples.

  The index file is sparse and every sample is the same bytes of one shard, so that everything is read from memory.
  Reading the index and the shards from a disk would add to it.

  Args:
    count: number of samples.
    seconds: time for each figure.
  """
  with tempfile.TemporaryDirectory(prefix="bench_input_") as folder:
    index = write_index(Path(folder), count)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
      measured = pool.apply(open_index, (index, count, seconds))
  print(f"A WebDataset of {count:,} samples in {-(-count // 10_000):,} shards, in a worker process:\n")
  print_row("operation", "cost")
  print_row("---", "---")
  for name, cost in measured.items():
    print_row(name, cost)
  print()


def write_index(folder: Path, count: int) -> Path:
  """Writes a shard of one sample, and an index of `count` samples in which the `chosen` ones are that sample."""
  shard, index = folder / "0.tar", folder / "index.npy"
  with tarfile.open(shard, "w") as tar:
    for suffix, content in (("jpg", photos(1)[0]["image"]), ("txt", b"a photo")):
      member = tarfile.TarInfo(f"0.{suffix}")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  spans = np.lib.format.open_memmap(index, "w+", np.int64, (count, 3))  # a sparse file
  spans[chosen(count)] = (0, 0, shard.stat().st_size)
  spans.flush()
  shards = [str(shard)] + [f"/data/laion/part-{i // 1000:03}/{i:05}.tar" for i in range(1, -(-count // 10_000))]
  with index.open("ab") as file:
    file.write(json.dumps({"shards": shards, "skipped": {}}).encode())
  indexes.seal(index, indexes.digest("benchmark"))
  return index


def chosen(count: int, lookups: int = 2000) -> np.ndarray:
  """The first samples of a global shuffle, by index."""
  order = grain.MapDataset.range(count).shuffle(seed=0)
  return np.array([order[position] for position in range(lookups)])


def open_index(index: Path, count: int, seconds: float) -> dict[str, str]:
  """Opens the index and reads samples, in a worker process; returns the costs."""
  before, start = memory(), time.perf_counter()
  source = WebDataset("bench", index, Fields())
  assert len(source) == count
  opening, opened = time.perf_counter() - start, memory()
  order, places = grain.MapDataset.range(count).shuffle(seed=0), chosen(count)
  spans = np.asarray(np.load(index, mmap_mode="r"))  # as in the source
  works = {
    "position in the global shuffle": lambda position: order[position],
    "entry of the index": lambda position: spans[places[position]].tolist(),
    "sample: entry, file, headers of the tar": lambda position: source[int(places[position])],
  }
  spent = alternate(works, range(len(places)), seconds, block=500)
  after = memory()
  return {
    "opening": f"{1e3 * opening:.0f} ms",
    "private memory, after opening": f"{opened[0] - before[0]:.0f} MB",
    f"... after {len(places):,} samples": f"{after[0] - before[0]:.0f} MB",
    "pages of files, shared by all processes": f"{after[1] - before[1]:.0f} MB",
    **{name: f"{1e6 * np.median(times):.0f} us" for name, times in spent.items()},
  }


def memory() -> tuple[float, float]:
  """MB of this process alone, and MB of mapped files; NaN where the kernel does not report them."""
  path = Path("/proc/self/status")
  if not path.exists():
    return float("nan"), float("nan")
  fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
  return tuple(int(fields[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile"))


if __name__ == "__main__":
  main()
