"""CLIP, SigLIP, SigLIP 2 or any other weights with two towers, fine-tuned on your own images and captions.

  python -m declip_jax.train --config=finetune_pairs:init=hf-hub:ORG/NAME,data=pairs.csv --workdir runs/mine

Architecture, tokenizer, preprocessing, temperature and bias are those of the weights, and so is the loss: the sigmoid
loss for SigLIP's, the contrastive loss for others. `lora=8` trains low-rank adapters in place of the towers, which then
have no moments; a model that is loaded or exported has the adapters in its kernels.

Retrieval on pairs that are not trained on, 10 % of all but at most 5,000, is evaluated before the first step and after
each tenth of the run, and the best checkpoint is kept. Batch size, dtype and what the backward pass recomputes are
chosen for the data and the devices, by the rules in `planning.choose`: small batches for few pairs. The learning rate
of 1e-5 is that of FLYP (Goyal et al. 2023), which fine-tunes CLIP with its own loss; ten epochs with a warm-up in the
first, and crops of at least 90 % of an image, as open_clip's, are ours. There is no published result to compare with.
`docs/finetune_pairs.md` is a tutorial.
"""

from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from declip_jax import config
from declip_jax.configs import to_source
from declip_jax.configs.pretrain import HELD_OUT
from declip_jax.spelling import did_you_mean

if TYPE_CHECKING:  # which would import JAX
  from declip_jax.weights.describe import Description

# Methods with one loss, and the head that has what only this loss needs.
METHODS = {"clip": "joint", "siglip": "sigmoid", "filip": "filip"}
LOCKS = ("none", "image", "text", "towers")


def get_config(
  init: str = "",
  data: str = "",
  test: str = "",
  method: str = "",
  lock: str = "none",
  lora: int = 0,
  epochs: float = 10,
  settings: tuple[str, ...] = (),
) -> ConfigDict:
  """Returns the config.

  Args:
    init: a run, one of its checkpoints, or any weights that `declip_jax.load` reads.
    data: images with captions, any path that `data.inspect` recognises, or KIND:LOCATION. Training needs it.
    test: other pairs to evaluate; by default, a part of `data` is held out.
    method: loss, "clip", "siglip" or "filip"; by default, that of the weights.
    lock: what is not trained, "none", "image" or "text", a tower with its projection, or "towers", both without theirs.
    lora: rank of the adapters that are trained in place of the towers, such as 8; 0 trains the towers.
    epochs: length of training.
    settings: what a file of weights does not contain, such as ("text.activation=gelu",).

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: an unknown method or lock, or weights that cannot be read or have no text tower.
  """
  found = describe_weights(init, settings)
  method = method or ("filip" if found.tokens else "siglip" if "sigmoid" in found.heads else "clip")
  for name, value, legal in (("method", method, METHODS), ("lock", lock, LOCKS)):
    if value not in legal:
      raise ValueError(f"{name} {value!r}: choose one of {[*legal]}{did_you_mean(value, legal)}")
  c = config.default(method)
  copy_weights_fields(c, found)
  c.init_from.path, c.init_from.settings = init, tuple(settings)
  if METHODS[method] not in found.heads:  # the temperature of another loss
    c.init_from.groups = ("image", "text")
  c.batch_size, c.model.dtype, c.model.remat = 0, "auto", "auto"
  c.duration, c.optimizer.warmup = config.duration(epochs=epochs), config.duration(share=0.1)
  c.data.recipe, c.data.weak_scale = "clip", (0.9, 1.0)
  c.optimizer.update({"learning_rate": 2e-4 if lora else 1e-5, "weight_decay": 0.1, "decay_mask": "finetune"})
  lock_towers(c, lock, lora)
  source = to_source(data) if data else ""
  c.data.train = (source if test else f"kept:{HELD_OUT}:{source}",) if source else ()
  c.evaluate_every, c.checkpoint.every = config.duration(share=0.1), config.duration(share=0.1)
  if source:
    c.evals.retrieval = config.retrieval(to_source(test) if test else f"heldout:{HELD_OUT}:{source}", equal_texts=True)
    c.evaluate_first, c.checkpoint.best_metric = True, "eval/retrieval/mean_recall"
  return c


def describe_weights(init: str, settings: tuple[str, ...]) -> "Description":
  """The model and the preprocessing of the weights; see `weights.describe`."""
  from declip_jax.weights.describe import describe
  from declip_jax.weights.settings import parse_settings

  if not init:
    raise ValueError("init= is missing, which names the weights, as in --config=finetune_pairs:init=RUN,data=pairs.csv")
  found = describe(init, parse_settings(settings, "settings"))
  if "joint" not in found.heads:
    raise ValueError(f"init={init}: these weights ({found.origin}) have no text tower, which pairs need")
  return found


def copy_weights_fields(c: ConfigDict, found: "Description") -> None:
  """Sets towers, joint space, tokenizer and preprocessing to those of the weights, in place."""
  c.model.image, c.model.text = ConfigDict(found.model["image"]), ConfigDict(found.model["text"])
  c.model.mean, c.model.std = tuple(found.model["mean"]), tuple(found.model["std"])
  for field in ("embed_dim", "image_linear", "text_linear", "image_bias", "text_bias", "max_scale", "dense_dim"):
    c.model.heads[field] = found.model["heads"][field]
  c.data.image_size, c.data.evaluation_resize = found.view.size, found.view.resize
  c.data.interpolation, c.data.squash = found.view.interpolation, found.view.squash


def lock_towers(c: ConfigDict, lock: str, lora: int) -> None:
  """Sets what is not trained, and the rank of the adapters of what is, in place.

  Raises:
    ValueError: there is no tower for adapters.
  """
  c.lora.rank = lora
  if lora and lock == "towers":
    raise ValueError(f"lora={lora}, lock='towers': locked towers have no adapters: choose one of the two")
  if lora and lock != "none":
    c.lora.towers = ("text",) if lock == "image" else ("image",)
  elif lock == "towers":
    c.optimizer.frozen = ("towers",)
  elif lock != "none":
    has_projection = c.model.heads[f"{lock}_linear"]
    c.optimizer.frozen = (f"towers/{lock}", *[f"heads/{lock}_projection"] * has_projection)
