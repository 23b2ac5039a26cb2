"""CLIP ResNet-50 on YFCC15M, the comparison of DeCLIP's paper.

  python -m declip_jax.train --config=declip_paper/yfcc15m_clip:data=FOLDER,imagenet=FOLDER --workdir runs/yfcc15m_clip

CLIP's own paper also reports 31.3 for a ResNet-50 on its YFCC15M; this number may have been taken from there.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, section 4",
  "imagenet_top1_percent": {"zero_shot": 31.3},
}


def get_config(data: str = "data/yfcc15m_v2", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip", data, imagenet)
