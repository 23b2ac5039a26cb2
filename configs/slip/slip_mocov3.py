"""SLIP with MoCo v3 instead of SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/slip_mocov3:data=FOLDER,imagenet=FOLDER --workdir runs/slip_mocov3

The learning rate, the weight decay and the weight of the self-supervised term are not published; they are SLIP's here.
Views, heads and the frozen patch embedding are MoCo v3's. The positions are learned, as in SLIP's ViT; MoCo v3's are
fixed sines.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, table 6",
  "imagenet_top1_percent": {"zero_shot": 41.8, "linear_probe": 71.4, "fine_tuned": 82.4},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("slip_mocov3", "SLIP ViT-B/16", data, imagenet, epochs=25)
  c.optimizer.frozen = ("towers/image/patch_embedding",)
  return c
