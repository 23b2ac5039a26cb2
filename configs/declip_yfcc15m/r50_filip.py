"""FILIP ResNet-50 on YFCC15M by DeCLIP's authors' code.

  python -m declip_jax.train --config=configs/declip_yfcc15m/r50_filip.py:FOLDER,IMAGENET --workdir runs/r50_filip

Paper: Cui et al. 2022, arXiv 2203.05796, and the table of the code's README.
Expected: 21.3 zero-shot; the authors' top-1 on ImageNet, not ours.
Hardware: 32 GPUs, four nodes of eight, with 128 pairs each; neither hours nor kind are published.

Classified by the tokens, where the released code averages prompts position by position and gives each class a scale of
its own.
"""

from ml_collections import ConfigDict

from declip_jax.configs.declip_yfcc15m import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("filip", "DeCLIP RN50", arg, embed_dim=1024)
  c.model.image.norm_groups = 2  # parts of the batch that its batch norms see apart
  return c
