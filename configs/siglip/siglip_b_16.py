"""SigLIP ViT-B/16 from scratch, with texts of 16 tokens.

python -m declip_jax.train --config=siglip/siglip_b_16:data=FOLDER,imagenet=FOLDER --workdir runs/siglip_b_16
"""

from ml_collections import ConfigDict

from declip_jax.configs.siglip import recipe

PUBLISHED = {
  "source": "Zhai et al. 2023, arXiv 2303.15343, table 1",
  "imagenet_top1_percent": {"zero_shot": 73.4},
  "hardware": "32 TPUv4, 5 days",
  "second_hand": ("imagenet_top1_percent", "hardware"),
}


def get_config(data: str = "data/webli", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("SigLIP ViT-B/16", data, imagenet, examples=9_000_000_000)
  c.model.text.context_length = 16
  return c
