"""SLIP ViT-B/16, 35 epochs of CC12M.

  python -m declip_jax.train --config=slip/slip_base_cc12m_35ep:data=FOLDER,imagenet=FOLDER \\
    --workdir runs/slip_base_cc12m_35ep
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe

PUBLISHED = {
  "source": "Mu et al. 2021, arXiv 2112.12750, table 5",
  "imagenet_top1_percent": {"zero_shot": 40.7, "linear_probe": 73.7, "fine_tuned": 83.1},
}


def get_config(data: str = "data/cc12m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("slip", "SLIP ViT-B/16", data, imagenet, epochs=35)
