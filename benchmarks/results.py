"""Table and plot of finished runs, from their working directories:

python benchmarks/results.py --plot docs/fashion44k.png --metric eval/zero_shot/top1 runs/clip runs/slip runs/declip

One Markdown row a run, each score at its last evaluation. Minutes are those of the clock.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from declip_jax.config import from_json
from declip_jax.metrics import read_metrics
from declip_jax.pictures import plot_comparison

SCORES = {
  "zero-shot top-1": "eval/zero_shot/top1",
  "top-5": "eval/zero_shot/top5",
  "mean per class": "eval/zero_shot/mean_per_class",
  "image to text R@1": "eval/retrieval/image_to_text_r1",
  "R@5": "eval/retrieval/image_to_text_r5",
  "R@10": "eval/retrieval/image_to_text_r10",
  "text to image R@1": "eval/retrieval/text_to_image_r1",
  "R@5 ": "eval/retrieval/text_to_image_r5",
  "R@10 ": "eval/retrieval/text_to_image_r10",
}


def read_run(workdir: Path) -> list[dict[str, Any]]:
  """The metrics of a run and of what `declip_jax.evaluate` measured later, each row with the examples seen."""
  batch_size = from_json((workdir / "config.json").read_text()).batch_size
  later = workdir / "evaluations.jsonl"
  evaluations = [json.loads(line) for line in later.read_text().splitlines()] if later.exists() else []
  return [
    {**row, "examples": row["step"] * batch_size} for row in [*read_metrics(workdir), *evaluations] if "step" in row
  ]


def table_row(name: str, rows: list[dict[str, Any]], scores: dict[str, str]) -> str:
  """Name, pairs seen, training minutes, and the scores, in Markdown."""
  times = [row["time"] for row in rows if "time" in row]
  cells = [name, f"{rows[-1]['examples']:,.0f}", f"{(times[-1] - times[0]) / 60:.0f}"]
  for metric in scores.values():
    values = [row[metric] for row in rows if metric in row]
    cells.append(f"{values[-1]:.1%}")
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  """Prints the table and writes the plot."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("workdirs", nargs="+", type=Path)
  parser.add_argument("--plot", type=Path, help="PNG file to write")
  parser.add_argument("--metric", default="eval/zero_shot/top1", help="what to plot (default: eval/zero_shot/top1)")
  args = parser.parse_args()
  runs = {workdir.name: read_run(workdir) for workdir in args.workdirs}
  every = [row for rows in runs.values() for row in rows]
  scores = {title: name for title, name in SCORES.items() if any(name in row for row in every)}
  print("| run | pairs seen | minutes | " + " | ".join(title.strip() for title in scores) + " |")
  print("|---" * (3 + len(scores)) + "|")
  for name, rows in runs.items():
    print(table_row(name, rows, scores))
  shares = {row["eval/zero_shot/majority_share"] for row in every if "eval/zero_shot/majority_share" in row}
  if len(shares) == 1:
    print(f"\nShare of the largest class: {shares.copy().pop():.1%}")
  if args.plot:
    baselines = {"largest class": max(shares)} if shares and args.metric.endswith("top1") else {}
    plot_comparison(runs, [args.metric], args.plot, baselines)


if __name__ == "__main__":
  main()
