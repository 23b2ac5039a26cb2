"""SLIP with self-supervision on other images, ViT-B/16, 25 epochs of YFCC15M.

  python -m declip_jax.train --config=configs/slip/slip_decoupled.py:FOLDER,IMAGENET --workdir runs/slip_decoupled

Paper: Mu et al. 2021, arXiv 2112.12750, tables 7 to 9.
Expected: 42.7 zero-shot, 72.0 linear probe, 82.8 fine-tuned; the paper's top-1 on ImageNet, not ours.
Hardware: not published.

SimCLR's views are of other images, data/yfcc15m_others/*.tar or what --config.data.ssl_train says: 15 M of YFCC100M
that are not in YFCC15M. Their shards need a caption or class too, which nobody looks at.
"""

from ml_collections import ConfigDict

from declip_jax.configs.slip import recipe


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is empty, FOLDER or FOLDER,IMAGENET; see `configs.read_folders`."""
  c = recipe.make("slip", "SLIP ViT-B/16", arg, epochs=25)
  c.data.ssl_train = ("webdataset:data/yfcc15m_others/*.tar",)
  return c
