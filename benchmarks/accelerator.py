"""Speed of training steps on this machine's accelerators: python benchmarks/accelerator.py

Prints a Markdown table with a row for CLIP, SLIP and DeCLIP with ViT-B/32 and ViT-B/16 in bfloat16, and, where PyTorch
and open_clip are installed, one for the compiled step of open_clip on one GPU. A step has a fixed batch of noise on the
devices, with texts of 13 tokens: trimmed to 16 as in training, or of the whole context for the rows "whole texts",
which open_clip's also has. There is no input pipeline, and there are no diagnostics.

  images/s     pairs per second times the image views of a pair, over all devices
  pairs/s      pairs per second over all devices
  utilisation  FLOPs of the model (without recomputation) per second and device, as a share of the highest rate of a
               matrix product that this script measures first
  memory       of a device, as the compiler allocates it; of open_clip, PyTorch's peak

A batch that does not fit is halved until it does. Most of the time is that of compiling. A row is left out, and named,
if --seconds, 8 minutes by default, would not suffice for another one as slow as the slowest before it. docs/results.md
has a place for the table.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import gc
import os
import statistics
import sys
import time

from beside_open_clip import Theirs, highest_rate, open_clip, torch
from command import parser
import jax
from ml_collections import ConfigDict
import numpy as np
from train_step import TOKENS, make_train_step

from declip_jax import build
from declip_jax import config as config_lib
from declip_jax.planning.compile import OutOfMemory as DoesNotFit
from declip_jax.planning.compile import memory, with_trimmed_texts
from declip_jax.planning.flops import step_flops
from declip_jax.runtime.memory import OutOfMemory, explained

_COLUMNS = ("model", "method", "texts", "pairs", "images/s", "pairs/s", "step ms", "utilisation", "memory GiB")
_TOO_LARGE = (OutOfMemory, DoesNotFit, *([torch.OutOfMemoryError] if torch else []))
_PAIRS, _OTHER_PAIRS = {"ViT-B/32": 512, "ViT-B/16": 256}, 256  # on each device


@dataclass(frozen=True)
class Row:
  """A step to time.

  Attributes:
    architecture: one of `architectures.ARCHITECTURES`.
    method: a method, or "open_clip".
    trims: whether texts are trimmed as in training.
  """

  architecture: str
  method: str
  trims: bool = True

  @property
  def name(self) -> str:
    """What it is called in messages."""
    return f"{self.method} with {self.architecture}, {'trimmed' if self.trims else 'whole'} texts"


@dataclass(frozen=True)
class Measured:
  """A step that can be called, and what it costs.

  Attributes:
    call: takes a step and waits for it.
    images: image views in a step, over all devices.
    flops: FLOPs of the model in a step, on each device.
    bytes: memory of a device; called after the steps.
  """

  call: Callable[[], object]
  images: int
  flops: float
  bytes: Callable[[], float]


def main() -> None:
  """Prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument("--architectures", nargs="+", default=[*_PAIRS], help=f"default: {' '.join(_PAIRS)}")
  methods = ["clip", "slip", "declip"]
  arguments.add_argument("--methods", nargs="+", default=methods, help=f"default: {' '.join(methods)}")
  pairs = ", ".join(f"{number} for {name}" for name, number in _PAIRS.items())
  arguments.add_argument("--pairs", type=int, help=f"pairs on each device (default: {pairs}, else {_OTHER_PAIRS})")
  dtypes = ("bfloat16", "float32")
  arguments.add_argument("--dtype", choices=dtypes, default="bfloat16", help="dtype of activations (default: bfloat16)")
  arguments.add_argument("--steps", type=int, default=20, help="timed steps of each row (default: 20)")
  arguments.add_argument("--seconds", type=float, default=480, help="time for all of it (default: 480)")
  args = arguments.parse_args()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # which leaves memory for open_clip
  end, device = time.monotonic() + args.seconds, jax.devices()[0]
  highest = highest_rate(args.dtype)
  print(f"{jax.device_count()} x {device.device_kind}, {args.dtype}, JAX {jax.__version__}; ", end="")
  print(f"highest rate of a matrix product {highest / 1e12:.3g} TFLOP/s on a device\n", flush=True)
  print(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}", flush=True)
  late, slowest = [], 0.0
  for row in rows(args):
    began = time.monotonic()
    if began + slowest > end:
      late.append(row.name)
      continue
    print(f"measuring {row.name}", file=sys.stderr, flush=True)
    print(measure(row, args, highest), flush=True)
    slowest = max(slowest, time.monotonic() - began)
  if late:
    print(f"\nno time was left for {'; '.join(late)}: raise --seconds")


def rows(args: argparse.Namespace) -> Iterator[Row]:
  """The rows: those of open_clip first, since JAX does not give memory back that it has used."""
  if torch is not None and open_clip is not None and jax.device_count() == 1:
    yield from (Row(architecture, "open_clip", trims=False) for architecture in args.architectures)
  for architecture in args.architectures:
    yield from (Row(architecture, method) for method in args.methods)
  if "clip" in args.methods:
    yield from (Row(architecture, "clip", trims=False) for architecture in args.architectures)


def measure(row: Row, args: argparse.Namespace, highest: float) -> str:
  """The line of a row, with the largest batch that fits."""
  pairs = args.pairs or _PAIRS.get(row.architecture, _OTHER_PAIRS)
  while pairs:
    config = make_config(row, args.dtype, pairs * jax.device_count())
    try:
      with explained(""):
        return line(row, pairs, (theirs if row.method == "open_clip" else ours)(row, config), args.steps, highest)
    except _TOO_LARGE:
      print(f"  {pairs} pairs on a device do not fit", file=sys.stderr, flush=True)
    pairs //= 2
  return f"| {row.architecture} | {row.method} | not even one pair fits |{' |' * (len(_COLUMNS) - 3)}"


def make_config(row: Row, dtype: str, batch_size: int) -> ConfigDict:
  """The config of a row; open_clip's step is that of CLIP."""
  config = config_lib.default("clip" if row.method == "open_clip" else row.method, row.architecture)
  config.batch_size, config.model.dtype = batch_size, dtype
  config.mesh.fsdp = 1
  return with_trimmed_texts(config, TOKENS) if row.trims else config


def ours(row: Row, config: ConfigDict) -> Measured:
  """Our step of a config."""
  step = make_train_step(config)
  flops = step_flops(build.build(config), config.batch_size) / jax.device_count()
  return Measured(step, step.batch["image"].shape[1] * config.batch_size, flops, lambda: memory(step.program).peak)


def theirs(row: Row, config: ConfigDict) -> Measured:
  """open_clip's step with the same architecture, batch and FLOPs."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  gc.collect()  # the step of the row before
  if device == "cuda":
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  built = build.build(config)
  rng, shapes = np.random.default_rng(0), built.batch_shape(config.batch_size)
  tokens = built.tokenizer(["two dogs play with a ball in the green grass"] * config.batch_size)[:, None]
  image = rng.integers(256, size=shapes["image"].shape, dtype=np.uint8)
  args = argparse.Namespace(dtype=config.model.dtype)
  model = open_clip.create_model(row.architecture.replace("/", "-"))
  step = Theirs(args, model, [{"image": image, "text": tokens}], device)
  flops = step_flops(built, config.batch_size)
  return Measured(step, config.batch_size, flops, torch.cuda.max_memory_allocated)  # 0 on a CPU


def line(row: Row, pairs: int, step: Measured, count: int, highest: float) -> str:
  """The line of a row: times are the median of `count` steps after two that warm up."""
  seconds = []
  for _ in range(count + 2):
    start = time.perf_counter()
    step.call()
    seconds.append(time.perf_counter() - start)
  median = statistics.median(seconds[2:])
  cells = [row.architecture, row.method, "trimmed" if row.trims else "whole", str(pairs)]
  cells += [f"{step.images / median:,.1f}", f"{pairs * jax.device_count() / median:,.1f}", f"{1e3 * median:,.1f}"]
  cells += [f"{step.flops / median / highest:.1%}", f"{step.bytes() / 2**30:.1f}"]
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  main()
