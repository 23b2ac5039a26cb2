"""DeCLIP's ablation with ResNet-50 on CC3M: CLIP and self-supervision of texts.

python -m declip_jax.train --config=declip_paper/cc3m_tss:data=FOLDER,imagenet=FOLDER --workdir runs/cc3m_tss
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_paper import recipe

PUBLISHED = {
  "source": "Li et al. 2022, arXiv 2110.05208, section 4",
}


def get_config(data: str = "data/cc3m", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  return recipe.make("declip_tss", data, imagenet)
