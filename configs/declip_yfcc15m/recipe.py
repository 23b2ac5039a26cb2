"""CLIP, SLIP, FILIP, DeCLIP and DeFILIP on YFCC15M: the nine rows of DeCLIP's authors' benchmark, by their code.

Cui et al. 2022, "Democratizing Contrastive Language-Image Pre-training: A CLIP Benchmark of Data, Model, and
Supervision", arXiv 2203.05796; table and recipes of its released code, Sense-GVT/DeCLIP, experiments/*/yfcc15m.

Data: 15,388,848 pairs of YFCC100M by DeCLIP's own filter, called V2; OpenAI's list of 14.8 M has 6.6 M of them. FOLDER
is data/yfcc15m_v2 by default; IMAGENET is classified every 2,000 steps.

What the code does is `preset="repo"`, see `config._as_released`; learning rate and weight decay are 1e-3 and 0.1, for
SLIP and FILIP 5e-4 and 0.5. The tables say 32 epochs, the configs 128,001 steps of 4,096 pairs, 34 epochs, the last
at a learning rate of 0. Where we differ:
* bfloat16; --config.model.dtype=float32 is theirs.
* A ResNet's batch norms are those of one GPU for CLIP, of 16 for SLIP and FILIP and of all 32 for DeCLIP, as the
  configs want; the released code can run only the first.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_folders


def make(method: str, architecture: str, arg: str, *, embed_dim: int) -> ConfigDict:
  """A row; `arg` is that of its `get_config`, `embed_dim` the width of the joint space."""
  c = config.default(method, architecture, preset="repo")  # 32 groups of 128 pairs
  c.duration = config.duration(steps=128_001)
  c.model.heads.embed_dim = embed_dim
  c.evaluate_every = c.checkpoint.every = config.duration(steps=2000)
  read_folders(c, arg, "data/yfcc15m_v2")
  return c
