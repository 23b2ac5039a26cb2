"""CLIP with augmented colours, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/clip_color:data=FOLDER,imagenet=FOLDER --workdir runs/clip_color

The strengths of the augmentations are those of SLIP's code, since the paper gives none.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 7 to 9",
  "imagenet_top1_percent": {"zero_shot": 38.4, "linear_probe": 68.5, "fine_tuned": 81.5},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip_color", "SLIP ViT-B/16", data, imagenet, epochs=25)
