"""SLIP with BYOL in place of SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/slip_byol.py:FOLDER,IMAGENET --workdir runs/slip_byol

Paper: Mu et al. 2021, arXiv 2112.12750, table 6.
Expected: 41.3 zero-shot, 71.1 linear probe, 82.2 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

Learning rate, weight decay and the weight of the self-supervised term are not published: they are SLIP's here. Views
and heads are MoCo v3's.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  return recipe.make("slip_byol", "SLIP ViT-B/16", arg, epochs=25)
