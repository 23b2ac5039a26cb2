"""Time of a train step with its texts trimmed and whole, on the captions of data sets: python benchmarks/text_length.py

  python benchmarks/text_length.py --config small:dataset=flickr8k,data=FOLDER small:dataset=fashion44k,data=FOLDER

Both steps start from the same state and take the same batches of the input pipeline, in turn, so that other load on the
machine affects both alike. "trimmed" is the default: texts of one of the lengths of `config.model.text.buckets`.
"whole" is the step on texts of the context length. Each row has the lengths of the trimmed batches, the medians of both
times and of their ratio, and the largest difference of their losses in the first steps. Steps that compile are not
timed.

With --lengths nothing is trained: it prints how long captions are, and the mean length to which batches of several
sizes are trimmed. The more captions a batch has, the longer is its longest one.
"""

import argparse
from collections import Counter
from collections.abc import Callable
import itertools
import statistics
from typing import Any

from command import parser
import jax
import numpy as np
from rounds import median_ratio, seconds_in_turn
from train_step import read_config, trimmed

from declip_jax import build
from declip_jax.data import pipeline
from declip_jax.data.mixture import Mixture
from declip_jax.data.sources import open_source
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.training import trimming
from declip_jax.training.state import abstract_state, create_state
from declip_jax.types import text_length

BATCH_SIZES = (64, 256, 1024, 4096, 16384)  # of --lengths
DRAWS = 200  # batches of each size, drawn from the captions with replacement


def main() -> None:
  """Prints a row for each config and method."""
  arguments = parser(__doc__)
  arguments.add_argument("--config", nargs="+", default=["demo"], help="configs with an argument `method`")
  arguments.add_argument("--methods", nargs="+", default=["clip", "declip"], help="methods (default: clip declip)")
  arguments.add_argument("--batch-size", type=int, help="pairs per step (default: as in the config)")
  arguments.add_argument("--context-length", type=int, default=77, help="tokens of whole texts (default: 77)")
  arguments.add_argument("--rounds", type=int, default=10, help="timed steps of each, on as many batches (default: 10)")
  arguments.add_argument("--lengths", action="store_true", help="print lengths of captions instead")
  args = arguments.parse_args()
  if not args.lengths:
    print(f"{'lengths':>24}{'whole ms':>10}{'trimmed ms':>12}{'whole / trimmed':>17}{'loss difference':>17}")
  for name in args.config:
    print(name)
    for method in args.methods[:1] if args.lengths else args.methods:
      print(caption_lengths(name, args) if args.lengths else row(name, method, args), flush=True)


def row(name: str, method: str, args: argparse.Namespace) -> str:
  """Times both steps of a method."""
  config = read_config(name, method)
  config.batch_size = args.batch_size or config.batch_size
  config.model.text.context_length = args.context_length
  config.log_every = 0
  built = build.build(config)
  batches = read_batches(config, built, args.rounds)
  cut = [trimmed(built, batch) for batch in batches]
  whole_step, trimmed_step = (make_step(config, built, found) for found in (batches, cut))
  losses = [(whole_step(), trimmed_step()) for _ in batches]  # compiles one program for each length
  seconds = seconds_in_turn({"whole": whole_step, "trimmed": trimmed_step}, args.rounds)
  found = Counter(text_length(batch) for batch in cut)
  lengths = ", ".join(f"{count} x {length}" for length, count in sorted(found.items()))
  whole, short = (1e3 * statistics.median(seconds[kind]) for kind in ("whole", "trimmed"))
  difference = max(abs(a - b) for a, b in losses)
  ratio = median_ratio(seconds["whole"], seconds["trimmed"])
  return f"{method:10}{lengths:>14}{whole:10.0f}{short:12.0f}{ratio:17.2f}{difference:17.1e}"


def read_batches(config: Any, built: build.Built, count: int) -> list[dict[str, np.ndarray]]:
  """The first batches of a run."""
  mixture = Mixture(tuple(map(open_source, config.data.train)))
  samples = pipeline.training_samples(mixture, built.make_views, config.seed)
  stream = pipeline.TrainStream(samples, config.batch_size, threads=2)
  batches = list(itertools.islice(stream, count))
  stream.close()
  return [{name: x for name, x in batch.items() if name != pipeline.BAD_COUNTS} for batch in batches]


def make_step(config: Any, built: build.Built, batches: list[dict[str, np.ndarray]]) -> Callable[[], float]:
  """A function that takes one step on the next of the batches, which repeat, and returns its loss."""
  shapes = built.batch_shape(config.batch_size)
  parts = {"model": built.model, "optimizer": built.optimizer}
  abstract = abstract_state(shapes, built.mesh, **parts)
  step = build.make_step(config, built, build.to_steps(config, epoch_examples=10**6), abstract)
  state = create_state(0, shapes, abstract, **parts)
  placed = itertools.cycle([to_global(batch, batch_sharding(built.mesh)) for batch in batches])

  def take() -> float:
    nonlocal state
    state, metrics = step(state, next(placed))
    jax.block_until_ready(state)
    return float(metrics["loss"])

  return take


def caption_lengths(name: str, args: argparse.Namespace) -> str:
  """How long the captions of a config's data are, and its batches."""
  config = read_config(name, args.methods[0])
  config.model.text.context_length = args.context_length
  built = build.build(config)
  captions = [text for spec in config.data.train for example in open_source(spec) for text in example["captions"]]
  tokens = built.tokenizer(captions)
  lengths = (tokens == built.tokenizer.eot).argmax(axis=1) + 1
  rng, lines = np.random.default_rng(0), []
  for size in BATCH_SIZES:
    longest = rng.choice(lengths, (DRAWS, size)).max(axis=1)
    mean = np.mean([trimming.trimmed_length(built.text_lengths, needed) for needed in longest])
    lines.append(f"{size:,}: {mean:.0f}")
  middle, high = np.quantile(lengths, (0.5, 0.99))
  return (
    f"{len(captions):,} captions: median {middle:.0f} tokens, 99 % at most {high:.0f}, longest {lengths.max()}; "
    f"mean length of trimmed batches by size: {', '.join(lines)}"
  )


if __name__ == "__main__":
  main()
