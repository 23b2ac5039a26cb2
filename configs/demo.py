"""DeCLIP on rendered scenes, small enough for two CPU cores: make demo

  python -m declip_jax.train --config=demo:method=slip --workdir runs/slip

The classes of the zero-shot evaluation are 30 pairs of a colour and a shape that never appear together in training;
chance is 3.3 %, and naming only the colour, of which there are three pairs each, gives 33.3 %.

The image tower is a ResNet, which `export --format huggingface` does not take, since small ViTs learn the colours but
hardly the shapes in this time. Zero-shot accuracy with DeCLIP, and the median of eight alternate steps, on two shared
cores; the learning rate is that of the ViT, the ResNet's is 7e-4:

  image tower                                        steps  accuracy after half and all of them  time of a step
  this ResNet                                          300  39.5 %, 47.7 %                       476 ms
  ViT, patch 8, width 128, depth 4, 1e-3               300  33.5 %, 33.7 %                       465 ms
  ViT, patch 8, width 128, depth 4, 2e-3             1,000  33.6 %, 36.3 %
  ViT, patch 4, width 128, depth 3, 1e-3               300  33.6 %, stopped                      1,148 ms
"""

from ml_collections import ConfigDict

from declip_jax import architectures, config
from declip_jax.data.sources.scenes import TEMPLATES


def get_config(method: str = "declip") -> ConfigDict:
  """Returns the config of a `method` of `methods.METHODS`."""
  c = config.default(method)
  c.batch_size = 64
  c.duration = config.duration(steps=1000)
  c.data.train = ("scenes:train/100000/40",)
  c.data.image_size = 32
  # Milder than for photographs: a scene shows one object, and its colour is half of what can be learned.
  c.data.weak_scale = c.data.strong_scale = (0.8, 1.0)
  c.data.jitter = (0.2, 0.2, 0.2, 0.02)
  c.data.grayscale_probability = 0.05
  c.data.blur_probability, c.data.blur_radius = (0.2,), (0.1, 0.5)
  c.data.mask_slots = 2  # captions are short: 15 % of about 10 tokens
  c.data.threads = 2
  c.model.dtype = "float32"
  tokens = method in ("slip_mim", "filip", "defilip")  # they use patches, of which a ResNet has one for 32 pixels
  if tokens:
    c.model.image = architectures.vit(patch=8, width=128, depth=4, heads=4)
  else:
    c.model.image = architectures.resnet(width=16, layers=(1, 1, 1, 1))  # learns shapes from fewer images
  c.model.text.update({"width": 64, "depth": 2, "heads": 2, "context_length": 24})
  c.model.heads.update({"embed_dim": 64, "image_bias": not tokens, "bank_size": 2048})
  c.model.heads.update({"simsiam_projector": (128, 128, 128), "simsiam_predictor": (64, 128)})
  c.model.heads.update({"simclr_projector": (256, 256, 64), "dense_dim": 64})
  c.model.heads.update({"momentum_projector": (256, 256, 64), "momentum_predictor": (256, 64)})
  c.optimizer.learning_rate = 7e-4
  c.optimizer.warmup = config.duration(steps=50)
  c.optimizer.weight_decay = 0.1
  c.log_every = 10
  c.evaluate_every = config.duration(steps=250)
  c.evaluate_batch_size = 256
  c.checkpoint.every = config.duration(steps=250)
  if method != "simclr":  # it has no text tower
    c.evals.heldout = config.zero_shot("scenes:heldout/1500/40", TEMPLATES)
    c.evals.retrieval = config.retrieval("scenes:test/500/40")
    c.checkpoint.best_metric = "eval/heldout/top1"
  return c
