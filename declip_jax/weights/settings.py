"""Settings that override what was recognised of a model: fields of `config.model`, and of the view of images.

`image_size` and `text.context_length` change the shapes of position embeddings, which are resized or truncated.
"""

import ast
from collections.abc import Iterable, Mapping
import dataclasses
import math
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax.numpy as jnp
import numpy as np

from declip_jax.data.images import INTERPOLATIONS, EvalView
from declip_jax.models.positions import IMAGE_POSITIONS, TEXT_POSITIONS, class_tokens, resize_positions
from declip_jax.models.towers import IMAGE_TOWERS
from declip_jax.spelling import did_you_mean
from declip_jax.weights.layout import ModelFields

Tree = Any
# Settings and fields of an export that are not fields of `config.model`, and the fields of `EvalView` that they set.
VIEW = {"image_size": "size", "interpolation": "interpolation", "resize": "resize", "squash": "squash"}


def parse_settings(settings: Iterable[str], field: str) -> dict[str, Any]:
  """Parses settings that are written in a config or on a command line, such as "image.heads=16".

  Args:
    settings: texts; a value that is not a Python literal is a string.
    field: name of the field or flag, for errors.

  Raises:
    ValueError: a text without "=".
  """
  parsed = {}
  for setting in settings:
    name, equals, value = setting.partition("=")
    if not equals:
      raise ValueError(f"{field}: {setting!r} is not of the form 'image.heads=16'")
    try:
      parsed[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
      parsed[name] = value
  return parsed


def with_fields(model: ModelFields, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The fields of a model with some replaced, by their paths, such as "image.heads".

  Raises:
    ValueError: an unknown field, or a value of another type; the message begins with `name`.
  """
  fields = flatten_dict(dict(model), sep=".")
  for field, value in settings.items():
    if field not in fields:
      closest = did_you_mean(field, [*fields, *VIEW])
      raise ValueError(
        f"{name}: this model has no field {field!r:.80}{closest or '; its fields are those of config.model'}"
      )
    fields[field] = _like(fields[field], value, f"{name}: {field}={value!r}")
  for field in ("mean", "std"):
    values = fields[field]
    numbers = [x for x in values if isinstance(x, (int, float)) and math.isfinite(x) and (x > 0 or field == "mean")]
    if len(numbers) != 3 or len(values) != 3:
      raise ValueError(f"{name}: {field}={values}: expected three numbers, more than 0 for a deviation")
  return unflatten_dict(fields, sep=".")


def with_view(view: EvalView, settings: Mapping[str, Any], model: ModelFields, name: str) -> EvalView:
  """The view of images with some fields replaced by settings, and mean and deviation of the model.

  Raises:
    ValueError: an invalid value; the message begins with `name`.
  """
  given = {
    ours: _like(getattr(view, ours), settings[field], f"{name}: {field}={settings[field]!r}")
    for field, ours in VIEW.items()
    if field in settings
  }
  if "image_size" in settings and "resize" not in settings:
    given["resize"] = view.resize * given["size"] // view.size  # so that the crop is the same share of the image
  view = dataclasses.replace(view, **given, mean=tuple(model["mean"]), std=tuple(model["std"]))
  stride = _stride(model, name)
  whole = model["image"].get("pooling") == "map" or view.size % stride == 0  # see `architectures.SIGLIP`
  if view.size < stride or not whole:
    raise ValueError(f"{name}: image_size={view.size}: expected a multiple of {stride}, as the image tower requires")
  if view.interpolation not in INTERPOLATIONS:
    raise ValueError(f"{name}: interpolation={view.interpolation!r}: choose one of {list(INTERPOLATIONS)}")
  if view.resize and (view.resize < view.size or view.squash):
    raise ValueError(f"{name}: resize={view.resize}: expected 0, or at least {view.size} pixels if squash is not set")
  return view


def with_positions(params: Tree, model: ModelFields, image_size: int, name: str) -> tuple[Tree, list[str]]:
  """Adapts position embeddings to a model and an image size; returns the parameters, and remarks on what was changed.

  Those of images are resized by cubic interpolation; those of texts are truncated.

  Raises:
    ValueError: a context length beyond the positions; the message begins with `name`.
  """
  flat, remarks = flatten_dict(params), []
  path = ("towers", *IMAGE_POSITIONS.get(model["image"]["kind"], ()))
  if path in flat:
    size = (image_size // _stride(model, name)) ** 2 + class_tokens(len(flat[path]))
    if size != len(flat[path]):
      remarks.append(f"the position embeddings of images were resized from {len(flat[path])} to {size} positions")
      flat[path] = np.asarray(resize_positions(jnp.asarray(flat[path]), size))
  path, length = ("towers", *TEXT_POSITIONS), model["text"]["context_length"]
  if path in flat and not 2 <= length <= len(flat[path]):
    raise ValueError(f"{name}: text.context_length={length}: expected 2 to {len(flat[path])}, the trained positions")
  if path in flat:
    flat[path] = flat[path][:length]
  return unflatten_dict(flat), remarks


def _stride(model: ModelFields, name: str) -> int:
  """Distance between neighbouring tokens of an image tower in pixels."""
  fields = dict(model["image"])
  try:
    stride = IMAGE_TOWERS[fields.pop("kind")](**fields).stride
  except (LookupError, TypeError) as error:
    raise ValueError(f"{name}: no image tower has the fields {model['image']}") from error
  if stride < 1:
    raise ValueError(f"{name}: image.patch={stride}: expected 1 or more")
  return stride


def _like(old: Any, value: Any, where: str) -> Any:
  """A value converted to the type of the one that it replaces."""
  if isinstance(old, tuple) and isinstance(value, (list, tuple)):
    return tuple(value)
  if isinstance(value, np.generic):
    value = value.item()
  kinds = (int, float) if isinstance(old, float) else type(old)
  if old is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(old, bool)):
    raise ValueError(f"{where}: expected a value like {old!r}")
  return float(value) if isinstance(old, float) else value
