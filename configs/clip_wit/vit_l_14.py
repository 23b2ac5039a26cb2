"""CLIP ViT-L/14, trained as in its paper.

python -m declip_jax.train --config=clip_wit/vit_l_14:data=FOLDER,imagenet=FOLDER --workdir runs/vit_l_14
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 75.3},
  "parameters": 427_616_513,
  "hardware": "256 V100, 12 days",
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("ViT-L/14", data, imagenet, rate=4e-4)
