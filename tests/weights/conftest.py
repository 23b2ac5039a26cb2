"""Runs with random numbers for parameters, moments and statistics, without training or compiling; a hub on loopback."""

from collections.abc import Callable, Iterator
import itertools
import json
from pathlib import Path
from typing import Any

from hub_server import HubServer
import huggingface_hub.constants
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from declip_jax import build, config
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.training.state import State, abstract_state
from declip_jax.weights import read as read_lib
from declip_jax.weights.layout import abstract_variables

_states: dict[tuple[str, int], State] = {}
_models: dict[str, tuple[Any, Any]] = {}


@pytest.fixture(autouse=True)
def _cached_models(monkeypatch: pytest.MonkeyPatch) -> None:
  """Traces each model that is read once; many tests read the same."""

  def cached(model: Any, heads: Any, image_size: int) -> tuple[Any, Any]:
    key = json.dumps([model, heads, image_size], sort_keys=True)
    if key not in _models:
      _models[key] = abstract_variables(model, heads, image_size)
    built, variables = _models[key]
    return built, dict(variables)

  monkeypatch.setattr(read_lib, "abstract_variables", cached)


def _random_state(c: ConfigDict, seed: int = 0) -> State:
  c = c.copy_and_resolve_references()
  c.init_from = config.default().init_from
  key = (c.to_json_best_effort(sort_keys=True), seed)
  if key not in _states:
    _states[key] = _draw_state(c, seed)
  return _states[key]


def _draw_state(c: ConfigDict, seed: int) -> State:
  built = build.build(c)
  options = {"model": built.model, "optimizer": built.optimizer}
  abstract = abstract_state(built.batch_shape(c.batch_size), built.mesh, **options)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if np.issubdtype(leaf.dtype, np.integer):
      value = rng.integers(1, 9, leaf.shape)
    elif getattr(path[-1], "key", "") in ("scale", "var"):
      value = rng.uniform(0.8, 1.2, leaf.shape)
    else:
      value = rng.normal(0, 0.1, leaf.shape)
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

  return jax.tree.map_with_path(draw, abstract)


@pytest.fixture(scope="session")
def random_state() -> Callable[[ConfigDict, int], State]:
  """A function of a config, and a seed that is 0 by default, to a state; do not donate its arrays."""
  return _random_state


@pytest.fixture(scope="session")
def save_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ConfigDict], Path]:
  """Saves a random state as step 3 of a run with this config, and returns the working directory."""
  seeds = itertools.count(1000)

  def save(c: ConfigDict) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    # From one device: of copies on several, orbax writes a part of each and compiles a slice for every shape.
    state = jax.device_put(jax.device_get(_random_state(c, next(seeds))), jax.devices()[0])
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, state, data={}, config=c.to_dict())
    checkpoints.close()
    return workdir

  return save


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
  """A server that huggingface_hub's client takes for the hub, with a cache of its own."""
  constants, server = huggingface_hub.constants, HubServer()
  monkeypatch.setattr(constants, "ENDPOINT", server.url)
  template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setenv("HF_TOKEN", "hf_of_tests")
  monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
  with server.running():
    yield server


@pytest.fixture
def mutations(request: pytest.FixtureRequest) -> int:
  """The number of mutated files that the tests of mutated models read, together."""
  return request.config.getoption("--mutations")
