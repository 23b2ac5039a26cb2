"""CLIP RN50x64, trained as in its paper.

python -m declip_jax.train --config=clip_wit/rn50x64:data=FOLDER,imagenet=FOLDER --workdir runs/rn50x64
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 73.6},
  "parameters": 623_258_305,
  "hardware": "592 V100, 18 days",
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("RN50x64", data, imagenet, rate=3.6e-4)
