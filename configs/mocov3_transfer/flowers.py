"""ViT-B/16 of MoCo v3, fine-tuned on Oxford Flowers for 100 epochs.

python -m declip_jax.train --config=mocov3_transfer/flowers:init=RUN,data=FOLDER,test=FOLDER --workdir runs/flowers
"""

from ml_collections import ConfigDict

from declip_jax.configs.mocov3_transfer import recipe

PUBLISHED = {
  "source": "Chen et al. 2021, arXiv 2104.02057, facebookresearch/moco-v3, transfer",
  "top1_percent": {"fine_tuned": 97.7},
}


def get_config(init: str = "runs/slip_mocov3", data: str = "data/flowers/train", test: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make(init, data, test, classes=102, weight_decay=0.3, mixup=0.0, cutmix=0.0)
  c.data.erase_probability = 0.25
  return c
