"""SimCLR ViT-B/16, 25 epochs of YFCC15M.

python -m declip_jax.train --config=slip/simclr_base_25ep:data=FOLDER --workdir runs/simclr_base_25ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"linear_probe": 64.0, "fine_tuned": 82.5},
  "parameters": 106_795_008,
}


def get_config(data: str = "data/yfcc15m") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("simclr", "SLIP ViT-B/16", data, epochs=25)
