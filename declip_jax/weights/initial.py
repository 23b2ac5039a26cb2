"""The first state of a run from other weights: either tower, both, or everything, for any method.

Resolution, context length, vocabulary (a mask token) and heads may differ; the towers' computation must not.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from declip_jax.data.text.tokenizer import parse_name
from declip_jax.models.bank import Bank
from declip_jax.models.model import Model
from declip_jax.models.paths import is_below_any
from declip_jax.models.positions import resize_positions
from declip_jax.training.state import State
from declip_jax.weights.layout import ModelFields
from declip_jax.weights.read import Weights, read
from declip_jax.weights.recognise import OPENAI_EOT
from declip_jax.weights.settings import parse_settings

Tree = Any
# An entry of `config.init_from.groups` -> paths of its arrays in `params` and in `collections`.
GROUPS = {
  "image": ("towers/image", "heads/image_projection", "towers/batch_stats/image"),
  "text": ("towers/text", "heads/text_projection"),
  "heads": ("heads",),
}
_TEMPERATURE, _BIAS = "params/heads/logit_scale", "params/heads/logit_bias"  # the second one is of the sigmoid loss
# Fields of a tower that may differ between the weights and the run.
_MAY_DIFFER = {
  "image": ("initializer", "norm_groups"),
  "text": ("context_length", "vocab_size", "buckets", "tokenizer"),
}


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Weights that a run starts from.

  Attributes:
    path: a run, one of its checkpoints, or anything else that `weights.read.read` reads; empty for none.
    groups: the `GROUPS` to load.
    settings: fields that the file does not contain, such as "image.heads=16".
    templates: prompts for the class names, from whose embeddings a classifier starts; () for a random one.
  """

  path: str = ""
  groups: tuple[str, ...] = ("image", "text", "heads")
  settings: tuple[str, ...] = ()
  templates: tuple[str, ...] = ()


def read_initial(init_from: InitFrom, model: ModelFields) -> Weights | None:
  """Reads the weights that a run starts from, None if there are none.

  Args:
    init_from: what to read.
    model: `config.model` of the run, as nested dicts.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: the file cannot be read, or its towers compute something other than the model's.
  """
  if not init_from.path:
    return None
  weights = read(init_from.path, parse_settings(init_from.settings, "config.init_from.settings"))
  _check_towers(weights, model, init_from.groups)
  return weights


def initialise(state: State, weights: Weights, groups: Sequence[str], model: Model) -> tuple[State, list[str]]:
  """Loads weights into a randomly initialised state, and copies them into its momentum tower.

  Args:
    state: randomly initialised state.
    weights: weights to load.
    groups: the `GROUPS` to load.
    model: the model to initialise.

  Returns:
    The state, and lines that report where each array is from.

  Raises:
    ValueError: see `load_weights`.
  """
  params, collections, lines = load_weights(state.params, state.collections, weights, groups)
  return state.replace(params=params, collections={**collections, **model.momentum_copy(params)}), lines


def set_classifier(state: State, rows: Float[np.ndarray, "classes d"]) -> State:
  """Replaces the kernel of the classifier by the rows of another one, and its bias by zeros.

  Raises:
    ValueError: the classifier has another number of classes, or its inputs another dimension.
  """
  classifier = state.params["heads"]["classifier"]
  if classifier["kernel"].shape != rows.T.shape:
    raise ValueError(
      f"config.init_from.templates: the embeddings of the class names have the shape {rows.shape}, but the classifier "
      f"has {classifier['kernel'].shape[::-1]}: set config.model.heads.classify_joint=True and the embed_dim of the "
      "weights"
    )
  kernel, bias = _placed(classifier["kernel"], rows.T), _placed(classifier["bias"], np.zeros(len(rows)))
  heads = {**state.params["heads"], "classifier": {"kernel": kernel, "bias": bias}}
  return state.replace(params={**state.params, "heads": heads})


def load_weights(
  params: Tree, collections: Tree, weights: Weights, groups: Sequence[str]
) -> tuple[Tree, Tree, list[str]]:
  """Loads weights into randomly initialised parameters and collections, leaf by leaf, onto the devices of each leaf.

  Position embeddings of images are resized by cubic interpolation, as in open_clip. Position embeddings of texts and
  token embeddings are cut, or keep their random entries at the end (open_clip interpolates positions of texts, which
  moves every position). A projection or head of another shape stays random; a bias that a projection did not have
  starts at zero. A sigmoid loss whose bias the weights do not have starts with its own temperature, too: with CLIP's
  and a bias of -10, it would take most pairs for matches.

  Args:
    params, collections: randomly initialised arrays.
    weights: weights to load; `read_initial` has checked them.
    groups: the `GROUPS` to load; "heads" contains everything after the towers but the projections.

  Returns:
    Parameters, collections, and lines that report where each array is from.

  Raises:
    ValueError: a tower has other shapes, or the weights have nothing in `groups`.
  """
  fresh = flatten_dict({"params": params, "collections": collections}, sep="/")
  given = flatten_dict({"params": weights.params, "collections": weights.collections}, sep="/")
  merged, changed = dict(fresh), []
  new_bias = _BIAS in fresh and _BIAS not in given
  for path, leaf in fresh.items():
    below = path.split("/", 1)[1]
    if not _is_in(below, groups):
      continue
    if path not in given:
      if below.endswith("_projection/bias") and path.replace("/bias", "/kernel") in given:
        merged[path] = _placed(leaf, np.zeros(leaf.shape))
        changed.append(f"initialised to zero: {below}")
    elif new_bias and path == _TEMPERATURE:
      changed.append(f"not loaded: {below}, since these weights have no bias of a sigmoid loss")
    elif isinstance(leaf, Bank):
      if leaf.entries.shape == given[path].entries.shape:
        merged[path] = jax.tree.map(_placed, leaf, given[path])
      else:
        shapes = f"{given[path].entries.shape} in the weights and {leaf.entries.shape} in the run"
        changed.append(f"not loaded: {below}, {shapes}")
    else:
      merged[path] = _fitted(below, np.asarray(given[path]), leaf, changed)
  loaded = [path for path in fresh if merged[path] is not fresh[path]]
  if not loaded:
    raise ValueError(f"config.init_from.groups={tuple(groups)}: {weights.origin} has no array of these groups")
  tree = unflatten_dict(merged, sep="/")
  lines = [f"loaded from {weights.origin}: {_sizes(loaded, merged)}", *changed]
  unused = [path.split("/", 1)[1] for path in given if path not in fresh]
  if unused := [path for path in unused if _is_in(path, groups)]:
    lines.append(f"not in this model: {', '.join(unused)}")
  left = [path for path in fresh if path.startswith("params/") and path not in loaded]
  lines.append(f"newly initialised: {_sizes(left, fresh)}" if left else "nothing is newly initialised")
  collections = {half: tree.get("collections", {}).get(half, {}) for half in collections}
  return tree["params"], collections, [*lines, *weights.remarks]


def _check_towers(weights: Weights, model: ModelFields, groups: Sequence[str]) -> None:
  """Rejects unknown groups, and towers that compute something other than those of `config.model`."""
  if unknown := set(groups) - set(GROUPS):
    raise ValueError(f"config.init_from.groups={tuple(groups)}: choose from {sorted(GROUPS)}, not {sorted(unknown)}")
  for side in ("image", "text"):
    if side not in groups:
      continue
    if side not in weights.params["towers"]:
      raise ValueError(f"config.init_from.groups={tuple(groups)}: {weights.origin} has no {side} tower")
    ours, theirs = model[side], weights.model[side]
    for name in sorted({*ours, *theirs} - set(_MAY_DIFFER[side])):
      if ours.get(name) != theirs.get(name):
        raise ValueError(
          f"config.model.{side}.{name}={ours.get(name)!r} does not match the weights of {weights.origin}, which have "
          f"{theirs.get(name)!r}"
        )
  if "image" in groups:
    _check_normalisation(weights, model)
  if "text" in groups:
    _check_tokenizer(weights, model)


def _check_normalisation(weights: Weights, model: ModelFields) -> None:
  """Rejects a mean or a deviation of pixels other than that with which the image tower was trained."""
  for name in ("mean", "std"):
    if not np.allclose(model[name], weights.model[name], atol=1e-6):
      flags = " ".join(f"--config.model.{field}='{tuple(weights.model[field])}'" for field in ("mean", "std"))
      raise ValueError(
        f"config.model.{name}={tuple(model[name])} does not match the weights of {weights.origin}, which have "
        f"{tuple(weights.model[name])}: pass {flags}"
      )


def _check_tokenizer(weights: Weights, model: ModelFields) -> None:
  """Rejects another kind of tokenizer, or other options, than those of the weights; their files are not compared.

  Weights with an end of text other than OpenAI's and without a tokenizer do not tell theirs.
  """
  names = [fields["text"]["tokenizer"] for fields in (model, weights.model)]
  ours, theirs = ((kind, options) for kind, _, options in map(parse_name, names))
  if ours != theirs and (names[1] != "openai" or weights.model["text"]["eot"] == OPENAI_EOT):
    raise ValueError(
      f"config.model.text.tokenizer={names[0]!r} does not match the weights of {weights.origin}, which have "
      f"{names[1]!r}"
    )


def _is_in(path: str, groups: Sequence[str]) -> bool:
  for group in ("image", "text", "heads"):  # in this order: a projection belongs to its tower
    if is_below_any(path, GROUPS[group]):
      return group in groups
  return False


def _fitted(path: str, value: np.ndarray, leaf: Array, changed: list[str]) -> Array:
  """A value on the devices of a fresh leaf, resized if need be; the leaf itself if no resizing fits."""
  if value.shape == leaf.shape:
    return _placed(leaf, value)
  name = path.rsplit("/", 1)[1]
  if name == "position_embedding" and path.startswith("towers/image") and value.shape[1:] == leaf.shape[1:]:
    changed.append(f"resized: {path}, {value.shape[0]} -> {leaf.shape[0]} positions")
    return _placed(leaf, np.asarray(resize_positions(jnp.asarray(value), leaf.shape[0])))
  along_first = name in ("position_embedding", "embedding") and value.shape[1:] == leaf.shape[1:]
  along_last = path.startswith("heads/mlm/") and value.shape[:-1] == leaf.shape[:-1]
  if along_first or along_last:
    axis = 0 if along_first else leaf.ndim - 1
    change = "cut" if value.shape[axis] > leaf.shape[axis] else "extended"
    changed.append(f"{change}: {path}, {value.shape} -> {leaf.shape}")
    common = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, leaf.shape, strict=True))
    return _overwritten(leaf, value[common])
  if path.startswith("towers/"):
    raise ValueError(f"config.init_from: {path} is {value.shape} in the weights and {leaf.shape} in the run")
  return leaf


def _placed(leaf: Array, value: np.ndarray) -> Array:
  value = np.asarray(value, leaf.dtype)
  return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])


def _overwritten(leaf: Array, value: np.ndarray) -> Array:
  """A fresh leaf whose first entries are those of a smaller value."""
  first = tuple(slice(0, size) for size in value.shape)
  return jax.jit(lambda x: x.at[first].set(jnp.asarray(value)), out_shardings=leaf.sharding)(leaf)


def _sizes(paths: Sequence[str], leaves: Mapping[str, Any]) -> str:
  """Towers and heads with the numbers of their parameters among `paths`, for printing."""
  sizes: dict[str, int] = {}
  for path in paths:
    if path.startswith("params/"):
      module = "/".join(path.split("/")[1:3])
      sizes[module] = sizes.get(module, 0) + leaves[path].size
  return ", ".join(f"{module} ({size:,})" for module, size in sizes.items())
