"""Any method with any architecture on your own captions: the place to start.

  python -m declip_jax.train --config=pretrain:method=declip,architecture=ViT-B/16,data=DATA --workdir runs/declip

Batch size, length, dtype, what the backward pass recomputes, and sizes of the heads' groups and neighbour bank are
chosen for the data and the devices when a run starts, by the rules in `planning.choose`; the run prints them, and
`--config.FIELD=VALUE` sets any of them. The first 10 % of the run are warm-up, and each tenth ends with a checkpoint
and an evaluation: retrieval on pairs that are not trained on, 10 % of all but at most 5,000. `docs/own_captions.md`
goes from a table of captions to a model.

The optimiser is OpenAI's (Radford et al. 2021, table 18), or for METHOD_repo that of DeCLIP's released code. There is
no published result to compare with, since accuracies depend on the pairs. `python -m declip_jax.plan` reports what a
run costs on a given machine, and docs/scaling.md shows three such reports.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import to_source

HELD_OUT = "10%,5000"  # of the samples, for evaluation


def get_config(method: str = "declip", architecture: str = "ViT-B/32", data: str = "") -> ConfigDict:
  """Returns the config.

  Args:
    method: a name of `methods.METHODS`, `methods.OURS` or `methods.ABLATIONS`; METHOD_repo is the method of that name
      as DeCLIP's released code implements it.
    architecture: one of `architectures.ARCHITECTURES`; ViT-Nano/8@32px is for CPUs.
    data: any path that `data.inspect` recognises, or KIND:LOCATION. Training needs it, `python -m declip_jax.plan` does
      not.
  """
  c = config.default(method.removesuffix("_repo"), architecture, "repo" if method.endswith("_repo") else "paper")
  source = to_source(data) if data else ""
  c.data.train = (f"kept:{HELD_OUT}:{source}",) if source else ()
  c.batch_size, c.duration, c.model.dtype, c.model.remat = 0, config.duration(), "auto", "auto"
  c.model.heads.bank_size = 0
  if method.endswith("_repo"):
    c.model.heads.norm_groups = c.model.heads.bank_groups = 0
  c.optimizer.warmup = config.duration(share=0.1)
  c.evaluate_every, c.checkpoint.every = config.duration(share=0.1), config.duration(share=0.1)
  if c.data.image_size < 64:  # as in `small`; the papers' radii are for 224 pixels, and their rate for larger models
    c.data.blur_radius, c.optimizer.learning_rate = (0.1, 0.5), 1e-3
  if source and method not in ("simclr", "finetune"):  # they have no text tower
    c.evals.retrieval = config.retrieval(f"heldout:{HELD_OUT}:{source}", equal_texts=True)
    c.checkpoint.best_metric = "eval/retrieval/mean_recall"
  return c
