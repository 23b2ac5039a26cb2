"""SLIP ViT-L/16, 100 epochs of YFCC15M.

  python -m declip_jax.train --config=slip/slip_large_100ep:data=FOLDER,imagenet=FOLDER --workdir runs/slip_large_100ep

The paper accumulates gradients over two halves of a batch, each with its own negatives; here all pairs of a batch are
compared.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, tables 2 and 10",
  "imagenet_top1_percent": {"zero_shot": 47.9, "linear_probe": 75.1, "fine_tuned": 84.8},
}


def get_config(data: str = "data/yfcc15m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("slip", "SLIP ViT-L/16", data, imagenet, epochs=100)
