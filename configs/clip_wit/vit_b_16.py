"""CLIP ViT-B/16, trained as in its paper.

python -m declip_jax.train --config=clip_wit/vit_b_16:data=FOLDER,imagenet=FOLDER --workdir runs/vit_b_16
"""

from ml_collections import ConfigDict

from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 68.6},
  "parameters": 149_620_737,
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("ViT-B/16", data, imagenet, rate=5e-4)
