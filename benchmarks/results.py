"""Prints a table and plots curves of finished runs:

python benchmarks/results.py --plot docs/fashion44k.png --metric eval/zero_shot/top1 runs/clip-0 runs/clip-1 runs/slip-0

Runs whose names differ only in a final number, as in clip-0 and clip-1, are seeds of one row of the table: it has their
mean ± half the difference of the largest and the smallest. Scores are those of the last evaluation.

With --collect FILE it writes the evaluations of the runs to FILE, one JSON object per line, with the git revisions of
the run, and the means of losses and in-batch accuracies since the previous evaluation. Such a file can replace
working directories.
"""

import json
from pathlib import Path
import re
from statistics import fmean
from typing import Any

from command import parser

from declip_jax.config import from_json
from declip_jax.reporting.charts import Points, plot_training
from declip_jax.reporting.metrics import read_metrics

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
Evaluations = list[dict[str, Any]]


def read_run(workdir: Path) -> Evaluations:
  """Evaluations during a run and those of `declip_jax.evaluate` later, each with the number of examples seen."""
  batch_size = from_json((workdir / "config.json").read_text()).batch_size
  later = workdir / "results" / "results.jsonl"  # a line for each result
  evaluations: dict[int, dict[str, Any]] = {}
  for line in later.read_text().splitlines() if later.exists() else []:
    fields = json.loads(line)
    if "step" in fields:
      evaluations.setdefault(fields["step"], {}).update(fields)
  starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
  revisions = list(dict.fromkeys(start["git"] for start in starts))
  found: Evaluations = []
  training: list[dict[str, float]] = []
  for line in [*read_metrics(workdir), *evaluations.values()]:
    training.append({name: x for name, x in line.items() if name.startswith("loss") or name.endswith("_accuracy")})
    scores = {name: value for name, value in line.items() if name.startswith("eval/")}
    if "step" in line and scores:
      found.append({"git": revisions, "examples": line["step"] * batch_size, **scores, **means(training)})
      training = []
  return found


def means(lines: list[dict[str, float]]) -> dict[str, float]:
  """The mean of each metric over the lines that have it."""
  names = dict.fromkeys(name for line in lines for name in line)
  return {name: fmean(line[name] for line in lines if name in line) for name in names}


def read_runs(paths: list[Path]) -> dict[str, Evaluations]:
  """Evaluations of all runs, by the name of the run."""
  runs: dict[str, Evaluations] = {}
  for path in paths:
    if path.is_dir():
      runs[path.name] = read_run(path)
    else:
      for line in path.read_text().splitlines():
        evaluation = json.loads(line)
        runs.setdefault(evaluation.pop("run"), []).append(evaluation)
  return runs


def by_method(runs: dict[str, Evaluations]) -> dict[str, list[Evaluations]]:
  """Groups the seeds of a method: runs whose names are equal without the final number."""
  methods: dict[str, list[Evaluations]] = {}
  for name, evaluations in runs.items():
    methods.setdefault(re.sub(r"-\d+$", "", name), []).append(evaluations)
  return methods


def mean_curve(seeds: list[Evaluations], metric: str) -> Points:
  """The mean and the range of a metric over the seeds, where all of them were evaluated, by the pairs seen."""
  curves = [{each["examples"]: each[metric] for each in seed if metric in each} for seed in seeds]
  shared = sorted(set.intersection(*map(set, curves)))
  scores = [[curve[seen] for curve in curves] for seen in shared]
  ends = [(min(own), max(own)) if len(own) > 1 else None for own in scores]
  return Points(shared, [fmean(own) for own in scores], ends)


def table_row(name: str, seeds: list[Evaluations], scores: dict[str, str]) -> str:
  """A row of the table in Markdown: name, number of seeds, pairs seen, and the scores."""
  cells = [name, str(len(seeds)), f"{seeds[0][-1]['examples']:,.0f}"]
  for metric in scores.values():
    last = [[each[metric] for each in seed if metric in each][-1] for seed in seeds]
    deviation = f" ± {100 * (max(last) - min(last)) / 2:.1f}" if len(last) > 1 else ""
    cells.append(f"{100 * sum(last) / len(last):.1f}{deviation}")
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  """Prints the table and writes the plot."""
  arguments = parser(__doc__)
  arguments.add_argument("runs", nargs="+", type=Path, help="working directories, or files written with --collect")
  arguments.add_argument("--plot", type=Path, help="PNG file to write")
  arguments.add_argument(
    "--metric", default="eval/zero_shot/top1", help="metric to plot (default: eval/zero_shot/top1)"
  )
  arguments.add_argument("--collect", type=Path, help="file to write the evaluations of all runs to")
  args = arguments.parse_args()
  runs = read_runs(args.runs)
  methods = by_method(runs)
  every = [evaluation for evaluations in runs.values() for evaluation in evaluations]
  scores = {title: name for title, name in SCORES.items() if any(name in each for each in every)}
  print("| run | seeds | pairs seen | " + " | ".join(title.strip() for title in scores) + " |")
  print("|---" * (3 + len(scores)) + "|")
  for name, seeds in methods.items():
    print(table_row(name, seeds, scores))
  shares = {each["eval/zero_shot/majority_share"] for each in every if "eval/zero_shot/majority_share" in each}
  if len(shares) == 1:
    print(f"\nShare of the largest class: {shares.copy().pop():.1%}")
  if args.collect:
    lines = [json.dumps({"run": name, **each}) for name, evaluations in runs.items() for each in evaluations]
    args.collect.write_text("\n".join(lines) + "\n")
  if args.plot:
    baselines = {"largest class": max(shares)} if shares and args.metric.endswith("top1") else {}
    curves = {name: mean_curve(seeds, args.metric) for name, seeds in methods.items()}
    counts = sorted({len(seeds) for seeds in methods.values()})
    title = f"{args.plot.stem}: mean of {' or '.join(map(str, counts))} seeds, bars from the lowest to the highest"
    names = {metric: name for name, metric in SCORES.items()}
    plot_training(curves, title, args.plot, names.get(args.metric, args.metric).strip(), baselines)


if __name__ == "__main__":
  main()
