"""DeCLIP's ablation on CC3M and its comparison on YFCC15M, with ResNet-50 and the objective of the paper.

Li et al. 2022, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm",
arXiv 2110.05208, section 4.

`data` is data/cc3m or data/yfcc15m_v2 by default; `imagenet` is classified after each epoch.

The objective is the paper's, section 3.2: (1 - a - b - g) CLIP + a (ISS + TSS) + b MVS + g NNS, where a, b and g are
0.2 for the terms in use. We do not know which view CLIP sees in the baselines: cc3m_clip has one strong crop and the
caption as it is, the first pair of the later steps; cc3m_clip_weak and yfcc15m_clip have one weak crop. We do not know
the optimiser and the batch size either: they are those that the authors released for this ResNet-50 on YFCC15M
(configs/declip_yfcc15m), for 32 epochs.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_data


def make(method: str, data: str, imagenet: str) -> ConfigDict:
  """Returns the config of a result; see `read_data` for `data` and `imagenet`."""
  c = config.default(method, "DeCLIP RN50")
  c.batch_size = 4096
  c.duration = config.duration(epochs=32)
  c.data.evaluation_resize = 256
  c.model.mean, c.model.std = config.IMAGENET_MEAN, config.IMAGENET_STD
  c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-3, 0.1
  c.optimizer.epsilon = 1e-8
  c.optimizer.schedule = "declip_cosine"
  c.optimizer.warmup, c.optimizer.warmup_start = config.duration(steps=2500), 1e-4
  read_data(c, data, imagenet)
  return c
