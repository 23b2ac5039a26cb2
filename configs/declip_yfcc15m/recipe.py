"""CLIP, SLIP, FILIP, DeCLIP and DeFILIP on YFCC15M: the nine results of DeCLIP's authors' benchmark, by their code.

Cui et al. 2022, "Democratizing Contrastive Language-Image Pre-training: A CLIP Benchmark of Data, Model, and
Supervision", arXiv 2203.05796; table and recipes of its released code, Sense-GVT/DeCLIP, experiments/*/yfcc15m.

Data: 15,388,848 pairs of YFCC100M by DeCLIP's own filter, called V2; OpenAI's list of 14.8 M pairs has 6.6 M of them.
`data` is data/yfcc15m_v2 by default; `imagenet` is classified every 2,000 steps.

`preset="repo"` is what the code does, see `config._as_released`. Learning rate and weight decay are 1e-3 and 0.1; for
SLIP and FILIP, 5e-4 and 0.5. The tables say 32 epochs; the configs say 128,001 steps of 4,096 pairs, which are 34
epochs, the last step at a learning rate of 0. Where we differ:
* We train in bfloat16; theirs is --config.model.dtype=float32.
* The batch norms of a ResNet see one GPU for CLIP, 16 for SLIP and FILIP, and all 32 for DeCLIP, as the configs
  request; the released code can run only the first.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_data

# What the released code counts as parameters although no loss trains it; we do not have it.
RESNET_FC = 2048 * 1024 + 1024  # a linear layer of its ResNet for resolutions other than 224
MLM_HEAD = 512 * 49409 + 49409  # its FILIP masks captions but predicts nothing
SLIP_NORM = 2 * 4096  # its SLIP head has a norm after the last layer that is not applied


def make(method: str, architecture: str, data: str, imagenet: str, *, embed_dim: int) -> ConfigDict:
  """Returns the config of a result; `embed_dim` is the width of the joint space. See `read_data` for the folders."""
  c = config.default(method, architecture, preset="repo")  # 32 groups of 128 pairs
  c.duration = config.duration(steps=128_001)
  c.model.heads.embed_dim = embed_dim
  c.evaluate_every = c.checkpoint.every = config.duration(steps=2000)
  read_data(c, data, imagenet)
  return c
