"""Fine-tuning on pairs, whole and by low-rank adapters: python benchmarks/finetune_pairs.py --data FOLDER

FOLDER has `fashion44k` and `flickr8k`, each with WebDataset shards (docs/results.md). A small model like SigLIP is
pretrained once on fashion44k: the sigmoid loss, attention pooling, whole images resized to a square. For each of three
seeds it is then fine-tuned on flickr8k, all of it, adapters, and adapters in attention and MLP; and a model is trained
from scratch in as many steps. It prints the mean recall on flickr8k's and fashion44k's test images before and after,
mean ± standard deviation over the seeds.

Finished runs are not repeated, and an interrupted one resumes.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev

from command import parser
from ml_collections import ConfigDict

from declip_jax import architectures, config, config_files
from declip_jax.reporting.metrics import read_metrics
from declip_jax.train import train

EPOCHS = 10.0
# Fields of each way to train on flickr8k, besides those of the config; the learning rates are for a small model.
WAYS: dict[str, dict[str, object]] = {
  "whole": {"optimizer.learning_rate": 3e-4},
  "adapters": {"optimizer.learning_rate": 3e-3, "lora.rank": 8},
  "adapters, MLP too": {
    "optimizer.learning_rate": 3e-3,
    "lora.rank": 8,
    "lora.targets": ("query", "key", "value", "out", "fc1", "fc2"),
  },
  "from scratch": {"optimizer.learning_rate": 1e-3, "init_from.path": "", "safety.spike_factor": 0.0},
}
EVALUATIONS = ("flickr8k", "fashion44k")


def pretrain(folder: Path, workdir: Path) -> Path:
  """The working directory of the model that is fine-tuned; trains it if needed."""
  c = config_files.load(f"small:method=siglip,dataset=fashion44k,data={folder / 'fashion44k'}")
  c.model.image.update(architectures.SIGLIP)
  c.model.text.update({"causal": False, "pooling": "last", "activation": "gelu_tanh", "epsilon": 1e-6})
  c.model.heads.image_linear = False
  c.model.mean = c.model.std = (0.5, 0.5, 0.5)
  c.data.squash = True
  c.evals = ConfigDict()
  train(c, workdir / "base")
  return workdir / "base"


def tuning_config(way: str, init: Path, folder: Path, seed: int) -> ConfigDict:
  """The config of a run that continues from `init` in one of `WAYS`."""
  sources = {name: f"webdataset:{folder / name}" for name in EVALUATIONS}
  c = config_files.load(f"finetune_pairs:init={init},data={sources['flickr8k']}/train-*.tar,epochs={EPOCHS}")
  c.data.train = (f"{sources['flickr8k']}/train-*.tar",)
  c.evals = ConfigDict(
    {name: config.retrieval(f"{sources[name]}/test-*.tar", equal_texts=True) for name in EVALUATIONS}
  )
  c.checkpoint.best_metric = "eval/flickr8k/mean_recall"
  c.batch_size, c.seed, c.data.threads, c.evaluate_batch_size = 128, seed, 2, 256
  c.evaluate_every = c.checkpoint.every = config.duration()  # only before the first step and at the end
  c.update_from_flattened_dict(WAYS[way])
  return c


def before_and_after(run: Path) -> dict[str, tuple[float, float]]:
  """The mean recall of each evaluation of a run, before the first step and after the last."""
  lines = read_metrics(run)
  found = {}
  for name in EVALUATIONS:
    values = [line[f"eval/{name}/mean_recall"] for line in lines if f"eval/{name}/mean_recall" in line]
    found[name] = (values[0], values[-1])
  return found


def row(way: str, seeds: list[Mapping[str, tuple[float, float]]]) -> str:
  """A row of a table in Markdown, in per cent."""
  cells = [way]
  for name in EVALUATIONS:
    for time in range(2):
      values = [100 * scores[name][time] for scores in seeds]
      cells.append(f"{fmean(values):.1f}{f' ± {stdev(values):.1f}' if len(values) > 1 else ''}")
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  """Trains what is missing and prints the table."""
  arguments = parser(__doc__)
  arguments.add_argument("--data", type=Path, required=True, help="folder of the data sets")
  arguments.add_argument("--seeds", type=int, default=3, help="seeds of each run (default: 3)")
  arguments.add_argument(
    "--workdir",
    type=Path,
    default=Path("runs/finetune_pairs"),
    help="folder of the runs (default: runs/finetune_pairs)",
  )
  args = arguments.parse_args()
  init = pretrain(args.data, args.workdir)
  columns = [f"{name} {time}" for name in EVALUATIONS for time in ("before", "after")]
  print(f"| trained | {' | '.join(columns)} |\n|---" + "|---" * len(columns) + "|")
  for number, way in enumerate(WAYS):
    scores = []
    for seed in range(args.seeds):
      run = args.workdir / f"{number}-{seed}"
      train(tuning_config(way, init, args.data, seed), run)
      scores.append(before_and_after(run))
    print(row(way, scores), flush=True)


if __name__ == "__main__":
  main()
