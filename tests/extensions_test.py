"""The cost of extending the package: each test adds a toy, uses it, and counts the places of the package it edits.

A place is an entry that an existing file needs; the toy itself is a new file. CONTRIBUTING.md has the same numbers.
"""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import subprocess
import sys
from types import ModuleType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest
from tiny import tiny_config
from toy_extension import (
  VIEWS,
  ToyHead,
  ToySource,
  extended_default,
  toy_evaluator,
  toy_head_loss,
  toy_loss,
)

from declip_jax import architectures, build, config, config_files
from declip_jax.clip import load
from declip_jax.data.convert import convert
from declip_jax.data.guess import guess
from declip_jax.data.images import EvalView
from declip_jax.data.mixture import Mixture
from declip_jax.data.pipeline import training_samples
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import SOURCES, open_source
from declip_jax.evals import EVALUATORS, Evaluator
from declip_jax.evals.encoders import Encoders
from declip_jax.models.heads import HEADS
from declip_jax.models.paths import side_prefixes
from declip_jax.models.towers import IMAGE_TOWERS
from declip_jax.objectives import TERMS, Term, make_objective
from declip_jax.reporting.metrics import read_metrics
from declip_jax.reporting.trackers import TrackedRun
from declip_jax.reporting.trackers.libraries import TRACKERS
from declip_jax.train import train
from declip_jax.training import optim, schedules
from declip_jax.training.state import abstract_state
from declip_jax.types import Outputs
from declip_jax.weights.layout import abstract_variables


class Places:
  """Extends the package for a test, and counts the places that had to change."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self._monkeypatch, self._places = monkeypatch, []

  def add(self, table: dict[str, Any], name: str, entry: Any) -> None:
    """An entry of a table, such as `TERMS`."""
    assert name not in table
    self._monkeypatch.setitem(table, name, entry)
    self._places.append(name)

  def configure(self, add_fields: Callable[[ConfigDict], None]) -> None:
    """Defaults in `config.py`, however many: `add_fields` gets the unlocked config of `config.default`."""
    self._monkeypatch.setattr(config, "default", extended_default(add_fields))
    self._places.append("config.py")

  def add_field(self, module: ModuleType, settings: str, name: str, kind: type) -> None:
    """A field of a dataclass of a module, such as `OptimizerSettings`."""
    base = getattr(module, settings)
    extended = dataclasses.make_dataclass(settings, [(name, kind)], bases=(base,), frozen=True, kw_only=True)
    self._monkeypatch.setattr(module, settings, extended)
    self._places.append(f"{settings}.{name}")

  def __len__(self) -> int:
    return len(self._places)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
  return Places(monkeypatch)


def trace_step(c: ConfigDict) -> tuple[Any, dict[str, Any]]:
  """The shapes of the state and the metrics after a train step of a config; nothing is compiled."""
  built = build.build(c)
  shapes = built.batch_shape(c.batch_size)
  build.check_objective(c, built, shapes)
  state = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
  return jax.eval_shape(build.make_step(c, built, build.to_steps(c, 256), state), state, shapes)


def test_a_term_on_existing_outputs_takes_2_places(places: Places) -> None:
  places.add(TERMS, "toy", Term(toy_loss, ("joint",), ("image", "text"), ("pair",)))
  places.configure(lambda c: c.objective.update({"toy": {"weight": 0.0, "schedule": (), "margin": 0.2}}))
  c = tiny_config("clip")
  c.objective.toy.update({"weight": 0.5, "margin": 0.1})
  _, metrics = trace_step(c)
  assert {"loss/clip", "loss/toy", "share/toy", "toy_cosine"} <= set(metrics)
  assert len(places) == 2
  c.objective.toy.weight = 0.0  # it has no effect if it is not used
  assert "toy" not in make_objective(c.objective.to_dict()).weights


def test_a_term_with_its_own_head_and_view_takes_4_places(places: Places) -> None:
  places.add(TERMS, "toy", Term(toy_head_loss, ("toy",), ("toy",), ("mosaic_image",)))
  places.add(HEADS, "toy", ToyHead)
  places.add(RECIPES, "toy", dataclasses.replace(RECIPES["slip"], views=VIEWS))

  def add_fields(c: ConfigDict) -> None:
    c.objective.toy = {"weight": 0.0, "schedule": ()}
    c.model.heads.toy_width = 6

  places.configure(add_fields)
  c = tiny_config("clip")
  c.data.recipe, c.objective.toy.weight, c.optimizer.name = "toy", 1.0, "adamw_sgd"
  state, metrics = trace_step(c)
  assert state.params["heads"]["toy"]["kernel"].shape == (32, 6)
  assert {"loss/toy", "diagnostics/toy/rank"} <= set(metrics)
  assert "heads/toy" in side_prefixes("image")
  _, variables = abstract_variables(c.model.to_dict(), ("joint", "toy"), c.data.image_size)  # as a saved run is read
  assert variables["params"]["heads"]["toy"]["kernel"].shape == (32, 6)
  assert len(places) == 4


def toy_optimizer(settings: Any) -> optax.GradientTransformation:
  """The sign of a moving average of the gradient."""

  def update(gradient: Any, state: optax.TraceState, params: Any) -> tuple[Any, optax.TraceState]:
    del params
    mean = jax.tree.map(lambda old, new: old * settings.momentum + new, state.trace, gradient)
    return jax.tree.map(jnp.sign, mean), optax.TraceState(mean)

  return optax.GradientTransformation(lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update)


def test_an_optimizer_takes_1_place(places: Places) -> None:
  places.add(optim.OPTIMIZERS, "toy", toy_optimizer)
  c = tiny_config("clip")
  c.optimizer.name, c.optimizer.momentum = "toy", 0.5
  state, _ = trace_step(c)
  assert isinstance(state.opt_state, optax.TraceState)
  assert len(places) == 1
  optimizer = build.build(c).optimizer
  state = optimizer.init({"w": jnp.zeros(2)})
  for gradient, sign in (([4.0, -1.0], [1, -1]), ([-1.0, 1.0], [1, 1])):
    change, state = optimizer.update({"w": jnp.array(gradient)}, state, {"w": jnp.zeros(2)})
    np.testing.assert_array_equal(change["w"], sign)


def test_a_setting_of_an_optimizer_takes_2_places(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
  places.configure(lambda c: c.optimizer.update({"toy_factor": 3.0}))
  places.add_field(optim, "OptimizerSettings", "toy_factor", float)
  monkeypatch.setitem(optim.OPTIMIZERS, "toy", lambda settings: optax.scale(settings.toy_factor))  # what uses it
  c = tiny_config("clip")
  c.optimizer.name = "toy"
  for factor in (3.0, 5.0):
    c.optimizer.toy_factor = factor
    optimizer = build.build(c).optimizer
    change, _ = optimizer.update({"w": jnp.ones(2)}, optimizer.init({"w": jnp.ones(2)}))
    np.testing.assert_array_equal(change["w"], factor)
  assert len(places) == 2


def test_a_schedule_takes_1_place(places: Places) -> None:
  traced = []

  def toy_schedule(settings: Any) -> Any:
    def schedule(step: jax.Array) -> jax.Array:
      traced.append(step)
      return settings.learning_rate / (1 + step)

    return schedule

  places.add(schedules.SCHEDULES, "toy", toy_schedule)
  c = tiny_config("clip")
  c.optimizer.schedule, c.optimizer.learning_rate = "toy", 0.6
  trace_step(c)
  assert traced  # by the train step
  rate = schedules.make_schedule(build.to_steps(c, 256).schedule)
  np.testing.assert_allclose(rate(jnp.array([2, 5])), [0.2, 0.1], rtol=1e-6)  # after two steps of warm-up
  assert len(places) == 1


@pytest.mark.parametrize(
  ("default", "kind", "value", "expected"),
  [(0.5, float, 0.25, 0.25), (config.duration(steps=3), int, config.duration(examples=64), 4)],
  ids=["number", "duration"],
)
def test_a_setting_of_a_schedule_takes_2_places(
  default: Any, kind: type, value: Any, expected: float, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A duration reaches the schedule in steps."""
  places.configure(lambda c: c.optimizer.update({"toy_rate": default}))
  places.add_field(schedules, "ScheduleSettings", "toy_rate", kind)
  toy = lambda settings: lambda step: settings.toy_rate + 0.0 * step  # noqa: E731
  monkeypatch.setitem(schedules.SCHEDULES, "toy", toy)  # what uses it
  c = tiny_config("clip")
  c.optimizer.schedule, c.optimizer.toy_rate = "toy", value
  build.build(c)
  assert schedules.make_schedule(build.to_steps(c, 256).schedule)(jnp.array(7)) == expected
  assert len(places) == 2


def test_a_recipe_takes_1_place(places: Places) -> None:
  places.add(RECIPES, "toy", dataclasses.replace(RECIPES["clip"], image_views=("strong",), text_views=("augmented",)))
  c = tiny_config("clip")
  c.data.recipe = "toy"
  assert build.build(c).recipe.text_views == ("augmented",)
  assert len(places) == 1


class ToyTower(nn.Module):
  """A linear map of each patch."""

  patch: int
  width: int
  remat: str = "none"
  unroll: int = 1
  dtype: Any = jnp.float32

  has_batch_norm: ClassVar[bool] = False

  @property
  def feature_width(self) -> int:
    return self.width

  @property
  def stride(self) -> int:
    return self.patch

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False, hidden: Any = None) -> tuple[jax.Array, jax.Array]:
    side = (self.patch, self.patch)
    x = nn.Conv(self.width, side, side, dtype=self.dtype)(images)
    x = x.reshape(x.shape[0], -1, self.width)
    return x.mean(axis=1), x


def test_an_image_tower_takes_2_places(places: Places) -> None:
  places.add(IMAGE_TOWERS, "toy", ToyTower)
  image = ConfigDict({"kind": "toy", "patch": 8, "width": 24})
  places.add(architectures.ARCHITECTURES, "toy", architectures.Architecture(image, architectures.text(64), 32, 16))
  c = tiny_config("clip")
  named = config.default("clip", "toy")
  c.model.image = named.model.image
  state, metrics = trace_step(c)
  assert state.params["towers"]["image"]["Conv_0"]["kernel"].shape == (8, 8, 3, 24)
  assert "loss/clip" in metrics
  assert len(places) == 2


def test_a_source_takes_1_place(places: Places, tmp_path: Path) -> None:
  places.add(SOURCES, "toy", lambda location: ToySource(f"toy:{location}"))
  source = open_source("heldout:50%:toy:squares")
  assert [len(source), source.classnames] == [6, ("dark", "bright")]
  assert guess("toy:squares") == "toy:squares"
  assert convert("toy:squares", tmp_path, shards=1, workers=1)["count"] == 12
  converted = open_source(f"arrayrecord:{tmp_path}/*.array_record")
  assert converted[1]["captions"] == ("a bright square",)
  c = tiny_config("clip", train=("toy:squares",))
  samples = training_samples(Mixture((open_source(*c.data.train),)), build.build(c).make_views, seed=0)
  assert samples[0]["image"].shape == (1, 16, 16, 3)
  assert len(places) == 1


def test_a_tracker_takes_2_places(places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  opened = []
  places.add(TRACKERS, "toy", lambda run, project: opened.append((run.name, project)))
  places.configure(lambda c: c.trackers.update({"toy": ""}))
  c = tiny_config("clip")
  assert build.make_trackers(c.trackers) == {}
  c.trackers.toy = "own"
  monkeypatch.setattr(build, "is_installed", lambda library: library == "toy")
  build.make_trackers(c.trackers)["toy"](TrackedRun("1" * 32, tmp_path / "run", {}, 0))
  assert opened == [("run", "own")]
  assert len(places) == 2


def test_an_evaluator_takes_1_place(places: Places, tmp_path: Path) -> None:
  places.add(EVALUATORS, "toy", Evaluator(toy_evaluator, needs_text=False))
  c = tiny_config("clip")
  c.evals = {
    "defaults": {"kind": "toy", "data": "scenes:test/6/16"},
    "doubled": {"kind": "toy", "data": "scenes:test/6/16", "scale": 2.0},
  }
  saved = config.from_json(c.to_json_best_effort())
  batches = []

  def encode(images: np.ndarray) -> tuple[np.ndarray, None]:
    batches.append(len(images))
    return images.mean(axis=(1, 2)) / 255, None

  encoders = Encoders(encode, lambda tokens: tokens, lambda texts: texts, EvalView(8), 4, np.arange(4))
  results = build.make_evaluators(saved.evals, tmp_path)(encoders, 0)
  assert results.keys() == {"eval/defaults/largest", "eval/doubled/largest"}
  assert 0 < results["eval/doubled/largest"] == 2 * results["eval/defaults/largest"]
  assert batches == [4, 4]  # six images, encoded once for both
  assert len(places) == 1


OWN_TERM = """
import jax.numpy as jnp
from declip_jax import config
from declip_jax.reporting.trackers import Tracker
from tiny import tiny_config


class Lines(Tracker):
  def __init__(self, run):
    self.path = run.workdir / "lines.txt"
    self.add(f"open {run.id} {run.name} {run.config['objective']['mine']['loss']} {run.start}")

  def add(self, line):
    with self.path.open("a") as file:
      file.write(line + chr(10))

  def log(self, step, values):
    self.add(f"log {step} {values['loss/mine']:.9g}")

  def close(self, finished):
    self.add(f"close {finished}")


def lines(run):
  return Lines(run)


def hinge(outputs, batch, *, margin=0.2):
  cosine = jnp.sum(outputs.image[0] * outputs.text[0], axis=-1)
  return jnp.maximum(0, 1 - margin - cosine).mean(), {}


def get_config():
  c = tiny_config("clip")
  c.objective.mine = config.term(hinge, weight=0.5, margin=0.3)
  c.trackers.lines = lines
  return c
"""


@pytest.fixture
def own_config(tmp_path: Path) -> ConfigDict:
  """A user's config file with a term and a tracker of its own."""
  file = tmp_path / "mine.py"
  file.write_text(OWN_TERM)
  return config_files.load(str(file))


@pytest.mark.slow
def test_a_term_in_a_users_config_file_takes_no_place(own_config: ConfigDict) -> None:
  c = own_config
  _, metrics = trace_step(c)
  assert {"loss/clip", "loss/mine", "share/mine"} <= set(metrics)
  outputs = Outputs(image=jnp.eye(3)[None], text=jnp.eye(3)[None, ::-1], scale=jnp.float32(1))
  _, details = make_objective(c.objective.to_dict())(outputs, {}, 0)
  np.testing.assert_allclose(details["loss/mine"], 0.7 * 2 / 3, rtol=1e-6)
  # config.json has enough of it to build the model, but not to train.
  saved = config.from_json(c.to_json_best_effort())
  assert json.loads(saved.to_json_best_effort()) == json.loads(c.to_json_best_effort())
  objective = make_objective(saved.objective.to_dict())
  assert (objective.heads, objective.weights) == (("joint",), {"clip": 1.0, "mine": 0.5})
  with pytest.raises(ValueError, match=r"config.objective.mine.loss='function hinge'"):
    objective(outputs, {}, 0)


@pytest.mark.slow
def test_a_run_with_a_users_own_term_and_tracker_resumes_and_loads_without_its_file(
  own_config: ConfigDict, tmp_path: Path
) -> None:
  c, workdir = own_config, tmp_path / "run"
  c.evals, c.duration.steps = ConfigDict(), 2
  train(c, workdir)
  c.duration.steps = 3
  train(c, workdir)
  losses = {line["step"]: line["loss/mine"] for line in read_metrics(workdir) if "loss/mine" in line}
  assert [*losses] == [1, 2, 3]
  # The tracker has both starts of one run.
  first = f"open {(workdir / 'run_id.txt').read_text().strip()} run function hinge"
  logged = [f"log {step} {loss:.9g}" for step, loss in losses.items()]
  expected = [f"{first} 0", *logged[:2], "close True", f"{first} 2", logged[2], "close True"]
  assert (workdir / "lines.txt").read_text().splitlines() == expected
  assert load(workdir).encode_image(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)


def test_a_users_own_term_is_checked_by_build(own_config: ConfigDict) -> None:
  with pytest.raises(ValueError, match=r"hinge has the options \['margin'\], not \['marign'\]"):
    config.term(own_config.objective.mine.loss, weight=1.0, marign=0.1)
  with pytest.raises(ValueError, match="config.term: loss="):
    config.term(nn.Dense(3), weight=1.0)
  c = own_config
  c.objective.clip = config.term(toy_loss, weight=1.0)
  with pytest.raises(ValueError, match="config.objective.clip.loss"):
    make_objective(c.objective.to_dict())
  c = tiny_config("clip")
  c.objective.mine = config.term(toy_loss, weight=1.0, views=("mosaic_image",))
  with pytest.raises(ValueError, match=r"term 'mine' .* needs Views.mosaic_image.*recipe 'clip'"):
    build.build(c)
  c.objective.mine = config.term(toy_loss, weight=1.0, heads=("tyo",))
  with pytest.raises(ValueError, match=r"\['tyo'\]"):
    build.build(c)


# The tests that read the tables of the package, and a few seconds each.
READ_TABLES = (
  "config_test.py",
  "configs_test.py",
  "evaluate_test.py",
  "objectives/terms_test.py",
  "models/heads_test.py",
  "weights/layout_test.py",
  "planning/input_rate_test.py",
  "data/recipes_test.py",
)


@pytest.mark.slow
def test_no_test_fails_only_because_something_was_added() -> None:
  files = [str(Path(__file__).parent / file) for file in READ_TABLES]
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--extended", "-m", "not slow", *files]
  done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
  assert not done.returncode, done.stdout
