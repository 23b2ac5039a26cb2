"""Configs: durations, JSON, overrides, and every file under configs/."""

import importlib.util
from pathlib import Path

import jax
import pytest

from declip_jax import config, objectives, run
from declip_jax.state import abstract_state
from declip_jax.train import check_objective

CONFIGS = Path(__file__).parent.parent / "configs"
ARGUMENTS = {
  "demo": config.METHODS,
  "small": [f"{method},{data},/data" for method in config.METHODS for data in ("fashion44k", "flickr8k")],
}


def read_config(name: str, argument: str):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def test_every_config_is_listed_here() -> None:
  assert {path.stem for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), [(name, arg) for name, args in ARGUMENTS.items() for arg in args])
def test_every_config_builds(name: str, argument: str) -> None:
  c = read_config(name, argument)
  parts = run.build(c)
  weights = objectives.active(c.weights)
  batch = parts.batch_shape(c.batch_size)
  check_objective(parts.model, batch, weights, c.data.recipe)
  abstract = abstract_state(batch, parts.mesh, model=parts.model, optimizer=parts.optimizer)
  assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(abstract.params))
  assert run.plan_steps(c, 10_000).total > 0
  assert config.from_json(c.to_json_best_effort()).to_dict() == c.to_dict()


@pytest.mark.parametrize("method", config.METHODS)
def test_unknown_field_is_refused(method: str) -> None:
  with pytest.raises(AttributeError, match="bath_size"):
    config.default(method).bath_size = 3
  with pytest.raises(ValueError, match=r"method 'blip': choose one of \['clip', 'declip', 'slip'\]"):
    config.default("blip")


@pytest.mark.parametrize(
  ("length", "steps"), [({"steps": 7}, 7), ({"epochs": 1.5}, 15), ({"examples": 101}, 11), ({"epochs": 0}, 0)]
)
def test_durations_become_steps(length: dict, steps: int) -> None:
  got = config.steps_of(config.duration(**length), name="duration", batch_size=10, epoch_examples=100)
  assert got == steps


@pytest.mark.parametrize("length", [{"steps": 7, "epochs": 1}, {"examples": -1}])
def test_ambiguous_duration_is_refused(length: dict) -> None:
  with pytest.raises(ValueError, match="config.duration=.*set one of steps, epochs, examples"):
    config.steps_of(config.duration(**length), name="duration", batch_size=10, epoch_examples=100)
