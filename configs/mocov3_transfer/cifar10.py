"""ViT-B/16 of MoCo v3, fine-tuned on CIFAR-10 for 100 epochs.

python -m declip_jax.train --config=mocov3_transfer/cifar10:init=RUN,data=FOLDER,test=FOLDER --workdir runs/cifar10
"""

from ml_collections import ConfigDict

from declip_jax.configs.mocov3_transfer import recipe

PUBLISHED = {
  "source": "Chen et al. 2021, arXiv 2104.02057, facebookresearch/moco-v3, transfer",
  "top1_percent": {"fine_tuned": 98.9},
}


def get_config(init: str = "runs/slip_mocov3", data: str = "data/cifar10/train", test: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make(init, data, test, classes=10, weight_decay=0.1, mixup=0.8, cutmix=1.0)
