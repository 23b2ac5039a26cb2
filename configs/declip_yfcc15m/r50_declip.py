"""DeCLIP ResNet-50 on YFCC15M by DeCLIP's authors' code.

  python -m declip_jax.train --config=configs/declip_yfcc15m/r50_declip.py:FOLDER,IMAGENET --workdir runs/r50_declip

Paper: Cui et al. 2022, arXiv 2203.05796, and the table of the code's README.
Expected: 44.4 zero-shot; the authors' top-1 on ImageNet, not ours.
Hardware: 32 GPUs, four nodes of eight, with 128 pairs each; neither hours nor kind are published.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_yfcc15m import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("declip", "DeCLIP RN50", arg, embed_dim=1024)
  c.model.image.norm_groups = 1  # parts of the batch that its batch norms see apart
  return c
