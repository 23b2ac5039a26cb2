"""CLIP ViT-B/16, 25 epochs of YFCC15M.

python -m declip_jax.train --config=slip/clip_base_25ep:data=FOLDER,imagenet=FOLDER --workdir runs/clip_base_25ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"zero_shot": 37.6, "linear_probe": 66.5, "fine_tuned": 80.5},
  "parameters": 149_619_969,
  "hardware": "64 V100, 22.3 hours",
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("clip", "SLIP ViT-B/16", data, imagenet, epochs=25)
