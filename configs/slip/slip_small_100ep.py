"""SLIP ViT-S/16, 100 epochs of YFCC15M.

python -m declip_jax.train --config=slip/slip_small_100ep:data=FOLDER,imagenet=FOLDER --workdir runs/slip_small_100ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"zero_shot": 39.5, "linear_probe": 68.3, "fine_tuned": 80.7},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("slip", "SLIP ViT-S/16", data, imagenet, epochs=100)
