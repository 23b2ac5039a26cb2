"""SigLIP, and the contrastive stage of SigLIP 2.

Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343; Tschannen et al. 2025, "SigLIP 2:
Multilingual Vision-Language Encoders with Improved Semantic Understanding, Localization, and Dense Features", arXiv
2502.14786. Their trainer is google-research/big_vision, `trainers/proj/image_text/siglip.py`; its configs for their
data were not released.

Data: WebLI, 10 billion images with texts, was never released. `data` is data/webli by default; `imagenet` is classified
every 20,000 steps. Tokenizers are published with the weights: `spiece.model` of SigLIP and `tokenizer.json` of SigLIP 2
are read from the current folder, see `config.model.text.tokenizer`.

SigLIP's 9 billion pairs and 16 tokens are second hand, as is its score; SigLIP 2's 40 billion and 64 are its paper's.
Batch size, schedule, warm-up, rate, weight decay and clipping are those of SigLIP 2 for both; b2 is the 0.95 with which
SigLIP keeps large batches stable. Where we differ: AdamW with float32 moments; embeddings and the query of the pooling
are decayed, too, as by CLIP, where big_vision decays kernels alone; the warm-up reaches its peak one step before that
of big_vision; no augmentation, since none is published.

SigLIP 2 adds to this loss a decoder that captions and locates, from the start; self-distillation and masked prediction
against a momentum tower, for the last fifth; and, for its small models, a choice of the batches by a teacher. These are
not here, so its numbers are beyond what this stage alone gives; see docs/methods.md.
"""

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import read_data


def make(architecture: str, data: str, imagenet: str, *, examples: int) -> ConfigDict:
  """Returns the config of a result that has seen `examples` pairs; see `read_data` for `data` and `imagenet`."""
  c = config.default("siglip", architecture)
  c.batch_size = 32_768
  c.duration = config.duration(examples=examples)
  c.data.recipe, c.data.squash = "openai", True
  c.data.interpolation = "bilinear"
  c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-3, 1e-4
  c.optimizer.warmup = config.duration(steps=20_000)
  c.optimizer.b2, c.optimizer.epsilon = 0.95, 1e-8
  c.optimizer.gradient_clip = 1.0
  c.evaluate_every = c.checkpoint.every = config.duration(steps=20_000)
  read_data(c, data, imagenet)
  return c
