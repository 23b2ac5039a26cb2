"""SimCLR ViT-L/16, 25 epochs of YFCC15M.

python -m declip_jax.train --config=slip/simclr_large_25ep:data=FOLDER --workdir runs/simclr_large_25ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"linear_probe": 66.7, "fine_tuned": 84.0},
  "parameters": 325_346_560,
}


def get_config(data: str = "data/yfcc15m") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("simclr", "SLIP ViT-L/16", data, epochs=25)
