"""CLIP ViT-L/14@336px: ViT-L/14 for one more epoch.

  python -m declip_jax.train --config=clip_wit/vit_l_14_336px:data=FOLDER,imagenet=FOLDER --workdir runs/vit_l_14_336px

It starts from runs/vit_l_14, or from --config.init_from.path. The warm-up is our choice.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs.clip_wit import recipe

PUBLISHED = {
  "source": "Radford et al. 2021, arXiv 2103.00020",
  "imagenet_top1_percent": {"zero_shot": 76.2},
  "parameters": 427_944_193,
}


def get_config(data: str = "data/wit", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("ViT-L/14@336px", data, imagenet, rate=2e-5)
  c.duration = config.duration(epochs=1)
  c.init_from.path = "runs/vit_l_14"
  return c
