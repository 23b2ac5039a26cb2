"""The legal values of the fields of a config, as far as they do not depend on other fields."""

from collections.abc import Callable, Iterable
import math
import operator
from typing import Any

from ml_collections import ConfigDict

from declip_jax.data.images import INTERPOLATIONS, LARGEST_LIMIT
from declip_jax.evals.prompts import check_templates
from declip_jax.models.model import DTYPES
from declip_jax.spelling import did_you_mean

_NAMES = (("model.dtype", DTYPES), ("data.interpolation", INTERPOLATIONS))
_ONE_OR_MORE = (
  *("batch_size", "evaluate_batch_size", "micro_batches", "data.image_size", "model.unroll"),
  *("model.heads.embed_dim", "model.heads.dense_dim", "model.heads.norm_groups", "model.heads.bank_groups"),
  *(f"model.{tower}.{field}" for tower in ("image", "text") for field in ("width", "depth", "heads")),
  *("model.image.patch", "model.image.norm_groups", "model.image.initial_width", "model.image.group_width"),
  *("model.text.context_length", "checkpoint.keep_last", "safety.max_skipped_steps"),
)
_POSITIVE = (
  *("model.image.mlp_ratio", "model.text.mlp_ratio", "model.image.epsilon", "model.text.epsilon"),
  *("model.image.slope", "model.image.multiplier", "optimizer.cooldown_power", "optimizer.layer_decay"),
  *("optimizer.trust_coefficient", "lora.alpha"),
)
_ZERO_OR_MORE = (
  *("seed", "log_every", "data.evaluation_resize", "data.mask_slots", "model.heads.max_scale"),
  *("model.heads.num_classes", "evaluate_cache_gib"),
  *("lora.rank", "checkpoint.keep_best", "safety.max_rollbacks", "safety.hang_timeout", "safety.checkpoint_minutes"),
)
_RATES = (
  *("optimizer.learning_rate", "optimizer.warmup_start", "optimizer.end_learning_rate", "optimizer.weight_decay"),
  *("optimizer.sgd_weight_decay", "optimizer.epsilon", "optimizer.gradient_clip"),
)
_PROBABILITIES = ("momentum_tower.decay", "data.mask_probability")
_SHARES = ("data.max_bad", "data.patch_share")
_DECAYS = ("optimizer.b1", "optimizer.b2", "optimizer.momentum", "optimizer.ema")
_DECAYS += ("model.drop_path", "model.patch_dropout")
_FINITE = ("model.heads.logit_scale_init", "model.heads.logit_bias_init")
_WIDTHS = (
  *("model.heads.simclr_projector", "model.heads.simsiam_projector", "model.heads.simsiam_predictor"),
  *("model.heads.momentum_projector", "model.heads.momentum_predictor", "model.image.layers"),
)
_TEXTS = (
  *("data.train", "data.ssl_train", "init_from.groups", "init_from.settings", "optimizer.frozen"),
  *("model.heads.classnames", "lora.targets", "lora.towers", "lora.trained"),
)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def _each(is_legal: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda values: isinstance(values, (tuple, list)) and all(map(is_legal, values))


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and value >= 1


def _is_pair(kind: type) -> Callable[[Any], bool]:
  return lambda pair: (
    isinstance(pair, (tuple, list))
    and len(pair) == 2
    and isinstance(pair[0], kind)
    and isinstance(pair[1], (int, float))
  )


def _fields(names: Iterable[str], is_legal: Callable[[Any], bool], legal: str) -> list[tuple[str, Callable, str]]:
  return [(name, is_legal, legal) for name in names]


# Fields, whether a value is legal, and the legal values in words.
_RANGES = (
  *_fields(_ONE_OR_MORE, _is_count, "1 or more"),
  *_fields(_POSITIVE, lambda x: _is_number(x) and x > 0, "a finite number, more than 0"),
  *_fields(_ZERO_OR_MORE, lambda x: _is_number(x) and x >= 0, "0 or more"),
  *_fields(_RATES, lambda x: _is_number(x) and x >= 0, "a finite number, 0 or more"),
  *_fields(_PROBABILITIES, lambda x: 0 <= x <= 1, "0 to 1"),
  *_fields(_SHARES, lambda x: 0 <= x <= 1, "a fraction from 0 to 1"),
  *_fields(_DECAYS, lambda x: _is_number(x) and 0 <= x < 1, "a finite number, 0 or more and less than 1"),
  *_fields(_FINITE, _is_number, "a finite number"),
  *_fields(_WIDTHS, _each(_is_count), "a tuple of integers, 1 or more each"),
  (
    "model.text.buckets",
    lambda lengths: _each(_is_count)(lengths) and list(lengths) == sorted(set(lengths)),
    "a tuple of lengths, 1 or more each, ascending",
  ),
  *_fields(_TEXTS, _each(lambda x: isinstance(x, str)), "a tuple of strings"),
  *_fields(("data.mixture", "data.ssl_mixture"), _each(_is_number), "a tuple of weights"),
  ("model.mean", lambda x: len(x) == 3 and _each(_is_number)(x), "three numbers, for red, green and blue"),
  (
    "model.std",
    lambda x: len(x) == 3 and _each(_is_number)(x) and min(x) > 0,
    "three numbers, more than 0, for red, green and blue",
  ),
  (
    "data.max_pixels",
    lambda count: 1 <= count <= LARGEST_LIMIT,
    f"1 to {LARGEST_LIMIT}, the most that Pillow reads",
  ),
  ("data.max_seconds", lambda x: _is_number(x) and x >= 0, "seconds, 0 for no limit"),
  ("data.workers", lambda count: count is None or count >= 0, "0 or more, or None"),
  ("data.threads", lambda count: count is None or count >= 1, "1 or more, or None"),
  (
    "data.caption_weights",
    lambda weights: _each(lambda x: _is_number(x) and x >= 0)(weights) and (not weights or any(weights)),
    "weights of 0 or more, not all of them 0",
  ),
  (
    "optimizer.multipliers",
    _each(_is_pair(str)),
    "pairs of a path and a factor, such as (('heads', 0.1),)",
  ),
  ("optimizer.milestones", _each(_is_pair(int)), "pairs of a step and a factor, such as ((1000, 0.1),)"),
  ("safety.spike_factor", lambda x: x == 0 or (_is_number(x) and x > 1), "0, or more than 1"),
)


def check_values(config: ConfigDict) -> None:
  """Rejects values that are illegal regardless of other fields.

  Raises:
    ValueError: the message names the first such field, its value and the legal ones.
  """
  for field, legal in _NAMES:
    name = operator.attrgetter(field)(config)
    if name not in legal:
      raise ValueError(f"config.{field}={name!r}: expected one of {[*legal]}{did_you_mean(str(name), legal)}")
  for field, is_legal, legal in _RANGES:
    parent, _, name = field.rpartition(".")
    fields = operator.attrgetter(parent)(config) if parent else config
    if name in fields and not is_legal(fields[name]):  # each kind of tower has its own fields
      raise ValueError(f"config.{field}={fields[name]!r}: expected {legal}")
  for field in ("data.templates", "init_from.templates"):
    if templates := operator.attrgetter(field)(config):
      check_templates(templates, f"config.{field}")
