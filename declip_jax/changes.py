"""What a run trains differently from the default config of its method and architecture."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from declip_jax.architectures import ARCHITECTURES
from declip_jax.build import heads_of, unread_augmentation
from declip_jax.config import default, duration, parse_json
from declip_jax.methods import PRESETS, name_of
from declip_jax.models.heads import unread_fields
from declip_jax.objectives import make_objective
from declip_jax.runtime.workdir import differences

# Fields that change when a run reports, evaluates and saves, or how fast it reads, but not what it trains.
_OF_REPORTS = ("evals", "evaluate_", "checkpoint", "log_every", "trackers", "safety.", "data.threads", "data.workers")


class Changes(NamedTuple):
  """The differences of a config from a default one.

  Attributes:
    method, architecture: arguments of `config.default` that make the default one.
    lines: fields that change what is trained, with both values, such as "config.seed: 0 -> 1".
  """

  method: str
  architecture: str
  lines: list[str]


def changes_from_default(config: ConfigDict) -> Changes:
  """The fields that change what is trained, compared with the default config of the method and architecture.

  Those are CLIP and ViT-B/32 if no method has the recipe and terms, or no architecture the towers. Evaluations,
  cadences and fields that this run does not read are left out.
  """
  method = name_of(config.data.recipe, make_objective(config.objective.to_dict()).weights)
  method = method if method in PRESETS["paper"] else "clip"
  fitting = [name for name in ARCHITECTURES if _has_towers(config, name)]
  same_tokenizer = (name for name in fitting if ARCHITECTURES[name].text.tokenizer == config.model.text.tokenizer)
  architecture = next(same_tokenizer, fitting[0] if fitting else "ViT-B/32")
  before, after = (_in_words(parse_json(one.to_json_best_effort())) for one in (default(method, architecture), config))
  left_out = _OF_REPORTS + tuple(f"model.heads.{field}:" for field in unread_fields(heads_of(config)))
  left_out += tuple(f"{field}:" for field in unread_augmentation(config))
  names = tuple(f"config.{field}" for field in left_out)
  return Changes(method, architecture, [line for line in differences(before, after) if not line.startswith(names)])


def _has_towers(config: ConfigDict, architecture: str) -> bool:
  """Whether a config has the image tower, the resolution and the size of the text tower of an architecture."""
  named, text = ARCHITECTURES[architecture], config.model.text
  return (
    named.image.to_dict() == config.model.image.to_dict()
    and named.image_size == config.data.image_size
    and (named.text.width, named.text.depth) == (text.width, text.depth)
  )


class _Words(str):
  """A text that is shown without quotation marks."""

  __slots__ = ()
  __repr__ = str.__str__


def _in_words(value: Any) -> Any:
  """The fields of a config with its durations, which have one unit, as texts, such as "32 epochs"."""
  if not isinstance(value, dict):
    return value
  if value.keys() == set(duration()):
    unit, number = next(((unit, number) for unit, number in value.items() if number), ("", 0))
    if not unit:
      return _Words("none")
    return _Words(
      f"{number:g} of the run" if unit == "share" else f"{number:,.10g} {unit if number != 1 else unit[:-1]}"
    )
  return {name: _in_words(field) for name, field in value.items()}
