"""One tower of transformers, as `CLIPVisionModel` and its relatives save it: read, used and loaded into a run."""

import json
from pathlib import Path
import shutil

from flax_files import flax_tree, write_flax
import jax
import numpy as np
import pytest
import references as reference
import safetensors.numpy

from declip_jax.clip import Clip
from declip_jax.sharding import make_mesh
from declip_jax.weights.initial import load_weights
from declip_jax.weights.layout import abstract_variables
from declip_jax.weights.read import Weights, read
from declip_jax.weights.write import write

# Classes of transformers, the `model_type` of their configs, their tensors, and the prefix that version 5 leaves out.
TOWERS = {
  "CLIPVisionModel": ("clip_vision_model", ("vision_model.",), "vision_model."),
  "CLIPVisionModelWithProjection": ("clip_vision_model", ("vision_model.", "visual_projection."), ""),
  "CLIPTextModel": ("clip_text_model", ("text_model.",), "text_model."),
  "CLIPTextModelWithProjection": ("clip_text_model", ("text_model.", "text_projection."), ""),
  "SiglipVisionModel": ("siglip_vision_model", ("vision_model.",), "vision_model."),
  "SiglipTextModel": ("siglip_text_model", ("text_model.",), "text_model."),
}


def whole(project: str) -> tuple[dict[str, np.ndarray], dict]:
  """The tensors of a small model of both towers by transformers, and its config."""
  if project == "siglip":
    arrays = reference.load("siglip_transformers")
    return reference.below(arrays, "sd/"), json.loads(json.loads(str(arrays["files_json"]))["config.json"])
  tensors = reference.below(reference.load("hf_clip"), "sd/")
  tower = {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
  vocab_size = len(tensors["text_model.embeddings.token_embedding.weight"])
  text = {**tower, "vocab_size": vocab_size, "eos_token_id": vocab_size - 1}
  size = 8 * round((len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
  return tensors, {"model_type": "clip", "vision_config": {**tower, "image_size": size}, "text_config": text}


def write_folder(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
  folder.mkdir()
  contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(contiguous, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config))
  size = config.get("vision_config", config).get("image_size", 16)  # that of a text tower does not matter
  processor = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "do_center_crop": True}
  (folder / "preprocessor_config.json").write_text(json.dumps(processor))
  return folder


def read_both(kind: str, folder: Path) -> tuple[Weights, Weights]:
  """A model of both towers, and one of its towers as its class saves it."""
  model_type, prefixes, left_out = TOWERS[kind]
  tensors, config = whole(model_type.split("_")[0])
  half = {name.removeprefix(left_out): x for name, x in tensors.items() if name.startswith(prefixes)}
  of_tower = config[f"{model_type.split('_')[1]}_config"] | {"model_type": model_type}
  both = read(write_folder(folder / "both", tensors, config))
  return both, read(write_folder(folder / "half", half, of_tower))


@pytest.mark.parametrize("kind", TOWERS)
def test_one_tower_is_that_of_the_whole_model(kind: str, tmp_path: Path) -> None:
  both, half = read_both(kind, tmp_path)
  side = "image" if "Vision" in kind else "text"
  assert [*half.params["towers"]] == [side]
  assert half.remarks == ()
  assert half.model[side] == both.model[side]
  jax.tree.map(np.testing.assert_array_equal, half.params["towers"][side], both.params["towers"][side])
  projection = {name: x for name, x in both.params["heads"].items() if name == f"{side}_projection"}
  if kind in ("CLIPVisionModel", "CLIPTextModel"):
    projection = {}
  jax.tree.map(np.testing.assert_array_equal, half.params["heads"], projection)
  for format in ("orbax", "open_clip") if half.params["heads"] else ("open_clip",):
    with pytest.raises(ValueError, match=r"one tower|have no text tower"):
      write(half, tmp_path / "export", format)


@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "SiglipTextModel"])
def test_embeddings_of_one_tower_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
  both, half = (Clip(weights, make_mesh(-1, 1)) for weights in read_both(kind, tmp_path))
  size, text = both.view.size, both.fields["text"]
  images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
  tokens = np.random.default_rng(0).integers(2, text["vocab_size"], (2, text["context_length"]))
  calls = {"image": lambda clip: clip.image_features(images), "text": lambda clip: clip.text_features(tokens)}
  side, other = ("image", "text") if "Vision" in kind else ("text", "image")
  np.testing.assert_array_equal(calls[side](half), calls[side](both))
  for absent in (calls[other], lambda clip: clip.logit_scale, lambda clip: clip.similarity([], [])):
    with pytest.raises(ValueError, match=f"no {other} tower with a joint space"):
      absent(half)


def test_a_text_tower_encodes_no_images(tmp_path: Path) -> None:
  _, half = read_both("CLIPTextModelWithProjection", tmp_path)
  clip = Clip(half, make_mesh(-1, 1))
  for needs_text in (False, True):
    with pytest.raises(ValueError, match="have no image tower: expected a model that encodes images$"):
      clip.encoders(1, needs_text=needs_text)
  assert clip.feature_widths == (0, 0)
  described = repr(clip)
  assert f"texts of {clip.fields['text']['context_length']} tokens" in described
  assert "images" not in described
  assert "vit" not in described


def test_a_tower_without_projection_has_no_embeddings(tmp_path: Path) -> None:
  _, half = read_both("CLIPVisionModel", tmp_path)
  with pytest.raises(ValueError, match="no image tower with a joint space"):
    Clip(half, make_mesh(-1, 1)).encode_image(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_run_starts_from_one_tower(tmp_path: Path) -> None:
  both, half = read_both("CLIPVisionModelWithProjection", tmp_path)
  _, shapes = abstract_variables(both.model, both.heads, both.view.size)
  fresh = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
  params, _, lines = load_weights(fresh["params"], fresh["collections"], half, ("image",))
  jax.tree.map(np.testing.assert_array_equal, params["towers"]["image"], both.params["towers"]["image"])
  assert not np.any(params["towers"]["text"]["position_embedding"])
  assert lines[0].startswith("loaded from Hugging Face: heads/image_projection")


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_file_of_flax_clip(form: str, tmp_path: Path) -> None:
  tensors, config = whole("clip")
  floats = {name: x for name, x in tensors.items() if np.issubdtype(x.dtype, np.floating)}
  both = read(write_folder(tmp_path / "both", tensors, config))
  folder = tmp_path / "flax"
  folder.mkdir()
  file = folder / "flax_model.msgpack"
  tree = flax_tree(floats)
  write_flax(file, tree)
  for name in ("config.json", "preprocessor_config.json"):
    shutil.copyfile(tmp_path / "both" / name, folder / name)
  ours = read(folder if form == "folder" else file)
  assert (ours.origin, ours.remarks) == ("FlaxCLIP", ())
  jax.tree.map(np.testing.assert_array_equal, ours.params, both.params)
  assert ours.model == both.model
  for contents in (file.read_bytes()[:-9], file.read_bytes() + b"x", b"\x81\xa1a\x01"):
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=r"flax_model.msgpack: (damaged|no tensors)"):
      read(file)
  write_flax(file, tree | {"logit_scale": np.float32(floats["logit_scale"])})
  jax.tree.map(np.testing.assert_array_equal, read(file).params, both.params)
  write_flax(file, tree | {"text_projection/kernel": tree["text_projection"]["kernel"]})
  with pytest.raises(ValueError, match=r"flax_model.msgpack: the path text_projection/kernel occurs twice"):
    read(file)
