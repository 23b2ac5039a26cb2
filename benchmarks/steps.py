"""Time of one train step of CLIP, SLIP and DeCLIP on the same towers: python benchmarks/steps.py

Each row is the best of several steps after compilation, on all devices, with a fixed batch: no input pipeline. The
methods are timed in turn, round after round, so that a noisy machine treats them alike; `x CLIP` is the ratio.

With --buckets 16 32 each method has a second row: texts are cut behind the longest of a batch (here 13 tokens).
"""

import argparse
import importlib.util
from pathlib import Path
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from declip_jax import run
from declip_jax.config import METHODS
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.state import State, abstract_state, create_state
from declip_jax.train import make_step

ROOT = Path(__file__).resolve().parent.parent


def read_config(name: str, method: str) -> ConfigDict:
  """`configs/NAME.py` for a method; NAME:REST appends REST to its argument."""
  name, _, rest = name.partition(":")
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(method + rest)


def random_batch(parts: run.Parts, batch_size: int) -> Any:
  """Noise images, short captions, every masked position used."""
  rng = np.random.default_rng(0)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in parts.batch_shape(batch_size).items()}
  batch["image"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
  batch["text"][..., :12] = rng.integers(1000, size=(*batch["text"].shape[:-1], 12))
  batch["text"][..., 12] = parts.tokenizer.eot
  for name in ("mlm_position", "mlm_weight"):
    if name in batch:
      batch[name][:] = 1
  return to_global(batch, batch_sharding(parts.mesh))


def compile_step(config: ConfigDict) -> tuple[Any, State, Any, float]:
  """The compiled step, a state, a batch, and the seconds that compiling took."""
  parts = run.build(config)
  model = {"model": parts.model, "optimizer": parts.optimizer}
  batch = random_batch(parts, config.batch_size)
  abstract = abstract_state(parts.batch_shape(config.batch_size), parts.mesh, **model)
  jitted = make_step(config, parts, lambda step: 1e-3, abstract)
  start = time.perf_counter()
  compiled = jitted.lower(abstract, batch).compile()
  return compiled, create_state(0, batch, abstract, **model), batch, time.perf_counter() - start


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--config",
    default="demo",
    help="a file of configs/ that takes a method, as demo (the default) or small:,fashion44k,-",
  )
  parser.add_argument("--batch-size", type=int, help="default: that of the config")
  parser.add_argument("--context-length", type=int, help="tokens of a text (default: that of the config)")
  parser.add_argument("--buckets", type=int, nargs="+", default=[], help="lengths to which texts may be cut")
  parser.add_argument("--rounds", type=int, default=10, help="timed steps of each method (default: 10)")
  args = parser.parse_args()
  runs: dict[str, tuple] = {}
  for method in METHODS:
    for buckets in ((), tuple(args.buckets)) if args.buckets else ((),):
      config = read_config(args.config, method)
      config.batch_size = args.batch_size or config.batch_size
      config.model.text.context_length = args.context_length or config.model.text.context_length
      config.model.text.buckets = buckets
      runs[f"{method} cut" if buckets else method] = compile_step(config)
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(args.rounds + 1):
    for method, (step, state, batch, seconds) in runs.items():
      start = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready((state, metrics))
      times[method].append(time.perf_counter() - start)
      runs[method] = (step, state, batch, seconds)
  print(f"{config.batch_size} pairs a step, {jax.device_count()} x {jax.devices()[0].device_kind}")
  print(f"{'method':<10} {'compile s':>9} {'step ms':>8} {'pairs/s':>8} {'x CLIP':>7} {'temporary MiB':>14}")
  for method, (step, _, _, seconds) in runs.items():
    best = min(times[method][1:])
    memory = step.memory_analysis().temp_size_in_bytes / 2**20
    ratio = best / min(times["clip"][1:])
    print(f"{method:<10} {seconds:9.1f} {1e3 * best:8.0f} {config.batch_size / best:8.0f} {ratio:7.2f} {memory:14.0f}")


if __name__ == "__main__":
  main()
