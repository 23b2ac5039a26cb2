"""CLIP RN50x16, trained as in its paper.

python -m declip_jax.train --config=clip_wit/rn50x16:data=FOLDER,imagenet=FOLDER --workdir runs/rn50x16
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 70.5},
  "parameters": 290_979_217,
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("RN50x16", data, imagenet, rate=4e-4)
