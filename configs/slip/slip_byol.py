"""SLIP with BYOL instead of SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/slip_byol:data=FOLDER,imagenet=FOLDER --workdir runs/slip_byol

The learning rate, the weight decay and the weight of the self-supervised term are not published; they are SLIP's here.
Views and heads are MoCo v3's.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, table 6",
  "imagenet_top1_percent": {"zero_shot": 41.3, "linear_probe": 71.1, "fine_tuned": 82.2},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("slip_byol", "SLIP ViT-B/16", data, imagenet, epochs=25)
