"""CLIP ResNet-50, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/clip_rn50_25ep:data=FOLDER,imagenet=FOLDER --workdir runs/clip_rn50_25ep

CLIP's paper reports 31.3 for its own ResNet-50 on the same data.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, section 4",
  "imagenet_top1_percent": {"zero_shot": 34.6},
  "parameters": 102_007_137,
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip", "RN50", data, imagenet, epochs=25)
