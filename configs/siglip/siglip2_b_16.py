"""SigLIP 2 ViT-B/16 at 256 pixels: its contrastive stage.

python -m declip_jax.train --config=siglip/siglip2_b_16:data=FOLDER,imagenet=FOLDER --workdir runs/siglip2_b_16
"""

from ml_collections import ConfigDict

from declip_jax.configs.siglip import recipe

PUBLISHED = {
  "source": "Tschannen et al. 2025, arXiv 2502.14786, as released in google-research/big_vision",
  "imagenet_top1_percent": {"zero_shot": 79.1},
}


def get_config(data: str = "data/webli", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("SigLIP 2 ViT-B/16@256px", data, imagenet, examples=40_000_000_000)
