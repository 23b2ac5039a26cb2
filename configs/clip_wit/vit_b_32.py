"""CLIP ViT-B/32, trained as in its paper.

python -m declip_jax.train --config=clip_wit/vit_b_32:data=FOLDER,imagenet=FOLDER --workdir runs/vit_b_32
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 63.2},
  "parameters": 151_277_313,
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("ViT-B/32", data, imagenet, rate=5e-4)
