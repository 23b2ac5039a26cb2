"""Mutated folders of models: their tensors, indexes, configs and tokenizers give right tensors or a ValueError.

`make fuzz` reads 20,000 of them; the slow test reads a few of each kind. See fuzz_test for single files of tensors.
"""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
import shutil

from flax_files import flax_tree, write_flax
from hub_server import HubServer, Model
from mutated_files import check_bounds, mutated
import numpy as np
import open_clip_towers
import pytest
import references as reference
import safetensors.numpy
from torch_files import dictionary, plain, state_dict, write_zip

from declip_jax.data.text.tokenizer import make_tokenizer
from declip_jax.weights.layout import layout, to_state_dict
from declip_jax.weights.read import Weights, from_state_dict, read
from declip_jax.weights.write import write

HEADS = {"image.heads": 2, "text.heads": 2}
TEXTS = ("A photo of a cat.", "", "naïve 🚗 &amp; \0 <eos> " * 5)
NAME = "org/model"


def siglip(name: str, **settings: object) -> Weights:
  tensors = {key.removeprefix("params/"): x for key, x in reference.below(reference.load(name), "sd/").items()}
  heads = {} if name == "siglip_big_vision" else HEADS
  return from_state_dict(tensors, {"image_size": 36, **heads, **settings})


def big_vision(folder: Path) -> None:
  with (folder / "siglip.npz").open("wb") as file:
    np.savez(file, **reference.below(reference.load("siglip_big_vision"), "sd/"))


def stacked_big_vision(folder: Path) -> None:
  """The form of models that were trained with `scan`."""
  tensors = reference.below(reference.load("siglip_big_vision"), "sd/")
  stacked = {name: x for name, x in tensors.items() if "/encoderblock_" not in name}
  for name in (name for name in tensors if "/encoderblock_0/" in name):
    blocks = [tensors[name], tensors[name.replace("encoderblock_0", "encoderblock_1")]]
    stacked[name.replace("/encoderblock_0/", "/encoderblock/")] = np.stack(blocks)
  with (folder / "siglip.npz").open("wb") as file:
    np.savez(file, **stacked)


def training(folder: Path) -> None:
  """A checkpoint of open_clip's training."""
  tensors = {f"module.{name}": x for name, x in reference.below(reference.load("openai_vit"), "sd/").items()}
  content, storages = state_dict(tensors)
  whole = dictionary(epoch=plain(3), name=plain("run-model_ViT-B-32-lr_0.1"), state_dict=content)
  write_zip(folder / "epoch_3.pt", whole, **{f"data/{key}": numbers for key, numbers in storages.items()})


def shards(folder: Path) -> None:
  """`SiglipModel` in two files, with its SentencePiece model."""
  tokens = reference.load("siglip_tokens")
  source = folder.parent / "spiece.model"
  source.write_bytes(tokens["spiece"].tobytes())
  options = "start=none&pad=</s>&clean=lower,no_punctuation,spaces"
  weights = siglip("siglip_transformers", **{"text.tokenizer": f"sentencepiece:{source}?{options}"})
  write(weights, folder, "huggingface")
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
  for file in set(files.values()):
    part = {name: tensors[name] for name in tensors if files[name] == file}
    safetensors.numpy.save_file(part, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def open_clip(folder: Path) -> None:
  """A CLIP with a `tokenizer.json`."""
  source = folder.parent / "tokenizer.json"
  source.write_text(str(reference.load("siglip_tokens")["tokenizer_json"]))
  tensors = reference.below(reference.load("openai_vit"), "sd/")
  table = tensors["token_embedding.weight"]
  tensors["token_embedding.weight"] = np.resize(table, (420, table.shape[1]))
  steps = "repair,underscores,lower,no_punctuation,spaces"
  name = f"huggingface:{source}?start=none&pad=<pad>&clean={steps}"
  weights = from_state_dict(tensors, {"text.activation": "quick_gelu", "text.eot": 1, "text.tokenizer": name})
  write(weights, folder, "open_clip")


def flax_clip(folder: Path) -> None:
  """`FlaxCLIPModel` with its processor."""
  tensors = reference.below(reference.load("openai_vit"), "sd/")
  write(from_state_dict(tensors, reference.TOLD | HEADS), folder, "huggingface")
  write_flax(folder / "flax_model.msgpack", flax_tree(safetensors.numpy.load_file(folder / "model.safetensors")))
  (folder / "model.safetensors").unlink()


def convnext(folder: Path) -> None:
  open_clip_towers.write_folder(folder, "convnext_base")


FOLDERS: dict[str, Callable[[Path], None]] = {
  "big_vision": big_vision,
  "big_vision, stacked": stacked_big_vision,
  "training of open_clip": training,
  "SiglipModel in shards": shards,
  "open_clip with a tokenizer": open_clip,
  "FlaxCLIPModel": flax_clip,
  "ConvNeXt of open_clip": convnext,
}
SETTINGS = {
  "big_vision": {"image_size": 36},
  "big_vision, stacked": {"image_size": 36},
  "training of open_clip": reference.TOLD | HEADS,
}


def tensors_of(weights: Weights) -> dict[str, np.ndarray]:
  variables = {"params": weights.params, "collections": weights.collections}
  return to_state_dict(variables, layout(weights.model, weights.heads))


def try_to_read(path: str | Path, settings: Mapping[str, object], folder: Path) -> Weights | None:
  """Reads a model and tokenizes texts; None where the error is one line that says which file is wrong."""
  try:
    weights = read(path, settings)
    text = weights.model["text"]
    rows = make_tokenizer(text["tokenizer"], text["context_length"])(TEXTS)
  except ValueError as error:
    message = str(error)
    assert str(folder) in message or str(path) in message, message
    assert len(message.replace(str(folder), "")) <= 400, message
    assert len(message.splitlines()) == 1, message
    return None
  assert rows.shape == (len(TEXTS), text["context_length"])
  return weights


def check_tensors(found: Weights, truth: Mapping[str, np.ndarray], file: str, content: bytes) -> None:
  """Tensors are those of the files; only files without checksums may have other numbers, which are of the file."""
  changed = {name: x[x != truth[name]].view("<u4") for name, x in tensors_of(found).items()}
  others = np.concatenate([*changed.values()])
  assert not others.size or file.endswith((".safetensors", ".msgpack")), [name for name, x in changed.items() if x.size]
  if others.size:
    numbers = [np.frombuffer(content, "<u4", (len(content) - start) // 4, start) for start in range(4)]
    known = np.sort(np.concatenate(numbers))
    places = np.minimum(np.searchsorted(known, others), len(known) - 1)
    assert (known[places] == others).all(), [name for name, x in changed.items() if x.size]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", FOLDERS)
def test_mutated_folders_are_right_or_an_error(kind: str, tmp_path: Path, mutations: int) -> None:
  folder, settings = tmp_path / "model", SETTINGS.get(kind, {})
  folder.mkdir()
  FOLDERS[kind](folder)
  contents = {file.name: file.read_bytes() for file in folder.iterdir()}
  path = folder if len(contents) > 1 else folder / next(iter(contents))
  first = try_to_read(path, settings, folder)
  assert first is not None
  truth, outcomes = tensors_of(first), []

  def try_one(rng: np.random.Generator) -> None:
    name = str(rng.choice(sorted(contents)))
    (folder / name).write_bytes(changed := mutated(contents[name], rng))
    found = try_to_read(path, settings, folder)
    outcomes.append(found is not None)
    if found is not None:
      check_tensors(found, truth, name, changed)
    (folder / name).write_bytes(contents[name])

  check_bounds(mutations * 49 // (50 * len(FOLDERS)), 0, try_one)
  assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutated_repositories_are_right_or_an_error(hub_server: HubServer, tmp_path: Path, mutations: int) -> None:
  """A repository of the hub, whose configs are read before its weights are downloaded."""
  shards(tmp_path / "export")
  files = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
  configs = sorted(name for name in files if name.endswith(".json"))
  hub_server.models[NAME] = Model(files)
  first = try_to_read(f"hf-hub:{NAME}", {}, tmp_path / "cache")
  assert first is not None
  truth, outcomes = tensors_of(first), []

  def try_one(rng: np.random.Generator) -> None:
    name = str(rng.choice(configs))
    hub_server.models[NAME] = Model(files | {name: mutated(files[name], rng)})
    found = try_to_read(f"hf-hub:{NAME}", {}, tmp_path / "cache")
    outcomes.append(found is not None)
    if found is not None:
      check_tensors(found, truth, name, b"")
    shutil.rmtree(tmp_path / "cache")

  check_bounds(mutations // 50, 0, try_one)
  assert 0 < sum(outcomes) < len(outcomes)
