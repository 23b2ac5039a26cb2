"""DeCLIP's ablation with ResNet-50 on CC3M, first step: CLIP on a weak view.

  python -m declip_jax.train --config=declip_paper/cc3m_clip_weak:data=FOLDER,imagenet=FOLDER \\
    --workdir runs/cc3m_clip_weak

It trains on one weak crop. We do not know which view the paper's baseline sees.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, section 4",
  "imagenet_top1_percent": {"zero_shot": 20.6},
  "second_hand": ("imagenet_top1_percent",),
}


def get_config(data: str = "data/cc3m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip", data, imagenet)
