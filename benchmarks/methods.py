"""Trains every method on the embedded scenes for a few hundred steps: python benchmarks/methods.py

One row a method: losses at the first and the last step, held-out zero-shot accuracy, and the deviation of the features
of each branch that could collapse (about 1 is healthy, 0 a collapse; see `objectives.diagnostics`). A run that is there
already goes on where it was. With --check the command fails if a loss did not fall or a deviation is below 0.3.
"""

import argparse
from pathlib import Path
import sys

from declip_jax import config_files
from declip_jax.config import duration
from declip_jax.methods import METHODS
from declip_jax.reporting.metrics import read_metrics
from declip_jax.train import train

LOWEST_DEVIATION = 0.3


def train_method(method: str, steps: int, workdir: Path) -> list[dict[str, float]]:
  """The metrics of a run of `demo:method=METHOD` cut to `steps`."""
  config = config_files.load(f"demo:method={method}")
  config.duration = duration(steps=steps)
  config.evaluate_every = config.checkpoint.every = duration()
  train(config, workdir)
  return read_metrics(workdir)


def main() -> None:
  """Trains and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--workdir", type=Path, default=Path("runs/methods"), help="where the runs lie")
  parser.add_argument("--check", action="store_true", help="fail if a method collapsed or did not learn")
  args = parser.parse_args()
  lines, sick = [], []
  for method in args.methods:
    rows = train_method(method, args.steps, args.workdir / method)
    losses = [row["loss"] for row in rows if "loss" in row]
    last = {name: value for row in rows for name, value in row.items()}
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
      sick.append(method)
  print("\n| method | first loss | last loss | held-out top-1 | deviation of features |")
  print("|---|---|---|---|---|\n" + "\n".join(lines))
  if args.check and sick:
    sys.exit(f"collapsed, or did not learn: {', '.join(sick)}")


if __name__ == "__main__":
  main()
