"""The state of a run before its first step: random, or from other weights."""

import math

from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.clip import Clip
from declip_jax.evals.classes import names_for_prompts
from declip_jax.training.state import State, create_state, start_average
from declip_jax.weights.initial import initialise, read_initial, set_classifier
from declip_jax.weights.read import Weights


def read_weights(config: ConfigDict) -> Weights | None:
  """The weights that a run starts from, None if there are none.

  Raises:
    FileNotFoundError, ValueError: see `weights.initial.read_initial` and `build.make_init_from`.
  """
  return read_initial(build.make_init_from(config), config.model.to_dict())


def _about_squash(weights: Weights, config: ConfigDict) -> list[str]:
  """Reports weights of an image tower that saw images in another shape than those of the run."""
  if weights.view.squash == config.data.squash or "image" not in config.init_from.groups:
    return []
  theirs, ours = "whole images resized to a square", "crops that keep their shape"
  if config.data.squash:
    theirs, ours = ours, theirs
  return [
    f"these weights were trained on {theirs}, and this run sees {ours}: "
    f"config.data.squash={weights.view.squash} does as they do"
  ]


def _about_temperature(state: State, config: ConfigDict) -> list[str]:
  """Reports a temperature that the first step moves into its range, such as SigLIP's in a run of CLIP."""
  scale, bounds = state.params["heads"].get("logit_scale"), config.optimizer.logit_scale_range
  if scale is None or not bounds or bounds[0] <= float(scale) <= bounds[1]:
    return []
  nearest = min(max(float(scale), bounds[0]), bounds[1])
  return [
    f"the inverse temperature of these weights, {math.exp(scale):.4g}, becomes {math.exp(nearest):.4g} after the first "
    "step, by config.optimizer.logit_scale_range; () keeps it"
  ]


def first_state(
  config: ConfigDict, built: build.Built, abstract: State, weights: Weights | None
) -> tuple[State, list[str]]:
  """The state before the first step, on the devices, and lines that report where its arrays are from.

  Args:
    config: the run's config, with the names of its classes.
    built: the objects that it describes.
    abstract: shapes and shardings of the state.
    weights: see `read_weights`.

  Raises:
    ValueError: the weights do not fit.
  """
  model, shapes = built.model, built.batch_shape(config.batch_size)
  state = create_state(config.seed, shapes, abstract, model=model, optimizer=built.optimizer)
  if weights is None:
    return state, []
  state, messages = initialise(state, weights, config.init_from.groups, model)
  messages += _about_squash(weights, config) + _about_temperature(state, config)
  if config.init_from.templates:
    names, remark = names_for_prompts(config.model.heads.classnames)
    messages += [remark] if remark else []
    rows = Clip(weights, built.mesh).classifier(names, config.init_from.templates)
    messages.append(f"the classifier starts from the embeddings of {len(rows)} class names")
    state = set_classifier(state, rows)
  return start_average(state) if state.average else state, messages
