"""SLIP ResNet-50 on YFCC15M by the code of DeCLIP's authors.

  python -m declip_jax.train --config=declip_yfcc15m/r50_slip:data=FOLDER,imagenet=FOLDER --workdir runs/r50_slip

Where we differ: SimCLR's head starts from the attention pool before its output projection, since the released ResNet
does not return the feature that the released SLIP asks for.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_yfcc15m import recipe

PUBLISHED = {
  "source": "Cui et al. 2022, arXiv 2203.05796, and the table of the code's README",
  "imagenet_top1_percent": {"zero_shot": 28.5},
  "hardware": "32 GPUs on 4 nodes, 128 pairs each; type and hours not published",
}


def get_config(data: str = "data/yfcc15m_v2", imagenet: str = "") -> ConfigDict:
  """Returns the config; `recipe` describes the arguments."""
  c = recipe.make("slip", "DeCLIP RN50", data, imagenet, embed_dim=1024)
  c.model.image.norm_groups = 2  # groups of the batch, each with its own batch statistics
  return c
