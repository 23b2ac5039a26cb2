"""DeCLIP's released models, ResNet-50 and ViT-B/32 on 88 M pairs, by the configs released with them.

Li et al. 2022, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm",
arXiv 2110.05208; numbers and recipes of its released code, Sense-GVT/DeCLIP,
experiments/declip_experiments/declip88m.

Data: CC3M, CC12M, a subset of YFCC100M, and pairs from the web that were never released. `data` is data/declip88m by
default; `imagenet` is classified every 2,000 steps.

The configs were released for evaluation: they read YFCC15M and need a half-precision SGD that was not released. The
batch size is our choice, since they give none: 10,240 pairs, on 80 GPUs with 128 each or 160 with 64, which makes the
ViT's 300,001 steps 35 epochs.

The log scale of the temperature is at least 3, without an upper bound. It is trained with a tenth of the learning rate;
for the ViT it is frozen, so the scale stays at exp(3). The batch norms of the ResNet and of SimSiam see the batch of
one GPU. Each GPU has a bank of 65,536 texts, 0.8 GB for the ViT; with fewer devices, each holds several banks
(--config.model.heads.bank_groups=1 is one bank for all).
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_data


def make(architecture: str, data: str, imagenet: str, *, embed_dim: int, pairs: int) -> ConfigDict:
  """Returns the common config of both results, with `pairs` per GPU; see `read_data` for `data` and `imagenet`."""
  c = config.default("declip", architecture, preset="repo")
  c.batch_size = 10_240
  c.model.heads.embed_dim = embed_dim
  c.model.heads.norm_groups = c.model.heads.bank_groups = c.batch_size // pairs
  c.optimizer.name, c.optimizer.nesterov = "sgd", True
  c.optimizer.learning_rate = 0.2
  c.optimizer.decay_mask = "all"
  c.optimizer.warmup_start = 1e-3
  c.optimizer.logit_scale_range = (3.0, 88.0)  # exp(88) fits into float32; the forward pass clips at 100
  c.evaluate_every = c.checkpoint.every = config.duration(steps=2000)
  read_data(c, data, imagenet)
  return c
