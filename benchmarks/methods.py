"""Trains every method on the demo's scenes for a few hundred steps: python benchmarks/methods.py

Prints a row per method: losses of the first and the last step, held-out zero-shot accuracy, and the deviation of the
features of each branch that could collapse (about 1 is healthy, 0 is a collapse; see `objectives.diagnostics`). A run
whose working directory exists resumes. With --check the command fails if a loss did not fall or a deviation is below
0.3.
"""

from pathlib import Path
import sys

from command import parser

from declip_jax import config_files
from declip_jax.config import duration
from declip_jax.methods import METHODS
from declip_jax.reporting.metrics import read_metrics
from declip_jax.train import train

LOWEST_DEVIATION = 0.3


def train_method(method: str, steps: int, workdir: Path) -> list[dict[str, float]]:
  """Trains `demo:method=METHOD` for `steps`; returns its metrics."""
  config = config_files.load(f"demo:method={method}")
  config.duration = duration(steps=steps)
  config.evaluate_every = config.checkpoint.every = duration()
  train(config, workdir)
  return read_metrics(workdir)


def main() -> None:
  """Trains and prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument(
    "--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS), help="methods to train (default: all)"
  )
  arguments.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
  arguments.add_argument(
    "--workdir", type=Path, default=Path("runs/methods"), help="folder of the runs (default: runs/methods)"
  )
  arguments.add_argument("--check", action="store_true", help="fail if a method collapsed or did not learn")
  args = arguments.parse_args()
  lines, failed = [], []
  for method in args.methods:
    metrics = train_method(method, args.steps, args.workdir / method)
    losses = [line["loss"] for line in metrics if "loss" in line]
    last = {name: value for line in metrics for name, value in line.items()}
    deviations = {
      name.split("/")[1]: value
      for name, value in last.items()
      if name.startswith("diag") and name.endswith("/deviation")
    }
    top1 = last.get("eval/heldout/top1")
    cells = [method, f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{top1:.1%}" if top1 is not None else ""]
    cells.append(", ".join(f"{name} {value:.2f}" for name, value in deviations.items()))
    lines.append("| " + " | ".join(cells) + " |")
    if losses[-1] >= losses[0] or min(deviations.values()) < LOWEST_DEVIATION:
      failed.append(method)
  print("\n| method | first loss | last loss | held-out top-1 | deviation of features |")
  print("|---|---|---|---|---|\n" + "\n".join(lines))
  if args.check and failed:
    sys.exit(f"collapsed or did not learn: {', '.join(failed)}")


if __name__ == "__main__":
  main()
