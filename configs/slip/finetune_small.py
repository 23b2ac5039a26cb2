"""SLIP ViT-S/16, pretrained for 25 epochs on YFCC15M, fine-tuned on ImageNet for 100 epochs.

  python -m declip_jax.train --config=slip/finetune_small:init=RUN,data=FOLDER,imagenet=FOLDER \\
    --workdir runs/finetune_small
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"fine_tuned": 80.3},
}


def get_config(init: str = "runs/slip_small_25ep", data: str = "data/imagenet", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe.finetune` describes the arguments."""
  c = recipe.finetune("SLIP ViT-S/16", init, data, imagenet, epochs=100, warmup=20)
  c.model.drop_path, c.optimizer.layer_decay = 0.0, 0.65
  return c
