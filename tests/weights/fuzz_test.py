"""Mutated weight files: 20,000 give the right values or a ValueError, within a second and 256 MB each."""

from collections.abc import Callable
import json
from pathlib import Path

from mutated_files import check_bounds, check_message, mutated
import numpy as np
import pytest
import safetensors.numpy
from torch_files import state_dict, write_legacy, write_zip

from declip_jax import architectures, config
from declip_jax.weights.layout import abstract_variables, expected_shapes, layout, to_state_dict
from declip_jax.weights.read import Weights, from_state_dict, read
from declip_jax.weights.write import write

TOLD = {"text.activation": "quick_gelu", "text.eot": 11}  # what the tensors do not tell


def small_model() -> dict[str, np.ndarray]:
  """A state dict of a model that is as small as possible, under OpenAI's names."""
  c = config.default("clip")
  c.model.image = architectures.vit(patch=4, width=8, depth=1, heads=1)
  c.model.text.update({"width": 8, "depth": 1, "heads": 1, "context_length": 4, "vocab_size": 12, "eot": 11})
  c.model.heads.embed_dim = 4
  _, variables = abstract_variables(c.model.to_dict(), ("joint",), 8)
  rng = np.random.default_rng(0)
  shapes = expected_shapes(variables, layout(c.model.to_dict(), ("joint",)))
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_torch(tensors: dict[str, np.ndarray], path: Path) -> None:
  content, data = state_dict(tensors)
  write_zip(path, content, **{f"data/{key}": numbers for key, numbers in data.items()})


def write_old_torch(tensors: dict[str, np.ndarray], path: Path) -> None:
  write_legacy(path, *state_dict(tensors))


def write_shards(tensors: dict[str, np.ndarray], folder: Path) -> Path:
  """Writes two files and their index, and returns its path."""
  names = sorted(tensors)
  files = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
  for file in set(files.values()):
    safetensors.numpy.save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=2))
  return index


def write_arrays(tensors: dict[str, np.ndarray], path: Path) -> None:
  with path.open("wb") as file:
    np.savez(file, **tensors)


WRITERS: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
  "safetensors": safetensors.numpy.save_file,
  "torch": write_torch,
  "torch before 1.6": write_old_torch,
  "npz": write_arrays,
}


def tensors_of(weights: Weights) -> dict[str, np.ndarray]:
  variables = {"params": weights.params, "collections": weights.collections}
  return to_state_dict(variables, layout(weights.model, weights.heads))


def check_values(found: Weights, truth: Weights, changed: bytes, places: dict[str, int]) -> None:
  """Every tensor has the numbers at its place in the file or, if its description changed, elsewhere in the file."""
  assert (found.model, found.view, found.heads) == (truth.model, truth.view, truth.heads)
  for name, x in tensors_of(found).items():
    numbers = x.tobytes()
    assert numbers == changed[places[name] : places[name] + len(numbers)] or numbers in changed, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", WRITERS)
def test_mutated_tensors_are_right_or_an_error(kind: str, seed: int, tmp_path: Path) -> None:
  tensors, path = small_model(), tmp_path / "file"
  WRITERS[kind](tensors, path)
  contents, truth = path.read_bytes(), read(path, TOLD)
  assert {name: contents.count(x.tobytes()) for name, x in tensors.items()} == dict.fromkeys(tensors, 1)
  places = {name: contents.index(x.tobytes()) for name, x in tensors.items()}
  header = contents[: min(places.values())]
  read_anyway = 0

  def try_one(rng: np.random.Generator) -> None:
    nonlocal read_anyway
    path.write_bytes(changed := mutated(contents, rng))
    try:
      found = read(path, TOLD)
    except ValueError as error:
      check_message(error, path)
      return
    read_anyway += changed != contents
    if kind in ("torch", "npz"):  # which have checksums
      assert all(np.array_equal(x, tensors[name]) for name, x in tensors_of(found).items())
    elif changed.startswith(header) and len(changed) == len(contents):
      assert all(x.tobytes() == changed[places[name] :][: x.nbytes] for name, x in tensors_of(found).items())
    check_values(found, truth, changed, places)

  check_bounds(3000, seed, try_one)
  assert read_anyway > 10


@pytest.mark.slow
def test_mutated_indexes_are_read_or_an_error(tmp_path: Path) -> None:
  index = write_shards(small_model(), tmp_path)
  contents, truth = index.read_bytes(), tensors_of(read(tmp_path, TOLD))
  read_anyway = 0

  def try_one(rng: np.random.Generator) -> None:
    nonlocal read_anyway
    index.write_bytes(mutated(contents, rng))
    try:
      found = tensors_of(read(tmp_path, TOLD))
    except ValueError as error:
      check_message(error, tmp_path)
      return
    read_anyway += 1
    assert all(np.array_equal(x, truth[name]) for name, x in found.items())

  check_bounds(1500, 0, try_one)
  assert read_anyway > 0


CONFIGS = {
  "huggingface": ("config.json", "preprocessor_config.json"),
  "open_clip": ("open_clip_config.json",),
  "orbax": ("weights.json",),
}


@pytest.mark.slow
@pytest.mark.parametrize("format", CONFIGS)
def test_mutated_configs_are_read_or_an_error(format: str, tmp_path: Path) -> None:
  folder = tmp_path / "out"
  write(from_state_dict(small_model(), TOLD), folder, format)
  contents = {name: (folder / name).read_bytes() for name in CONFIGS[format]}

  def try_one(rng: np.random.Generator) -> None:
    name = str(rng.choice(CONFIGS[format]))
    (folder / name).write_bytes(mutated(contents[name], rng))
    try:
      read(folder)
    except ValueError as error:
      check_message(error, folder)
    (folder / name).write_bytes(contents[name])

  check_bounds(700, 0, try_one)
