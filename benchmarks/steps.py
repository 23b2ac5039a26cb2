"""Time, memory and FLOPs of one train step of each method on the same towers: python benchmarks/steps.py

Each row is the median of several steps after compilation, on all devices, with a fixed batch: no input pipeline, and no
diagnostics, which a training measures every `log_every` steps. The methods are timed in turn, round after round, and
compared with CLIP's step of the same round, so that a noisy machine treats them alike: step time (the median of these
ratios), temporary memory of the compiled step, and the FLOPs of its matrix products and convolutions (see
`flops.num_flops`). The last column is the relative time divided by the relative FLOPs: above 1, a step does work that
FLOPs do not count.

On a CPU export the Makefile's GLIBC_TUNABLES first: without it the kernel clears the memory of each step page by page,
which the methods with the most memory pay most for.

METHOD_repo is what DeCLIP's released code does under that name. With --buckets 16 32 each method that reads texts has a
second row: texts are cut behind the longest of a batch (here 13 tokens).
"""

import argparse
from dataclasses import dataclass, field
import statistics
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from declip_jax import build, config_files
from declip_jax.build import make_step
from declip_jax.config import duration
from declip_jax.methods import METHODS
from declip_jax.planning import flops
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.training.state import State, abstract_state, create_state

RELEASED = ("declip_repo", "filip_repo", "defilip_repo")
TOKENS = 13  # of each text, with both ends


@dataclass
class Step:
  """A compiled step, what it maps, and what was measured of it."""

  compiled: Any
  state: State
  batch: Any
  compile_seconds: float
  flops: float
  seconds: list[float] = field(default_factory=list)

  @property
  def usual(self) -> float:
    """Seconds of the median step; the first one warms up."""
    return statistics.median(self.seconds[1:])

  def relative_to(self, other: "Step") -> float:
    """The median ratio of its steps and the other's of the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(self.seconds[1:], other.seconds[1:], strict=True))

  @property
  def memory(self) -> float:
    """MiB of temporary memory on each device."""
    return self.compiled.memory_analysis().temp_size_in_bytes / 2**20

  def take(self) -> None:
    """Runs it once, and notes the time."""
    start = time.perf_counter()
    self.state, metrics = self.compiled(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))
    self.seconds.append(time.perf_counter() - start)


def read_config(name: str, method: str) -> ConfigDict:
  """Returns a config that takes a method; further arguments follow a colon, as in small:dataset=flickr8k."""
  name, _, arguments = name.partition(":")
  return config_files.load(f"{name}:method={method},{arguments}")


def random_batch(built: build.Built, batch_size: int) -> Any:
  """Noise images, short captions, every masked position used."""
  rng = np.random.default_rng(0)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in built.batch_shape(batch_size).items()}
  batch["image"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
  if "text" in batch:
    batch["text"][..., : TOKENS - 1] = rng.integers(1000, size=(*batch["text"].shape[:-1], TOKENS - 1))
    batch["text"][..., TOKENS - 1] = built.tokenizer.eot
  for name in ("mlm_position", "mlm_weight"):
    if name in batch:
      batch[name][:] = 1
  if "mim_position" in batch:
    batch["mim_position"][:] = np.arange(batch["mim_position"].shape[1])
  return to_global(batch, batch_sharding(built.mesh))


def compile_step(config: ConfigDict) -> Step:
  """The compiled step of a config, with a state and a batch; it never measures the diagnostics.

  Raises:
    ValueError: the config does not fit itself.
  """
  config.log_every, config.duration = 0, duration(steps=10**6)
  built = build.build(config)
  model = {"model": built.model, "optimizer": built.optimizer}
  batch = random_batch(built, config.batch_size)
  abstract = abstract_state(built.batch_shape(config.batch_size), built.mesh, **model)
  start = time.perf_counter()
  traced = make_step(config, built, build.to_steps(config, epoch_examples=config.batch_size), abstract).trace(
    abstract, batch
  )
  compiled = traced.lower().compile()
  seconds = time.perf_counter() - start
  return Step(compiled, create_state(0, batch, abstract, **model), batch, seconds, flops.num_flops(traced.jaxpr))


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--config",
    default="demo",
    help="a config that takes a method, such as demo (the default) or small:dataset=flickr8k",
  )
  parser.add_argument("--methods", nargs="+", help="which, beside clip (default: all that the config takes)")
  parser.add_argument("--batch-size", type=int, help="default: that of the config")
  parser.add_argument("--context-length", type=int, help="tokens of a text (default: that of the config)")
  parser.add_argument("--buckets", type=int, nargs="+", default=[], help=f"lengths to cut texts to, from {TOKENS} on")
  parser.add_argument("--rounds", type=int, default=10, help="timed steps of each method (default: 10)")
  args = parser.parse_args()
  if args.buckets and min(args.buckets) < TOKENS:  # FLOPs are those of the shortest
    parser.error(f"--buckets {min(args.buckets)}: shorter than the texts of {TOKENS} tokens")
  steps: dict[str, Step] = {}
  for method in dict.fromkeys(["clip", *(args.methods or [*METHODS, *RELEASED])]):
    for buckets in ((), tuple(args.buckets)) if args.buckets else ((),):
      try:
        config = read_config(args.config, method)
        config.batch_size = args.batch_size or config.batch_size
        config.model.text.context_length = args.context_length or config.model.text.context_length
        config.model.text.buckets = buckets
        step = compile_step(config)
      except ValueError as error:
        if args.methods:
          parser.error(f"{method}: {error}")
        print(f"without {method}: {str(error).partition(':')[0]}")
        break
      if buckets and "text" not in step.batch:
        break
      steps[f"{method} cut" if buckets else method] = step
  for _ in range(args.rounds + 1):
    for step in steps.values():
      step.take()
  print_table(steps, config.batch_size)


def print_table(steps: dict[str, Step], batch_size: int) -> None:
  """A row for each step."""
  clip = steps["clip"]
  print(f"{batch_size} pairs a step, {jax.device_count()} x {jax.devices()[0].device_kind}")
  print(f"{'':13}{'compile s':>10}{'step ms':>9}{'pairs/s':>9}{'temporary MiB':>15}{'GFLOPs':>9}", end="")
  print(f"{'time x CLIP':>13}{'memory x CLIP':>15}{'FLOPs x CLIP':>14}{'time / FLOPs':>14}")
  for name, step in steps.items():
    time_ratio, flops_ratio = step.relative_to(clip), step.flops / clip.flops
    print(f"{name:13}{step.compile_seconds:10.1f}{1e3 * step.usual:9.0f}{batch_size / step.usual:9.0f}", end="")
    print(f"{step.memory:15.0f}{step.flops / 1e9:9.2f}{time_ratio:13.2f}{step.memory / clip.memory:15.2f}", end="")
    print(f"{flops_ratio:14.2f}{time_ratio / flops_ratio:14.2f}")


if __name__ == "__main__":
  main()
