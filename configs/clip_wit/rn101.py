"""CLIP RN101, trained as in its paper.

python -m declip_jax.train --config=clip_wit/rn101:data=FOLDER,imagenet=FOLDER --workdir runs/rn101
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 62.2},
  "parameters": 119_688_033,
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("RN101", data, imagenet, rate=5e-4)
