"""Any method with any architecture on your own pairs: the place to start.

  python -m declip_jax.train --config=pretrain:method=declip,architecture=ViT-B/16,data=FOLDER --workdir runs/declip

The optimiser is OpenAI's (Radford et al. 2021, table 18), or for METHOD_repo that of DeCLIP's released code. There is
no published result to compare with, since accuracies depend on the pairs. `python -m declip_jax.plan` reports what a
run costs on a given machine, and docs/scaling.md shows three such reports.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import to_source


def get_config(method: str = "declip", architecture: str = "ViT-B/32", data: str = "data/train") -> ConfigDict:
  """Returns the config.

  Args:
    method: a name of `methods.METHODS` or `methods.ABLATIONS`; METHOD_repo is the method of that name as DeCLIP's
      released code implements it.
    architecture: one of `architectures.ARCHITECTURES`.
    data: a folder of WebDataset shards, the path of a table or an archive, or any KIND:LOCATION.
  """
  c = config.default(method.removesuffix("_repo"), architecture, "repo" if method.endswith("_repo") else "paper")
  c.data.train = (to_source(data),)
  c.checkpoint.every = config.duration(steps=5000)
  c.evaluate_every = config.duration(steps=5000)
  return c
