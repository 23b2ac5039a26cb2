"""CLIP, SLIP and DeCLIP on 5 to 100 % of the pairs: python benchmarks/data_efficiency.py --data FOLDER

Trains and evaluates each method on each share of the pairs with each seed, for equally many steps, with
`configs/studies/data_efficiency.py`. FOLDER has the shards of the data set, see docs/results.md. --results receives a
line of JSON for each finished run, with its git revisions, its cost and all that `declip_jax.evaluate` found.

A method is METHOD, METHOD:VIEWS with other views than the default, or METHOD:VIEWS:FIELD=VALUE;FIELD=VALUE with other
fields of the config, too. NAME@ in front of it is its name in --results and in tables:

  --methods clip declip:paper "wide@filip::model.heads.dense_dim=256" "half@clip::stages.low.duration.share=0.8;..."

At the end the command prints the means over the seeds, and how much each method differs from the first of --methods.
It can be stopped at any time: an interrupted run resumes, and what is in --results is not trained again, even
if its working directory is gone; its results are then written there once more. The figure, and the factor by which a
method needs fewer pairs, are made by

  python -m declip_jax.report runs/data_efficiency/fashion44k/* --output report
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
import json
from pathlib import Path
import re
from statistics import fmean, stdev
from typing import Any

from command import parser
from ml_collections import ConfigDict
import numpy as np

from declip_jax import config_files
from declip_jax.config import stage
from declip_jax.configs.small import FASHION_TEMPLATES
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals import results, suites
from declip_jax.evals.data_files import Splits
from declip_jax.evals.intervals import student
from declip_jax.evaluate import evaluate
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.records import read_lines, write, write_lines
from declip_jax.runtime.workdir import read_starts
from declip_jax.train import train
from declip_jax.weights.settings import parse_settings

COLUMNS = {  # of the table: the task and the metric
  "zero-shot top-1": ("zeroshot_classification", "top1"),
  "mean per class": ("zeroshot_classification", "mean_per_class"),
  "image to text R@10": ("zeroshot_retrieval", "image_to_text_r10"),
  "text to image R@10": ("zeroshot_retrieval", "text_to_image_r10"),
  "linear probe": ("linear_probe", "top1"),
  "5 shots": ("few_shot", "shots_5"),
}
MEAN = "mean"  # of the four scores in IN_MEAN; the two recalls are one of them
IN_MEAN = (("mean per class",), ("image to text R@10", "text to image R@10"), ("linear probe",), ("5 shots",))
OPTIONS = {
  "fashion44k": ("retrieval.equal_texts=True", "few_shot.shots=1,5"),  # titles of products repeat
  "flickr8k": (),
}
SPLITS = {"test": ("test", "train", "val"), "val": ("val", "train")}  # evaluated, and for probes training, validation
TASKS = {"fashion44k": ("zero_shot", "retrieval", "linear_probe", "few_shot"), "flickr8k": ("retrieval",)}


@dataclass(frozen=True)
class Cell:
  """A run of the grid.

  Attributes:
    spec: METHOD, METHOD:VIEWS or METHOD:VIEWS:FIELD=VALUE;FIELD=VALUE, see `configs/studies/data_efficiency.py`; no
      VIEWS are the default ones. NAME@ may be in front of it.
    share: share of the pairs, in percent.
    seed: random seed.
  """

  spec: str
  share: float
  seed: int

  @property
  def method(self) -> str:
    """What it is called in tables."""
    name, at, spec = self.spec.partition("@")
    return name if at else self.spec

  @property
  def name(self) -> str:
    """The name of its working directory."""
    return f"{re.sub('[^A-Za-z0-9.=_]+', '_', self.method)}-{self.share:g}pct-{self.seed}"

  def config(self, args: argparse.Namespace) -> ConfigDict:
    """The config of the run."""
    method, views, fields = (*self.spec.rpartition("@")[2].split(":", 2), "", "")[:3]
    chosen = f",views={views}" if views else ""
    c = config_files.load(
      f"studies/data_efficiency:method={method},share={self.share:g}%,dataset={args.dataset},"
      f"data={args.data},steps={args.steps}{chosen}"
    )
    settings = parse_settings(fields.split(";") if fields else (), "--methods")
    for name in {field.split(".")[1] for field in settings if field.startswith("stages.")}:
      c.stages[name] = stage()
    c.update_from_flattened_dict(settings)
    c.seed = self.seed
    return c


def cells(args: argparse.Namespace) -> Iterator[Cell]:
  """The grid, one seed after the other, so that an early stop leaves whole curves."""
  for seed in range(args.seeds):
    for share in args.shares:
      for method in args.methods:
        yield Cell(method, share, seed)


def run(cell: Cell, workdir: Path, args: argparse.Namespace) -> None:
  """Trains and evaluates a cell, as far as this is not done yet."""
  train(cell.config(args), workdir)
  splits = Splits(*(f"webdataset:{args.data}/{split}-*.tar" for split in SPLITS[args.split]))
  prompts = args.workdir / "prompts.txt"
  write(prompts, "\n".join(FASHION_TEMPLATES).encode())
  options = [option for option in OPTIONS[args.dataset] if option.partition(".")[0] in args.tasks]
  jobs, _ = suites.make_jobs({f"own/{args.dataset}": splits}, (), args.tasks, str(prompts), options)
  evaluate(workdir, jobs=jobs, cache=cache_folder() / "features")


def collect(cell: Cell, workdir: Path, args: argparse.Namespace) -> dict[str, Any]:
  """The line of a finished run: what it is, its cost, its scores during training, and its results."""
  lines = read_metrics(workdir)
  steps = [line for line in lines if "time/step" in line]
  return {
    "run": cell.name,
    "method": cell.method,
    "spec": cell.spec,
    "share_percent": cell.share,
    "seed": cell.seed,
    "steps": args.steps,
    "git": list(dict.fromkeys(start.git for start in read_starts(workdir))),
    "end_of_training": {
      name: fmean(line[name] for line in steps if name in line and line["step"] > 0.9 * steps[-1]["step"])
      for name in steps[-1]
      if name.startswith("loss") or name.endswith(("accuracy", "temperature"))
    },
    "during_training": [
      {name: value for name, value in line.items() if name == "step" or name.startswith("eval/")}
      for line in lines
      if any(name.startswith("eval/") for name in line)
    ],
    "results": [json.loads(result.to_json()) for _, result in results.read_all([workdir / "results"])],
  }


def restore(line: Mapping[str, Any], workdir: Path) -> None:
  """Writes the results of a finished run whose working directory is gone, without predictions."""
  if not (workdir / "results").is_dir():
    for result in line["results"]:
      results.write(workdir / "results", results.parse(json.dumps(result).encode()), {})


def scores(line: Mapping[str, Any]) -> dict[str, float]:
  """The scores of a finished run that the table shows, in percent, by their titles; only those that it has."""
  found = {one["task"]: one["declip_jax"]["metrics"] for one in line["results"]}
  own = {title: 100 * found[task][metric] for title, (task, metric) in COLUMNS.items() if metric in found.get(task, {})}
  has_all = all(title in own for titles in IN_MEAN for title in titles)
  return own | ({MEAN: fmean(fmean(own[title] for title in titles) for titles in IN_MEAN)} if has_all else {})


def table(lines: Iterable[Mapping[str, Any]]) -> str:
  """Markdown of the means over the seeds of each method and share, ± the standard deviation of several."""
  groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
  for line in sorted(lines, key=lambda line: (line["share_percent"], line["method"], line["seed"])):
    groups.setdefault((line["method"], line["share_percent"]), []).append(line)
  every = [[scores(line) for line in group] for group in groups.values()]
  titles = [title for title in (*COLUMNS, MEAN) if any(title in run for runs in every for run in runs)]
  rows = [["method", "share", "pairs", "epochs", "TFLOPs", "seeds", *titles]]
  for ((method, share), group), runs in zip(groups.items(), every, strict=True):
    training = group[0]["results"][0]["declip_jax"]["training"]
    about = [method, f"{share:g} %", f"{training['unique_pairs']:,}", f"{training['epochs']:.0f}"]
    cost = f"{training['flops'] / 1e12:.1f}"
    rows.append(
      [*about, cost, str(len(group)), *(_mean([run[title] for run in runs if title in run]) for title in titles)]
    )
  rows.insert(1, ["---"] * len(rows[0]))
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(lines: Iterable[Mapping[str, Any]], reference: str) -> str:
  """Markdown of how much each method is better than another one with the same share and seeds, in percentage points.

  Only where both have two or more seeds in common: the mean of the paired differences, ± half of its 95 % interval by
  Student's t. Bold ones differ significantly.
  """
  runs: dict[tuple[str, float], dict[int, dict[str, float]]] = {}
  for line in sorted(lines, key=lambda line: (line["share_percent"], line["method"], line["seed"])):
    runs.setdefault((line["method"], line["share_percent"]), {})[line["seed"]] = scores(line)
  known = {title for own in runs.values() for run in own.values() for title in run}
  titles = [title for title in (*COLUMNS, MEAN) if title in known]
  rows = [[f"minus {reference}", "share", "seeds", *titles], ["---"] * (3 + len(titles))]
  for (method, share), own in runs.items():
    others = runs.get((reference, share), {})
    seeds = sorted(own.keys() & others.keys())
    if method != reference and len(seeds) > 1:
      found = ([own[seed][title] - others[seed][title] for seed in seeds] for title in titles)
      rows.append([method, f"{share:g} %", str(len(seeds)), *map(_paired, found)])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def _paired(values: Sequence[float]) -> str:
  """The mean and half of its interval, bold if the interval excludes 0."""
  low, high = student(np.asarray(values))
  text = f"{fmean(values):+.1f} ± {(high - low) / 2:.1f}"
  return f"**{text}**" if low > 0 or high < 0 else text


def _mean(values: Sequence[float]) -> str:
  return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "") if values else ""


def main() -> None:
  """Runs the grid, collects what is finished, and prints the tables of all that is."""
  arguments = parser(__doc__)
  arguments.add_argument("--data", type=Path, required=True, help="folder of the shards")
  arguments.add_argument("--dataset", choices=[*TASKS], default="fashion44k", help="the data set (default: fashion44k)")
  arguments.add_argument(
    "--methods", nargs="+", default=["clip", "slip@slip:paper", "declip", "declip:paper"], metavar="METHOD"
  )
  arguments.add_argument("--shares", nargs="+", type=float, default=[5, 10, 25, 50, 100], help="in percent")
  arguments.add_argument("--seeds", type=int, default=3, help="seeds of each run (default: 3)")
  arguments.add_argument(
    "--tasks", nargs="+", choices=[*TASKS["fashion44k"]], help="what to evaluate (default: all that fits the data set)"
  )
  arguments.add_argument("--split", choices=[*SPLITS], default="test", help="split to evaluate (default: test)")
  arguments.add_argument("--steps", type=int, default=500, help="steps of each run (default: 500)")
  folder = Path("runs/data_efficiency")
  arguments.add_argument("--workdir", type=Path, help=f"folder of the runs (default: {folder}/DATASET)")
  arguments.add_argument("--results", type=Path, help=f"file of all results (default: {folder}/DATASET.jsonl)")
  args = arguments.parse_args()
  args.tasks = args.tasks or TASKS[args.dataset]
  args.workdir = args.workdir or folder / args.dataset
  args.results = args.results or folder / f"{args.dataset}.jsonl"
  finished = {line["run"]: line for line in read_lines(args.results, dict)}
  if others := {line["steps"] for line in finished.values()} - {args.steps}:
    arguments.error(f"{args.results} has runs of {min(others)} steps, not {args.steps}: choose another --results")
  for cell in cells(args):
    workdir = args.workdir / cell.name
    if cell.name in finished:
      restore(finished[cell.name], workdir)
      continue
    run(cell, workdir, args)
    finished[cell.name] = collect(cell, workdir, args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_lines(args.results, finished.values())
  print(table(finished.values()))
  if paired := differences(finished.values(), Cell(args.methods[0], 0, 0).method):
    print(f"\n{paired}")


if __name__ == "__main__":
  main()
