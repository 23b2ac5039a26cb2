"""DeCLIP ResNet-50 on YFCC15M, the comparison of DeCLIP's paper.

  python -m declip_jax.train --config=declip_paper/yfcc15m_declip:data=FOLDER,imagenet=FOLDER \\
    --workdir runs/yfcc15m_declip
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, section 4",
  "imagenet_top1_percent": {"zero_shot": 41.9},
}


def get_config(data: str = "data/yfcc15m_v2", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("declip", data, imagenet)
