"""Any method with any architecture on your own pairs: the place to start from for a training of one's own.

  python -m declip_jax.train --config=configs/pretrain.py:declip,ViT-B/16,FOLDER --workdir runs/declip

METHOD is one of `methods.METHODS` or `methods.STUDIES`, or METHOD_repo for what DeCLIP's released code does under that
name; ARCHITECTURE one of `architectures.ARCHITECTURES`. FOLDER holds WebDataset shards, *.tar (default data/train);
`--config.data.train` takes any other source. The optimiser is OpenAI's (Radford et al. 2021, table 18), for METHOD_repo
that of the released code. No number is expected: that depends on the pairs. `python -m declip_jax.plan` says what it
takes on which machine, and docs/scaling.md shows that for three of them.
"""

from ml_collections import ConfigDict

from declip_jax import config


def get_config(arg: str = "declip,ViT-B/32") -> ConfigDict:
  """`arg` is METHOD,ARCHITECTURE or METHOD,ARCHITECTURE,FOLDER."""
  method, _, rest = arg.partition(",")
  architecture, _, folder = rest.partition(",")
  preset = "repo" if method.endswith("_repo") else "paper"
  c = config.default(method.removesuffix("_repo"), architecture or "ViT-B/32", preset)
  c.data.train = (f"webdataset:{folder or 'data/train'}/*.tar",)
  c.checkpoint.every = config.duration(steps=5000)
  c.evaluate_every = config.duration(steps=5000)
  return c
