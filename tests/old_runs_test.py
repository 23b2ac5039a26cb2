"""Runs written at 6279b88, with its configs and packages: they load, evaluate, export and resume.

`fixtures/old_run` has a finished DeCLIP run of six steps, the same run stopped at step 3, and the whole state of the
finished run with its embeddings of two images and two texts.
"""

from collections.abc import Mapping
import os
from pathlib import Path
import subprocess
import sys
import tarfile

from flax.traverse_util import unflatten_dict
import jax
import numpy as np
import pytest
from runs import zero_biases_without_effect

from declip_jax import build, load
from declip_jax import config as config_lib
from declip_jax.evaluate import evaluate
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.training.state import abstract_state
from declip_jax.weights.read import read
from declip_jax.weights.write import write

TESTS = Path(__file__).parent
FIXTURE = TESTS / "fixtures" / "old_run"
TEXTS = ("a photo of a red circle", "a small striped blue star in the middle")
RESUME = """
import pathlib, sys
from declip_jax import config, train
run = pathlib.Path(sys.argv[1])
train.train(config.from_json((run / "config.json").read_text()), run)
"""
SCORES = {"top1": 0.005, "top5": 0.135, "mean_per_class": 0.1 / 18, "majority_share": 0.055, "images": 200}


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(TESTS.parent)  # to which the path of the runs' tokenizer is relative


@pytest.fixture
def runs(tmp_path: Path) -> Path:
  """A directory with copies of `old_run` and `old_run_unfinished`."""
  with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


@pytest.fixture(scope="module")
def expected() -> Mapping[str, np.ndarray]:
  return dict(np.load(FIXTURE / "expected.npz"))


def flat(tree: object, prefix: str) -> dict[str, np.ndarray]:
  def name(key: object) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))))

  return {"/".join([prefix, *map(name, keys)]): np.asarray(x) for keys, x in jax.tree.leaves_with_path(tree)}


def check_arrays(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], atol: float) -> None:
  assert found.keys() == expected.keys()
  for path, array in found.items():
    assert (array.shape, array.dtype) == (expected[path].shape, expected[path].dtype), path
    np.testing.assert_allclose(array, expected[path], rtol=atol, atol=atol, err_msg=path)


def check_embeddings(path: Path, expected: Mapping[str, np.ndarray]) -> None:
  clip, images = load(path), [expected["images/0"], expected["images/1"]]
  np.testing.assert_allclose(clip.encode_image(images), expected["image_embedding"], atol=1e-5)
  np.testing.assert_allclose(clip.encode_text(TEXTS), expected["text_embedding"], atol=1e-5)
  np.testing.assert_allclose(clip.similarity(images, TEXTS), expected["similarity"], atol=1e-5)
  assert clip.logit_scale == pytest.approx(float(expected["logit_scale"]))


@pytest.mark.slow
def test_an_old_run_loads_evaluates_and_exports(runs: Path, expected: Mapping[str, np.ndarray]) -> None:
  run = runs / "old_run"
  check_embeddings(run, expected)
  results = evaluate(run)
  scores = {"step": 6, **{f"eval/heldout/{name}": value for name, value in SCORES.items()}}
  assert {name: results[name] for name in scores} == pytest.approx(scores)
  weights = read(run)
  write(weights, runs / "export", "orbax")
  check_arrays(flat(read(runs / "export").params, ""), flat(weights.params, ""), atol=0)


def test_the_whole_state_of_an_old_run_is_restored(runs: Path, expected: Mapping[str, np.ndarray]) -> None:
  config = config_lib.from_json((runs / "old_run" / "config.json").read_text())
  built = build.build(config, jax.devices()[:1])
  shapes = built.batch_shape(config.batch_size)
  abstract = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
  checkpoints = Checkpoints(runs / "old_run")
  state, position = checkpoints.restore(6, abstract)
  checkpoints.close()
  assert position == {"next_index": 96}
  check_arrays(flat(state, "state"), {path: x for path, x in expected.items() if path.startswith("state/")}, atol=0)


@pytest.mark.slow
def test_an_old_run_resumes_to_the_same_parameters(runs: Path, expected: Mapping[str, np.ndarray]) -> None:
  # In a process with one device and the compiler's defaults, as when it was recorded. Processors differ in rounding: on
  # another one, 6279b88 itself is up to 9e-5 away from these numbers. Updates are about as large as the learning rate.
  run = runs / "old_run_unfinished"
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  subprocess.run([sys.executable, "-c", RESUME, str(run)], check=True, env=environment)
  assert read_metrics(run)[-1]["eval/heldout/top1"] == SCORES["top1"]
  weights = read(run, step=6)
  for name in ("params", "collections"):
    prefix = f"state/{name}/"
    wanted = {path.removeprefix(prefix): x for path, x in expected.items() if path.startswith(prefix)}
    trees = getattr(weights, name), unflatten_dict(wanted, sep="/")
    if name == "params":
      trees = tuple(zero_biases_without_effect(tree) for tree in trees)
    check_arrays(flat(trees[0], name), flat(trees[1], name), atol=2e-4)
