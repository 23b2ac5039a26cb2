"""DeCLIP's released models, ResNet-50 and ViT-B/32 on 88 M pairs, by the configs released with them.

Li et al. 2022, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm",
arXiv 2110.05208; numbers and recipes of its released code, Sense-GVT/DeCLIP,
experiments/declip_experiments/declip88m.

Data: CC3M, CC12M, a part of YFCC100M, and pairs from the web that were never released. FOLDER is data/declip88m by
default; IMAGENET is classified every 2,000 steps.

The configs were released for evaluation: they read YFCC15M, and need a half-precision SGD that is not there. Where they
say nothing we take 10,240 pairs a step, on 80 GPUs with 128 or 160 with 64, which makes the ViT's 300,001 steps 35
epochs.

The temperature: a floor of 3 under the log scale and no ceiling; a tenth of the learning rate, or none for the ViT,
whose scale so stays at exp(3). Batch norms of the ResNet and of SimSiam are those of a GPU. Each GPU has a bank of
65,536 texts, 0.8 GB for the ViT: with fewer devices a device holds several of them
(--config.model.heads.bank_groups=1 is one for all).
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_folders


def make(architecture: str, arg: str, *, embed_dim: int, pairs: int) -> ConfigDict:
  """What both rows share; `arg` is that of their `get_config`, `pairs` are on a GPU."""
  c = config.default("declip", architecture, preset="repo")
  c.batch_size = 10_240
  c.model.heads.embed_dim = embed_dim
  c.model.heads.norm_groups = c.model.heads.bank_groups = c.batch_size // pairs
  c.optimizer.name, c.optimizer.nesterov = "sgd", True
  c.optimizer.learning_rate = 0.2
  c.optimizer.decay_mask = "all"
  c.optimizer.warmup_start = 1e-3
  c.optimizer.logit_scale_range = (3.0, 88.0)  # float32 holds exp(88), and the forward pass stops at 100
  c.evaluate_every = c.checkpoint.every = config.duration(steps=2000)
  read_folders(c, arg, "data/declip88m")
  return c
