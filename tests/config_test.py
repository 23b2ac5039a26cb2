"""Durations, methods and the lock of a config; `configs_test.py` builds every file of configs/."""

from collections.abc import Callable
import json
import math
from pathlib import Path
import subprocess
import sys

from flax.traverse_util import flatten_dict
import pytest
from tiny import tiny_config

import declip_jax
from declip_jax import config
from declip_jax.data.recipes import get_recipe
from declip_jax.data.sources import open_source
from declip_jax.methods import METHODS
from declip_jax.training.optim import check_name

OLD = Path(__file__).parent / "fixtures" / "config_6279b88.json"


def test_an_unknown_field_is_rejected() -> None:
  for method in METHODS:
    with pytest.raises(AttributeError, match="bath_size"):
      config.default(method).bath_size = 3


@pytest.mark.parametrize(
  ("method", "preset", "named"),
  [
    ("blip", "paper", ("method", "'blip'", "'clip'", "'clip_color'")),
    ("siglip", "repo", ("method", "'siglip'", "'clip'", "'declip'")),
    ("clip", "papers", ("preset", "'papers'", "'paper'", "'repo'")),
  ],
)
def test_an_unknown_method_or_preset_is_named_with_the_legal_ones(
  method: str, preset: str, named: tuple[str, ...]
) -> None:
  with pytest.raises(ValueError, match=named[1]) as raised:
    config.default(method, preset=preset)
  assert all(word in str(raised.value) for word in named)


@pytest.mark.parametrize(
  ("make", "meant"),
  [
    (lambda: config.default("delcip"), "declip"),
    (lambda: config.default("SLIP"), "slip"),
    (lambda: config.default(preset="reop"), "repo"),
    (lambda: config.default(architecture="vit-b32"), "ViT-B/32"),
    (lambda: open_source("webdatset:/data"), "webdataset"),
    (lambda: get_recipe("delcip", {}), "declip"),
    (lambda: check_name("name", "adamv", ("adamw", "lars")), "adamw"),
  ],
)
def test_a_misspelt_name_gets_a_suggestion(make: Callable[[], object], meant: str) -> None:
  with pytest.raises(ValueError, match=rf"did you mean .*{meant}.*\?$"):
    make()


@pytest.mark.slow
def test_the_package_gives_its_modules_on_demand() -> None:
  """As the README says, with no import but `import declip_jax`."""
  script = (
    "import sys, declip_jax; assert 'jax' not in sys.modules; declip_jax.train.train; declip_jax.evaluate.evaluate"
  )
  subprocess.run([sys.executable, "-c", script], check=True)
  with pytest.raises(AttributeError, match="'tarin'"):
    declip_jax.tarin  # noqa: B018


@pytest.mark.parametrize(
  ("length", "steps"), [({"steps": 7}, 7), ({"epochs": 1.5}, 15), ({"examples": 101}, 11), ({"epochs": 0}, 0)]
)
def test_durations_become_steps(length: dict[str, float], steps: int) -> None:
  got = config.steps_of(config.duration(**length), name="duration", batch_size=10, epoch_examples=100)
  assert got == steps


@pytest.mark.parametrize(
  "length", [{"steps": 7, "epochs": 1}, {"examples": -1}, {"epochs": math.nan}, {"epochs": math.inf}]
)
def test_an_ambiguous_duration_is_rejected(length: dict[str, float]) -> None:
  with pytest.raises(ValueError, match=r"config\.duration=.*steps, epochs, examples, share"):
    config.steps_of(config.duration(**length), name="duration", batch_size=10, epoch_examples=100)


@pytest.mark.parametrize(
  ("whole", "expected"), [({"steps": 250}, 25), ({"epochs": 25}, 25), ({"examples": 2450}, 25), ({"steps": 1}, 1)]
)
def test_a_share_of_the_run_has_its_unit(whole: dict[str, float], expected: int) -> None:
  c = config.default()
  c.duration, c.evaluate_every = config.duration(**whole), config.duration(share=0.1)
  c.optimizer.warmup = config.duration(share=0.1)
  found = config.without_shares(c)
  for length in (found.evaluate_every, found.optimizer.warmup):
    assert config.steps_of(length, name="x", batch_size=10, epoch_examples=100) == expected
  assert found.checkpoint.every == c.checkpoint.every
  assert c.evaluate_every.share == 0.1


@pytest.mark.parametrize(
  ("field", "length"),
  [
    ("duration", {"share": 0.5}),
    ("evaluate_every", {"share": 1.5}),
    ("evaluate_every", {"share": -1}),
    ("optimizer.warmup", {"share": math.nan}),
    ("checkpoint.every", {"share": 0.5, "epochs": 1}),
  ],
)
def test_an_illegal_share_is_rejected(field: str, length: dict[str, float]) -> None:
  c = config.default()
  c.update_from_flattened_dict({f"{field}.{unit}": value for unit, value in length.items()})
  if "epochs" not in length:
    c.update_from_flattened_dict({f"{field}.{unit}": 0 for unit in ("epochs", "steps") if field != "duration"})
  with pytest.raises(ValueError, match=rf"config\.{field}"):
    config.without_shares(c)


def test_a_config_of_the_first_release_loads_under_the_new_names() -> None:
  """The file is what 6279b88 wrote for tiny_config("declip")."""
  old = json.loads(OLD.read_text())
  old["weight_schedule"]["nns"] = [[0, 0.0], [5, 1.0]]
  old["momentum"], old["contrast"]["form"] = 0.5, "ring"
  found = config.from_json(json.dumps(old))
  expected = tiny_config("declip")
  expected.objective.nns.schedule = ((0, 0.0), (5, 1.0))
  expected.momentum_tower.decay, expected.contrast.method = 0.5, "ring"
  expected.model.heads.num_classes, expected.model.text.buckets = 0, ()
  assert flatten_dict(found.to_dict()) == flatten_dict(expected.to_dict())  # newer fields have their defaults
  assert config.from_json(found.to_json_best_effort()).to_dict() == found.to_dict()


@pytest.mark.parametrize("field", ["batch_sise", "optimizer.wamrup", "model.text.eto", "stages.low.imagesize"])
def test_an_unknown_field_of_a_config_file_is_named(field: str) -> None:
  saved = tiny_config("clip").to_dict()
  *above, last = field.split(".")
  node = saved
  for name in above:
    node = node.setdefault(name, {})
  node[last] = 3
  with pytest.raises(ValueError, match="config.json has unknown fields") as error:
    config.from_json(json.dumps(saved))
  assert repr(field) in str(error.value)


def test_the_changelog_has_every_renamed_field_and_the_citation_the_version() -> None:
  root = Path(__file__).parents[1]
  changelog = (root / "CHANGELOG.md").read_text()
  for old, new in config.RENAMED.items():
    assert f"| `{old.replace('.*', '.TERM')}" in changelog, old
    assert f"| `{new.replace('.*', '.TERM')}" in changelog, new
  assert changelog.split("\n## ")[1].startswith(declip_jax.__version__)
  assert f"\nversion: {declip_jax.__version__}\n" in (root / "CITATION.cff").read_text()
