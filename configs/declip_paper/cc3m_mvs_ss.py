"""DeCLIP's ablation with ResNet-50 on CC3M: CLIP, multi-view supervision and self-supervision.

  python -m declip_jax.train --config=declip_paper/cc3m_mvs_ss:data=FOLDER,imagenet=FOLDER --workdir runs/cc3m_mvs_ss

The third step of the ablation adds self-supervision of images and texts.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, section 4",
  "imagenet_top1_percent": {"zero_shot": 25.4},
  "second_hand": ("imagenet_top1_percent",),
}


def get_config(data: str = "data/cc3m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("declip_mvs_ss", data, imagenet)
