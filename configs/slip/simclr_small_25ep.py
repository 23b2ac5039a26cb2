"""SimCLR ViT-S/16, 25 epochs of YFCC15M.

python -m declip_jax.train --config=slip/simclr_small_25ep:data=FOLDER --workdir runs/simclr_small_25ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"linear_probe": 58.1, "fine_tuned": 79.9},
  "parameters": 41_089_152,
}


def get_config(data: str = "data/yfcc15m") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("simclr", "SLIP ViT-S/16", data, epochs=25)
