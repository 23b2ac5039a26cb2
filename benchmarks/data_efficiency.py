"""CLIP, SLIP and DeCLIP on 5 to 100 % of the pairs: python benchmarks/data_efficiency.py --data FOLDER

Trains and evaluates each method on each share of the pairs with each seed, for equally many steps, with
`configs/studies/data_efficiency.py`, and writes one JSON object per evaluation to --collect, with the git revisions,
the seed and the duration of its run. FOLDER has the shards of the data set, see docs/results.md.

Finished runs are not repeated, and an interrupted one resumes, so that the command can be stopped at any time. With
--only_collect it trains nothing. The figure and the factor by which a method needs fewer pairs are made by

  python -m declip_jax.report runs/data_efficiency/* --output report
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

from command import parser
from ml_collections import ConfigDict

from declip_jax import config_files
from declip_jax.configs.small import FASHION_TEMPLATES
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals import suites
from declip_jax.evals.data_files import Splits
from declip_jax.evaluate import evaluate
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.records import write
from declip_jax.train import train

TASKS = {"fashion44k": ("zero_shot", "retrieval", "linear_probe", "few_shot"), "flickr8k": ("retrieval",)}


@dataclass(frozen=True)
class Cell:
  """A run of the grid.

  Attributes:
    method: a method, or METHOD:VIEWS with other views than the default, see `configs/studies/data_efficiency.py`.
    share: share of the pairs, in percent.
    seed: random seed.
  """

  method: str
  share: float
  seed: int

  @property
  def name(self) -> str:
    """The name of its working directory."""
    return f"{self.method.replace(':', '_')}-{self.share:g}pct-{self.seed}"

  def config(self, args: argparse.Namespace) -> ConfigDict:
    """The config of the run."""
    method, _, views = self.method.partition(":")
    chosen = f",views={views}" if views else ""
    c = config_files.load(
      f"studies/data_efficiency:method={method},share={self.share:g}%,dataset={args.dataset},"
      f"data={args.data},steps={args.steps}{chosen}"
    )
    c.seed = self.seed
    return c


def cells(args: argparse.Namespace) -> Iterator[Cell]:
  """The grid, one seed after the other, so that an early stop leaves whole curves."""
  for seed in range(args.seeds):
    for share in args.shares:
      for method in args.methods:
        yield Cell(method, share, seed)


def run(cell: Cell, args: argparse.Namespace) -> None:
  """Trains and evaluates a cell, as far as this is not done yet."""
  workdir = args.workdir / cell.name
  train(cell.config(args), workdir)
  splits = Splits(*(f"webdataset:{args.data}/{split}-*.tar" for split in ("test", "train", "val")))
  prompts = args.workdir / "prompts.txt"
  write(prompts, "\n".join(FASHION_TEMPLATES).encode())
  jobs, _ = suites.make_jobs({f"own/{args.dataset}": splits}, (), TASKS[args.dataset], str(prompts))
  evaluate(workdir, jobs=jobs, cache=cache_folder() / "features")


def collect(cell: Cell, workdir: Path) -> Iterator[dict[str, Any]]:
  """The evaluations of a cell: those during training, without their predictions, and those of its last checkpoint."""
  starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
  about = {
    "run": cell.name,
    "method": cell.method,
    "share_percent": cell.share,
    "seed": cell.seed,
    "git": list(dict.fromkeys(start["git"] for start in starts)),
  }
  for line in read_metrics(workdir):
    scores = {name: value for name, value in line.items() if name.startswith("eval/")}
    if scores:
      yield {**about, "step": line["step"], "metrics": scores}
  for path in sorted((workdir / "results").glob("*.json")):
    found = json.loads(path.read_text())
    ours = found["declip_jax"]
    yield {**about, "dataset": found["dataset"], "task": found["task"], "metrics": ours["metrics"]} | {
      "intervals": ours["intervals"]
    }


def main() -> None:
  """Runs the grid and collects what is finished."""
  arguments = parser(__doc__)
  arguments.add_argument("--data", type=Path, required=True, help="folder of the shards")
  arguments.add_argument("--dataset", choices=[*TASKS], default="fashion44k", help="the data set (default: fashion44k)")
  arguments.add_argument(
    "--methods", nargs="+", default=["clip", "slip", "declip", "declip:paper"], metavar="METHOD[:VIEWS]"
  )
  arguments.add_argument("--shares", nargs="+", type=float, default=[5, 10, 25, 50, 100], help="in percent")
  arguments.add_argument("--seeds", type=int, default=3, help="seeds of each run (default: 3)")
  arguments.add_argument("--steps", type=int, default=931, help="steps of each run (default: 931)")
  arguments.add_argument("--workdir", type=Path, default=Path("runs/data_efficiency"), help="folder of the runs")
  arguments.add_argument("--collect", type=Path, default=Path("runs/data_efficiency.jsonl"), help="file of all results")
  arguments.add_argument("--only_collect", action="store_true", help="collect the results of finished runs")
  args = arguments.parse_args()
  lines: list[str] = []
  for cell in cells(args):
    workdir = args.workdir / cell.name
    if not args.only_collect:
      run(cell, args)
    if (workdir / "results").is_dir():
      lines += [json.dumps(line) for line in collect(cell, workdir)]
      args.collect.parent.mkdir(parents=True, exist_ok=True)
      write(args.collect, "".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
  main()
