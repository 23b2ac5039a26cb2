"""Table and plot of finished runs, from their working directories:

python benchmarks/results.py --plot docs/fashion44k.png --metric eval/zero_shot/top1 runs/clip-0 runs/clip-1 runs/slip-0

Runs whose names differ in a number behind a dash are seeds of one row: the row has their mean and, behind ±, half of
what the largest and the smallest lie apart. Each score is that of the last evaluation.

With --collect FILE the evaluations of the runs are written to FILE, one JSON object a line, with the git revisions that
the run has seen, and the means of losses and accuracies in the batch since the evaluation before. It can be given in
place of a working directory.
"""

import argparse
import json
from pathlib import Path
import re
from statistics import fmean
from typing import Any

from declip_jax.config import from_json
from declip_jax.reporting.metrics import read_metrics
from declip_jax.reporting.pictures import plot_comparison

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
Rows = list[dict[str, Any]]


def read_run(workdir: Path) -> Rows:
  """The evaluations of a run and of what `declip_jax.evaluate` measured later, each with the examples seen."""
  batch_size = from_json((workdir / "config.json").read_text()).batch_size
  later = workdir / "evaluations.jsonl"
  evaluations = [json.loads(line) for line in later.read_text().splitlines()] if later.exists() else []
  starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
  revisions = list(dict.fromkeys(start["git"] for start in starts))
  rows: Rows = []
  logged: Rows = []
  for row in [*read_metrics(workdir), *evaluations]:
    logged.append({name: x for name, x in row.items() if name.startswith("loss") or name.endswith("_accuracy")})
    scores = {name: value for name, value in row.items() if name.startswith("eval/")}
    if "step" in row and scores:
      rows.append({"git": revisions, "examples": row["step"] * batch_size, **scores, **means(logged)})
      logged = []
  return rows


def means(rows: Rows) -> dict[str, float]:
  """The mean of each number over the rows that have it."""
  names = dict.fromkeys(name for row in rows for name in row)
  return {name: fmean(row[name] for row in rows if name in row) for name in names}


def read_runs(paths: list[Path]) -> dict[str, Rows]:
  """The evaluations of all runs, by name."""
  runs: dict[str, Rows] = {}
  for path in paths:
    if path.is_dir():
      runs[path.name] = read_run(path)
    else:
      for line in path.read_text().splitlines():
        row = json.loads(line)
        runs.setdefault(row.pop("run"), []).append(row)
  return runs


def by_method(runs: dict[str, Rows]) -> dict[str, list[Rows]]:
  """The runs of each row of the table: those whose names are the same without the seed."""
  methods: dict[str, list[Rows]] = {}
  for name, rows in runs.items():
    methods.setdefault(re.sub(r"-\d+$", "", name), []).append(rows)
  return methods


def mean_curve(seeds: list[Rows], metric: str) -> Rows:
  """The mean of a metric over the seeds, at each number of examples that all of them reached."""
  curves = [{row["examples"]: row[metric] for row in rows if metric in row} for rows in seeds]
  shared = sorted(set.intersection(*map(set, curves)))
  return [{"examples": seen, metric: sum(curve[seen] for curve in curves) / len(curves)} for seen in shared]


def table_row(name: str, seeds: list[Rows], scores: dict[str, str]) -> str:
  """Name, seeds, pairs seen, and the scores, in Markdown."""
  cells = [name, str(len(seeds)), f"{seeds[0][-1]['examples']:,.0f}"]
  for metric in scores.values():
    last = [[row[metric] for row in rows if metric in row][-1] for rows in seeds]
    spread = f" ± {100 * (max(last) - min(last)) / 2:.1f}" if len(last) > 1 else ""
    cells.append(f"{100 * sum(last) / len(last):.1f}{spread}")
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  """Prints the table and writes the plot."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="+", type=Path, help="working directories, or files written with --collect")
  parser.add_argument("--plot", type=Path, help="PNG file to write")
  parser.add_argument("--metric", default="eval/zero_shot/top1", help="what to plot (default: eval/zero_shot/top1)")
  parser.add_argument("--collect", type=Path, help="file to which the evaluations of all given runs are written")
  args = parser.parse_args()
  runs = read_runs(args.runs)
  methods = by_method(runs)
  every = [row for rows in runs.values() for row in rows]
  scores = {title: name for title, name in SCORES.items() if any(name in row for row in every)}
  print("| run | seeds | pairs seen | " + " | ".join(title.strip() for title in scores) + " |")
  print("|---" * (3 + len(scores)) + "|")
  for name, seeds in methods.items():
    print(table_row(name, seeds, scores))
  shares = {row["eval/zero_shot/majority_share"] for row in every if "eval/zero_shot/majority_share" in row}
  if len(shares) == 1:
    print(f"\nShare of the largest class: {shares.copy().pop():.1%}")
  if args.collect:
    lines = [json.dumps({"run": name, **row}) for name, rows in runs.items() for row in rows]
    args.collect.write_text("\n".join(lines) + "\n")
  if args.plot:
    baselines = {"largest class": max(shares)} if shares and args.metric.endswith("top1") else {}
    curves = {name: mean_curve(seeds, args.metric) for name, seeds in methods.items()}
    plot_comparison(curves, [args.metric], args.plot, baselines)


if __name__ == "__main__":
  main()
