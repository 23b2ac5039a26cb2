"""Fine-tuning from a pretrained image tower against training from scratch: python benchmarks/finetune.py --data FOLDER

FOLDER has `fashion44k`, `flickr8k` and `pacs`, each with WebDataset shards and class names (docs/results.md). For each
of three seeds it trains three runs per data set on two CPU cores: from CLIP, which is pretrained once on fashion44k for
itself and on flickr8k for PACS; from scratch; and from CLIP with the zero-shot classifier, for WiSE-FT. On PACS it
trains with photos and tests on all four domains. It prints a table of accuracies, mean ± standard deviation over the
seeds, and those of mixtures of the weights before and after fine-tuning (WiSE-FT), which --plot draws.

Finished runs are not repeated, and an interrupted one resumes.
"""

from collections.abc import Mapping
import json
from pathlib import Path
from statistics import fmean, stdev

from command import parser
from ml_collections import ConfigDict
import numpy as np

from declip_jax import build, config, config_files
from declip_jax.clip import load
from declip_jax.data.deaths import Deaths
from declip_jax.evals.intervals import student
from declip_jax.first_state import first_state, read_weights
from declip_jax.reporting.charts import Points, plot_interpolation
from declip_jax.train import train
from declip_jax.training.state import abstract_state
from declip_jax.weights.interpolate import interpolate

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
STARTS = ("CLIP", "scratch", "CLIP, zero-shot classifier")
PRETRAINED_ON = {"fashion44k": "fashion44k", "pacs": "flickr8k"}
EPOCHS = {"fashion44k": 0.5, "pacs": 15.0}  # 20,000 images each
Scores = dict[str, float]


def sources(dataset: str, folder: Path) -> tuple[str, dict[str, str]]:
  """The source to train on, and those to test on by their names."""
  shards = f"webdataset:{folder / dataset}"
  if dataset == "pacs":
    return f"{shards}/photo-train-*.tar", {domain: f"{shards}/{domain}-test-*.tar" for domain in DOMAINS}
  return f"{shards}/train-*.tar", {"test": f"{shards}/test-*.tar"}


def pretrain(dataset: str, folder: Path, workdir: Path) -> Path:
  """The working directory of a CLIP run on captioned images; trains it if needed."""
  run = workdir / f"clip-{dataset}"
  c = config_files.load(f"small:method=clip,dataset={dataset},data={folder / dataset}")
  c.evals = ConfigDict()
  train(c, run)
  return run


def finetune_config(dataset: str, start: str, init: Path, folder: Path, seed: int) -> ConfigDict:
  """The config of a run that starts in one of the ways in `STARTS`."""
  data, tests = sources(dataset, folder)
  head = "text" if start == STARTS[2] else "random"
  c = config_files.load(f"finetune:init={init},data={data},head={head},batch_size=128")
  c.duration, c.optimizer.warmup = (config.duration(epochs=share * EPOCHS[dataset]) for share in (1.0, 0.2))
  c.seed = seed
  c.data.threads = 2
  c.data.rand_magnitude, c.data.mixup, c.data.cutmix = 5.0, 0.0, 0.0  # milder, for small images and few epochs
  c.data.evaluation_resize, c.model.drop_path = 0, 0.0
  c.optimizer.learning_rate = 1e-3
  if start == "scratch":
    c.init_from.path, c.optimizer.layer_decay = "", 1.0
  c.evaluate_every = c.checkpoint.every = config.duration()  # only at the end
  c.evaluate_batch_size = 256
  for name, source in tests.items():
    c.evals[name] = config.classify(source)
  return c


def evaluate_mixtures(run: Path) -> dict[str, Scores]:
  """Scores of mixtures of a run's first and last weights, by the share of the last, 0 to 1 in steps of 0.05.

  Written to `mixtures.json` in the working directory, and read from there if it exists.
  """
  saved = run / "mixtures.json"
  if saved.exists():
    return json.loads(saved.read_text())
  c = config.from_json((run / "config.json").read_text())
  built, last = build.build(c), load(run)
  shapes = built.batch_shape(c.batch_size)
  abstract = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
  first, _ = first_state(c, built, abstract, read_weights(c))
  evaluate, encoders = build.make_evaluators(c.evals, run), build.make_encoders(c, built, Deaths())
  found = {}
  for step in range(21):
    params = interpolate(first.params, last.params, step / 20)
    found[f"{step / 20:.2f}"] = evaluate(encoders.bind(params, last.collections), 0)
  saved.write_text(json.dumps(found))
  return found


def row(name: str, seeds: list[Scores], tests: list[str]) -> str:
  """A row of a table in Markdown: mean and standard deviation over seeds, in per cent."""
  cells = [name]
  for test in tests:
    values = [100 * scores[f"eval/{test}/top1"] for scores in seeds]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    cells.append(f"{fmean(values):.1f}{spread}")
  return "| " + " | ".join(cells) + " |"


def table(title: str, rows: Mapping[str, list[Scores]], tests: list[str]) -> None:
  """Prints a table in Markdown."""
  print(f"\n| {title} | " + " | ".join(tests) + " |\n" + "|---" * (1 + len(tests)) + "|")
  for name, seeds in rows.items():
    print(row(name, seeds, tests))


def curves(mixtures: Mapping[str, list[Scores]], tests: list[str]) -> dict[str, Points]:
  """Accuracies by the share of the fine-tuned weights, with intervals over seeds, by test set."""
  found = {}
  for test in tests:
    values = [np.array([scores[f"eval/{test}/top1"] for scores in seeds]) for seeds in mixtures.values()]
    ends = [student(seeds) if len(seeds) > 1 else None for seeds in values]
    found[test] = Points([float(share) for share in mixtures], [float(seeds.mean()) for seeds in values], ends)
  return found


def main() -> None:
  """Trains what is missing and prints the tables."""
  arguments = parser(__doc__)
  arguments.add_argument("--data", type=Path, required=True, help="folder of the data sets")
  arguments.add_argument(
    "--datasets", nargs="+", choices=[*PRETRAINED_ON], default=[*PRETRAINED_ON], help="data sets to train on"
  )
  arguments.add_argument("--seeds", type=int, default=3, help="seeds of each run (default: 3)")
  arguments.add_argument(
    "--workdir", type=Path, default=Path("runs/finetune"), help="folder of the runs (default: runs/finetune)"
  )
  arguments.add_argument("--plot", type=Path, help="PNG file for the curves of the mixtures")
  args = arguments.parse_args()
  drawn: dict[str, dict[str, Points]] = {}
  for dataset in args.datasets:
    init, tests = pretrain(PRETRAINED_ON[dataset], args.data, args.workdir), [*sources(dataset, args.data)[1]]
    rows: dict[str, list[Scores]] = {start: [] for start in STARTS}
    mixtures: dict[str, list[Scores]] = {}
    for seed in range(args.seeds):
      for number, start in enumerate(STARTS):
        run = args.workdir / f"{dataset}-{number}-{seed}"
        rows[start].append(train(finetune_config(dataset, start, init, args.data, seed), run))
        for share, scores in evaluate_mixtures(run).items() if start == STARTS[2] else ():
          mixtures.setdefault(share, []).append(scores)
    table(f"{dataset}: start", rows, tests)
    table(f"{dataset}: share of the fine-tuned weights", mixtures, tests)
    drawn[dataset] = curves(mixtures, tests)
  if args.plot:
    plot_interpolation(drawn, {}, ("", ""), args.plot)


if __name__ == "__main__":
  main()
