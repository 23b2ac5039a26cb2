"""SLIP ViT-B/16, 50 epochs of YFCC15M.

python -m declip_jax.train --config=slip/slip_base_50ep:data=FOLDER,imagenet=FOLDER --workdir runs/slip_base_50ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"zero_shot": 44.1, "linear_probe": 73.0, "fine_tuned": 82.9},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("slip", "SLIP ViT-B/16", data, imagenet, epochs=50)
