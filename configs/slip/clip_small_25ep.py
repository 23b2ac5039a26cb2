"""CLIP ViT-S/16, 25 epochs of YFCC15M.

python -m declip_jax.train --config=slip/clip_small_25ep:data=FOLDER,imagenet=FOLDER --workdir runs/clip_small_25ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"zero_shot": 32.7, "linear_probe": 59.3, "fine_tuned": 78.2},
  "parameters": 85_290_369,
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip", "SLIP ViT-S/16", data, imagenet, epochs=25)
