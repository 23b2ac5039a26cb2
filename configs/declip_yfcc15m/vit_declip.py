"""DeCLIP ViT-B/32 on YFCC15M by the code of DeCLIP's authors.

  python -m declip_jax.train --config=declip_yfcc15m/vit_declip:data=FOLDER,imagenet=FOLDER --workdir runs/vit_declip

Others have reproduced 43.2 with that code, in mixed precision on 32 accelerators.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_yfcc15m import recipe

PUBLISHED = {
  "source": "Cui et al. 2022, arXiv 2203.05796, and the table of the code's README",
  "imagenet_top1_percent": {"zero_shot": 43.2},
  "parameters": 180_306_946,
  "hardware": "32 GPUs on 4 nodes, 128 pairs each; type and hours not published",
}


def get_config(data: str = "data/yfcc15m_v2", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("declip", "DeCLIP ViT-B/32", data, imagenet, embed_dim=512)
