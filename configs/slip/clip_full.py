"""CLIP with SimCLR's full augmentation, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/clip_full:data=FOLDER,imagenet=FOLDER --workdir runs/clip_full

The strengths of the augmentations are those of SLIP's code, since the paper gives none.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 7 to 9",
  "imagenet_top1_percent": {"zero_shot": 36.3, "linear_probe": 65.2, "fine_tuned": 80.6},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip_full", "SLIP ViT-B/16", data, imagenet, epochs=25)
