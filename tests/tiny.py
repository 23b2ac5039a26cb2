"""A config whose steps take milliseconds, shared by the tests of the trainer."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from declip_jax import architectures, config
from declip_jax.objectives import make_objective


def tiny_config(method: str, **data: object) -> ConfigDict:
  """A method, or the released METHOD_repo, on the demo's scenes: 16 pairs per step, 8 steps, as small as possible."""
  released = method.endswith("_repo")
  c = config.default(method.removesuffix("_repo"), preset="repo" if released else "paper")
  if released:  # two GPUs
    c.model.heads.norm_groups = c.model.heads.bank_groups = 2
    c.objective.filip.top_k = 3
    c.data.evaluation_resize = 0
  c.batch_size = 16
  c.duration = config.duration(steps=8)
  c.data.train = ("scenes:train/256/24",)
  c.data.image_size = 16
  c.data.threads = 2
  c.data.mask_slots = 3
  c.data.update(data)
  c.model.dtype = "float32"
  c.model.image = architectures.vit(patch=8, width=32, depth=2, heads=2)
  c.model.text.update({"width": 16, "depth": 2, "heads": 2, "context_length": 16})
  c.model.heads.update({"embed_dim": 16, "bank_size": 32, "simclr_projector": (32, 32, 16)})
  c.model.heads.update({"simsiam_projector": (32, 32, 32), "simsiam_predictor": (16, 32)})
  c.model.heads.update({"momentum_projector": (32, 32, 16), "momentum_predictor": (32, 16), "dense_dim": 16})
  c.optimizer.warmup = config.duration(steps=2)
  c.model.heads.num_classes = 70  # of the scenes
  c.model.drop_path = 0.2 if method == "finetune" else 0.0
  c.log_every = 1
  c.evaluate_every = config.duration(steps=100)
  c.evaluate_batch_size = 16
  c.checkpoint.every = config.duration(steps=2)
  if "joint" not in make_objective(c.objective.to_dict()).heads:
    return c
  c.evals.heldout = config.zero_shot("scenes:heldout/40/24")
  c.evals.retrieval = config.retrieval("scenes:test/20/24")
  return c


def get_config(arg: str = "declip") -> ConfigDict:
  """Lets the commands load this file as a config: METHOD or, without evaluations, METHOD,bare."""
  method, _, bare = arg.partition(",")
  c = tiny_config(method)
  if bare:
    c.evals = ConfigDict()
    c.checkpoint.every = config.duration(steps=4)
  return c


class FinishedRun(NamedTuple):
  """A run that was trained to its end.

  Attributes:
    workdir: working directory; copy it before changing anything in it.
    config: its config.
    final: metrics that `train` returned.
  """

  workdir: Path
  config: ConfigDict
  final: dict[str, float]


def train_tiny_declip(workdir: Path) -> FinishedRun:
  """Trains DeCLIP for 8 steps, with both evaluators at the end, checkpoints 6 and 8, and a trace of steps 3 and 4."""
  from declip_jax.train import train  # here, so that commands can load this file as a config without importing JAX

  config = tiny_config("declip")
  config.checkpoint.every.steps = 6  # drawing the curves takes most of the time of a save
  return FinishedRun(workdir, config, train(config, workdir, profile=(3, 4)))
