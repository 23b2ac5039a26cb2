"""SLIP with MoCo v3 in place of SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/slip_mocov3.py:FOLDER,IMAGENET --workdir runs/slip_mocov3

Paper: Mu et al. 2021, arXiv 2112.12750, table 6.
Expected: 41.8 zero-shot, 71.4 linear probe, 82.4 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

Learning rate, weight decay and the weight of the self-supervised term are not published: they are SLIP's here. Views,
heads and the frozen patch embedding are MoCo v3's; the positions are learned, as in SLIP's ViT, where MoCo v3's are
fixed sines.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("slip_mocov3", "SLIP ViT-B/16", arg, epochs=25)
  c.optimizer.frozen = ("towers/image/patch_embedding",)
  return c
