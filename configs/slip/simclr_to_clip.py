"""CLIP after SimCLR, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/simclr_to_clip.py:FOLDER,IMAGENET --workdir runs/simclr_to_clip

Paper: Mu et al. 2021, arXiv 2112.12750, tables 7 to 9.
Expected: 41.1 zero-shot, 68.2 linear probe, 82.3 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

Its image tower starts from runs/simclr_base_25ep, or what --config.init_from.path says.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("clip", "SLIP ViT-B/16", arg, epochs=25)
  c.init_from.path, c.init_from.groups = "runs/simclr_base_25ep", ("image",)
  return c
