"""ViT-B/16 of MoCo v3, fine-tuned on CIFAR-100 for 100 epochs.

python -m declip_jax.train --config=mocov3_transfer/cifar100:init=RUN,data=FOLDER,test=FOLDER --workdir runs/cifar100
"""

from ml_collections import ConfigDict

from declip_jax.configs.mocov3_transfer import recipe

PUBLISHED = {
  "source": "Chen et al. 2021, arXiv 2104.02057, facebookresearch/moco-v3, transfer",
  "top1_percent": {"fine_tuned": 90.5},
}


def get_config(init: str = "runs/slip_mocov3", data: str = "data/cifar100/train", test: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make(init, data, test, classes=100, weight_decay=0.1, mixup=0.5, cutmix=1.0)
