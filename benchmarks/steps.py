"""Time, memory and FLOPs of one train step of each method on the same towers: python benchmarks/steps.py

Each row is the median of several steps after compilation, on all devices, with a fixed batch: no input pipeline, and no
diagnostics, which training runs only every `log_every` steps. The methods are timed in turn, round after round, and
compared with CLIP's step of the same round: step time (the median of these ratios), temporary memory of the compiled
step, and the FLOPs of its matrix products and convolutions (`flops.num_flops`). The last column is the relative time
divided by the relative FLOPs: above 1, a step does work that FLOPs do not include.

On a CPU, export the Makefile's GLIBC_TUNABLES first: otherwise the kernel clears the memory of each step page by page,
which slows down the methods with the most memory.

METHOD_repo is what DeCLIP's released code does under that name. Texts have the whole context length;
benchmarks/text_length.py times steps on trimmed ones.

With --beside PATH it times the steps of another source tree, such as a checkout of an older commit, in alternation with
this one, and prints both times and their ratio for each method. The other tree needs benchmarks/step_worker.py, or
--beside-worker names a script that follows its protocol.
"""

import argparse
from pathlib import Path
import statistics

from command import parser
import jax
from rounds import median_ratio, seconds_in_turn
from train_step import TrainStep, make_train_step, read_config
import two_trees

from declip_jax.methods import METHODS

RELEASED = ("declip_repo", "filip_repo", "defilip_repo")


def main() -> None:
  """Prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument(
    "--config",
    default="demo",
    help="a config with an argument `method`, such as demo (the default) or small:dataset=flickr8k",
  )
  arguments.add_argument("--methods", nargs="+", help="methods besides clip (default: all that the config accepts)")
  arguments.add_argument("--batch-size", type=int, help="pairs per step (default: as in the config)")
  arguments.add_argument("--context-length", type=int, help="tokens of a text (default: as in the config)")
  arguments.add_argument("--rounds", type=int, default=10, help="timed steps of each method (default: 10)")
  arguments.add_argument("--beside", type=Path, metavar="PATH", help="another source tree to compare with this one")
  arguments.add_argument("--beside-worker", type=Path, metavar="FILE", help="worker script for that tree")
  args = arguments.parse_args()
  methods = list(dict.fromkeys(["clip", *(args.methods or [*METHODS, *RELEASED])]))
  if args.beside:
    if args.context_length:
      arguments.error("--beside does not support --context-length")
    worker = args.beside_worker and args.beside_worker.resolve()
    methods = args.methods or methods
    two_trees.compare(args.beside.resolve(), worker, args.config, methods, args.batch_size, args.rounds)
    return
  try:
    steps = compile_steps(methods, args)
  except ValueError as error:
    arguments.error(str(error))
  seconds = seconds_in_turn(steps, args.rounds + 1)
  print_table(steps, {name: times[1:] for name, times in seconds.items()})  # the first round warms up


def compile_steps(methods: list[str], args: argparse.Namespace) -> dict[str, TrainStep]:
  """The compiled steps by name; skips methods that the config does not accept, unless they were asked for."""
  steps: dict[str, TrainStep] = {}
  for method in methods:
    try:
      config = read_config(args.config, method)
      config.batch_size = args.batch_size or config.batch_size
      config.model.text.context_length = args.context_length or config.model.text.context_length
      steps[method] = make_train_step(config)
    except ValueError as error:
      if args.methods:
        raise ValueError(f"{method}: {error}") from error
      print(f"without {method}: {str(error).partition(':')[0]}")
  return steps


def print_table(steps: dict[str, TrainStep], seconds: dict[str, list[float]]) -> None:
  """Prints a row for each step."""
  clip, batch_size = steps["clip"], len(steps["clip"].batch["image"])
  print(f"{batch_size} pairs per step, {jax.device_count()} x {jax.devices()[0].device_kind}")
  print(f"{'':13}{'compile s':>10}{'step ms':>9}{'pairs/s':>9}{'temporary MiB':>15}{'GFLOPs':>9}", end="")
  print(f"{'time x CLIP':>13}{'memory x CLIP':>15}{'FLOPs x CLIP':>14}{'time / FLOPs':>14}")
  for name, step in steps.items():
    flops, time = step.program.executed_flops, statistics.median(seconds[name])
    time_ratio = median_ratio(seconds[name], seconds["clip"])
    flops_ratio = flops / clip.program.executed_flops
    print(f"{name:13}{step.compile_seconds:10.1f}{1e3 * time:9.0f}{batch_size / time:9.0f}", end="")
    print(f"{step.memory:15.0f}{flops / 1e9:9.2f}{time_ratio:13.2f}{step.memory / clip.memory:15.2f}", end="")
    print(f"{flops_ratio:14.2f}{time_ratio / flops_ratio:14.2f}")


if __name__ == "__main__":
  main()
