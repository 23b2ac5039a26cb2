"""CLIP ViT-L/16, 25 epochs of YFCC15M.

python -m declip_jax.train --config=slip/clip_large_25ep:data=FOLDER,imagenet=FOLDER --workdir runs/clip_large_25ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"zero_shot": 40.4, "linear_probe": 70.5, "fine_tuned": 81.0},
  "parameters": 367_254_017,
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip", "SLIP ViT-L/16", data, imagenet, epochs=25)
