"""SigLIP by transformers, open_clip and big_vision: features, logits, loss, gradients and every tensor.

`fixtures/make_siglip.py` made the numbers. Images have 36 pixels and patches 8, so that 4 pixels are not seen.
"""

import dataclasses
import json
import shutil

from clips import make_weights
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import ml_dtypes
import numpy as np
import pytest
import references as reference
import safetensors.numpy
import tokenizer_files

import declip_jax
from declip_jax import config as config_lib
from declip_jax.build import build
from declip_jax.clip import Clip, load
from declip_jax.models.model import make_model
from declip_jax.models.positions import resize_positions
from declip_jax.sharding import make_mesh
from declip_jax.views import Views
from declip_jax.weights import dialects
from declip_jax.weights import write as write_lib
from declip_jax.weights.initial import GROUPS, _check_towers, load_weights
from declip_jax.weights.layout import abstract_variables, layout, to_state_dict
from declip_jax.weights.read import from_state_dict, read
from declip_jax.weights.settings import with_fields
from declip_jax.weights.write import write

NAMES = {
  "transformers": "SigLIP in transformers",
  "open_clip": "SigLIP in open_clip",
  "big_vision": "SigLIP in big_vision",
}
HEADS = {"image.heads": 2, "text.heads": 2}
FORWARD = {"rtol": 2e-5, "atol": 5e-6}
ENDS = {"rtol": 0, "atol": 1e-5}


def read_golden(name, **settings):
  arrays = reference.load(f"siglip_{name}")
  tensors = {key.removeprefix("params/"): x for key, x in reference.below(arrays, "sd/").items()}
  weights = from_state_dict(tensors, (HEADS if name != "big_vision" else {}) | {"image_size": 36} | settings)
  fields = {**weights.model, "mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
  return arrays, tensors, weights, make_model(fields, views=Views(), heads=weights.heads)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits(name):
  arrays, tensors, weights, model = read_golden(name)
  assert (weights.origin, weights.heads, weights.view.size, weights.view.squash) == (
    NAMES[name],
    ("joint", "sigmoid"),
    36,
    True,
  )
  image = jax.jit(model.image_features)(weights.params, weights.collections, np.moveaxis(arrays["images"], 1, -1))
  text = jax.jit(model.text_features)(weights.params, weights.collections, arrays["tokens"])
  if name == "big_vision":
    np.testing.assert_allclose(unit(image), arrays["image"], **FORWARD)
    np.testing.assert_allclose(unit(text), arrays["text"], **FORWARD)
  else:
    np.testing.assert_allclose(image, arrays["image_features"], **FORWARD)
    np.testing.assert_allclose(text, arrays["text_features"], **FORWARD)
  heads = weights.params["heads"]
  logits = np.exp(heads["logit_scale"]) * unit(image) @ unit(text).T + heads["logit_bias"]
  count = arrays["logits_per_image"].shape[1]
  np.testing.assert_allclose(logits[:, :count], arrays["logits_per_image"], rtol=2e-5, atol=2e-5)


def theirs(variables, weights, name):
  """Some of our arrays under the project's names and in its layout."""
  present = flatten_dict(variables, sep="/").keys()
  entries = {path: entry for path, entry in layout(weights.model, weights.heads).items() if path in present}
  return dialects.from_openai(to_state_dict(variables, entries), NAMES[name])


@pytest.mark.parametrize("name", ["transformers", "open_clip"])
def test_every_tensor_comes_back(name):
  _, tensors, weights, _ = read_golden(name)
  again = theirs({"params": weights.params}, weights, name)
  assert again.keys() == tensors.keys()
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_the_loss_and_all_gradients_are_those_of_transformers():
  arrays, tensors, weights, model = read_golden("transformers")
  batch = {"image": reference.pixels(arrays["images"]), "text": arrays["tokens"][:3, None]}
  loss, gradient, *_ = reference.differentiate(model, weights.params, weights.collections, batch, sigmoid=1.0)
  np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-5)
  ours, expected = theirs({"params": gradient}, weights, "transformers"), reference.below(arrays, "grad/")
  assert ours.keys() == expected.keys() == tensors.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(ours[key], value, rtol=3e-4, atol=2e-5, err_msg=key)


def test_stacked_blocks_and_half_precision_of_big_vision():
  """Towers that were trained with `scan` have one array for all blocks, and bfloat16 arrays are bytes for NumPy."""
  _, tensors, weights, _ = read_golden("big_vision")
  stacked = dict(tensors)
  for key in tensors:
    if "/encoderblock_0/" in key:
      other = key.replace("/encoderblock_0/", "/encoderblock_1/")
      stacked[key.replace("/encoderblock_0/", "/encoderblock/")] = np.stack([stacked.pop(key), stacked.pop(other)])
  again = from_state_dict(stacked)
  jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  """A folder with tiny tokenizers like those of SigLIP and SigLIP 2, and captions."""
  folder = tmp_path_factory.mktemp("tokenizers")
  return folder, json.loads(str(tokenizer_files.write(folder)["captions_json"]))


def write_folder(folder, spiece):
  """A folder as transformers writes it, and the arrays of the fixture."""
  arrays, tensors, *_ = read_golden("transformers")
  for name, content in json.loads(str(arrays["files_json"])).items():
    (folder / name).write_text(content, encoding="utf-8")
  shutil.copyfile(spiece, folder / "spiece.model")
  safetensors.numpy.save_file(
    {key: np.ascontiguousarray(x) for key, x in tensors.items()}, folder / "model.safetensors"
  )
  return arrays


def check_ends(clip, arrays, captions, same):
  """A picture and captions through preprocessing, tokenizer and towers."""
  np.testing.assert_allclose(clip.encode_image(arrays["picture"]), unit(arrays["picture_features"]), **ENDS)
  found = clip.encode_text([captions[index] for index in same])
  np.testing.assert_allclose(found, unit(arrays["caption_features"])[same], **ENDS)


def test_a_folder_of_transformers_from_pictures_and_captions_to_features(tokenizers, tmp_path):
  files, captions = tokenizers
  arrays = write_folder(tmp_path, files / "spiece.model")
  clip = load(tmp_path)
  assert (clip.remarks, clip.view.squash, clip.view.size, clip.view.mean) == ((), True, 36, (0.5, 0.5, 0.5))
  # Before a caption that begins with a space, transformers' tokenizer has a mark too many.
  check_ends(clip, arrays, captions, [index for index in range(len(captions)) if index != 3])


def test_a_checkpoint_of_open_clip_with_the_settings_that_it_lacks(tokenizers, tmp_path):
  files, captions = tokenizers
  arrays, tensors, *_ = read_golden("open_clip")
  safetensors.numpy.save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, tmp_path / "x.safetensors")
  options = "start=none&clean=repair,underscores,lower,no_punctuation,spaces"
  told = {"image_size": 36, "text.tokenizer": f"huggingface:{files}/tokenizer.json?{options}"}
  with pytest.warns(UserWarning, match="does not specify image.activation='gelu_tanh', .* as are text.causal=False"):
    clip = load(tmp_path / "x.safetensors", HEADS | told)
  check_ends(clip, arrays, captions, list(range(len(captions))))


def test_an_archive_of_big_vision(tmp_path):
  _, tensors, weights, _ = read_golden("big_vision")
  saved = {f"params/{key}": x for key, x in tensors.items()} | {"opt/0/count": np.ones(3), "opt/0/mu/t": np.ones(1)}
  probe = "params/img/MAPHead_0/probe"
  saved[probe] = saved[probe].astype(ml_dtypes.bfloat16).view("V2")
  np.savez(tmp_path / "siglip.npz", **saved)
  found = read(tmp_path / "siglip.npz")
  assert (found.model["image"]["heads"], found.view.size, found.view.interpolation) == (2, 32, "bilinear")
  (remark,) = found.remarks
  assert remark.startswith("big_vision resizes images without antialiasing")
  expected = weights.params["towers"]["image"]["attention_pool"]["probe"].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(found.params["towers"]["image"]["attention_pool"].pop("probe"), expected)
  weights.params["towers"]["image"]["attention_pool"].pop("probe")
  jax.tree.map(np.testing.assert_array_equal, found.params, weights.params)
  np.savez_compressed(tmp_path / "small.npz", **saved)
  with pytest.raises(ValueError, match="is compressed in the zip"):
    read(tmp_path / "small.npz")


def test_an_export_to_transformers_is_the_folder_that_was_read(tokenizers, tmp_path):
  files, captions = tokenizers
  (tmp_path / "theirs").mkdir()
  arrays = write_folder(tmp_path / "theirs", files / "spiece.model")
  assert write(read(tmp_path / "theirs"), tmp_path / "ours", "huggingface") == []
  ours, theirs = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
  assert ours.keys() == theirs.keys()
  for key, tensor in theirs.items():
    np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
  config = json.loads((tmp_path / "ours" / "config.json").read_text())
  about = json.loads((tmp_path / "theirs" / "config.json").read_text())
  for tower in ("vision_config", "text_config"):
    assert {key: x for key, x in config[tower].items() if about[tower].get(key, x) != x} in ({}, {"bos_token_id": None})
  check_ends(load(tmp_path / "ours"), arrays, captions, [0, 1, 2])


def test_an_export_to_transformers_of_a_model_without_bias_and_tokenizer(tmp_path):
  _, _, weights, _ = read_golden("transformers")
  weights = weights._replace(heads=("joint",))
  notes = write(weights, tmp_path / "export", "huggingface")
  about = json.loads((tmp_path / "export" / "config.json").read_text())
  assert about["declip_jax"] == declip_jax.__version__
  assert [note.split()[0] for note in notes] == ["added:", "omitted:"]
  assert "a logit_bias of 0" in notes[0]
  assert "a tokenizer" in notes[1]
  assert read(tmp_path / "export").params["heads"]["logit_bias"] == 0
  for field, value in (("text.causal", True), ("text.pooling", "eot")):
    other = weights._replace(model=with_fields(weights.model, {field: value}, "x"))
    with pytest.raises(ValueError, match="SiglipModel .* cannot represent this model"):
      write(other, tmp_path / "other", "huggingface")


@pytest.mark.parametrize(
  ("architecture", "size", "changed"),
  [("SigLIP 2 ViT-L/16@512px", 512, None), ("SigLIP ViT-So400m/14@384px", 384, "exact"), ("SigLIP ViT-B/16", 225, "")],
)
def test_the_image_towers_of_open_clips_exports(architecture, size, changed):
  model = config_lib.default("siglip", architecture).model.to_dict()
  _, _, weights, _ = read_golden("transformers")
  weights = weights._replace(model=model, view=dataclasses.replace(weights.view, size=size))
  notes = []
  if changed == "":
    with pytest.raises(ValueError, match="only in image towers of timm, which are base_patch16_siglip_224"):
      write_lib._open_clip_siglip(weights, notes)
    return
  fields = write_lib._open_clip_siglip(weights, notes)
  patch = model["image"]["patch"]
  assert fields["timm_model_name"].endswith(f"_patch{patch}_siglip_{size}")
  assert (fields["timm_pool"], fields["timm_proj"], fields["image_size"]) == ("map", "none", size)
  assert len(notes) == (changed is not None)
  assert all(changed in note for note in notes)
  model["image"]["mlp_ratio"] = 2.0
  with pytest.raises(ValueError, match="only in image towers of timm"):
    write_lib._open_clip_siglip(weights, notes)


def test_weights_start_another_method_at_another_resolution_and_vocabulary():
  """DeCLIP with a larger grid, a shorter context, and a mask token; positions without a class token are resized."""
  _, _, weights, _ = read_golden("transformers")
  c = config_lib.default("declip", "SigLIP ViT-B/16")
  c.model.image, c.model.text = ConfigDict(weights.model["image"]), ConfigDict(weights.model["text"])
  c.model.text.update({"vocab_size": 97, "context_length": 12, "tokenizer": SPIECE})
  c.model.heads.update({"embed_dim": 32, "bank_size": 8, "simsiam_projector": (8,), "simsiam_predictor": (8, 8)})
  model = c.model.to_dict()
  assert (c.model.mean, c.model.heads.image_linear) == ((0.5, 0.5, 0.5), False)
  _check_towers(weights, model, tuple(GROUPS))
  heads = ("joint", "simsiam", "mlm", "bank")
  _, shapes = abstract_variables(model, heads, 52)
  fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  params, _, lines = load_weights(fresh["params"], fresh["collections"], weights, tuple(GROUPS))
  assert any("resized: towers/image/position_embedding, 16 -> 36 positions" in line for line in lines)
  assert any("extended: towers/text/token_embedding/embedding, (96, 24) -> (97, 24)" in line for line in lines)
  assert "not in this model: heads/logit_bias" in lines
  (random,) = [line for line in lines if line.startswith("newly initialised")]
  assert "heads/mlm" in random
  assert "_projection" not in random
  positions = params["towers"]["image"]["position_embedding"]
  given = jnp.asarray(weights.params["towers"]["image"]["position_embedding"])
  np.testing.assert_array_equal(positions, resize_positions(given, 36))
  same = ("attention_pool", "transformer", "post_norm")
  for name in same:
    jax.tree.map(
      np.testing.assert_array_equal, params["towers"]["image"][name], weights.params["towers"]["image"][name]
    )
  for field, value in (("text.tokenizer", f"{SPIECE}&end=x"), ("image.pooling", "token"), ("text.causal", True)):
    other = weights._replace(model=with_fields(weights.model, {field: value}, "x"))
    with pytest.raises(ValueError, match=rf"config.model.{field}=.* does not match the weights"):
      _check_towers(other, model, tuple(GROUPS))


SPIECE = "sentencepiece:spiece.model?start=none&pad=</s>"


@pytest.mark.parametrize("method", ["siglip", "declip", "slip_mim"])
def test_methods_build_with_a_released_architecture_and_its_tokenizer(method, tokenizers):
  c = config_lib.default(method, "SigLIP ViT-So400m/14@384px")
  with pytest.raises(ValueError, match=r"spiece.model does not exist"):
    build(c)
  c.model.text.tokenizer = c.model.text.tokenizer.replace("spiece.model", f"{tokenizers[0]}/spiece.model")
  built = build(c)
  assert built.batch_shape(8)["text"].shape[-1] == 64
  assert built.model.towers.image.heads == 16
  c.model.heads.embed_dim = 512
  with pytest.raises(ValueError, match="image features have 1152 dimensions, but config.model.heads.embed_dim=512"):
    build(c)


@pytest.mark.parametrize("format", ["open_clip", "huggingface", "orbax"])
def test_text_features_that_are_embeddings(format, tmp_path):
  """No linear layer maps texts to the joint space, as in SigLIP So400m/16 for many languages."""
  fields = {"text__width": 32, "heads__embed_dim": 32, "heads__text_linear": False, "heads__text_bias": False}
  weights = make_weights(0, **fields)
  assert "text_projection" not in weights.params["heads"]
  notes = write(weights, tmp_path / "out", format)
  again = read(tmp_path / "out")
  assert again.model["heads"]["text_linear"] == (format == "huggingface")
  assert any("added: the identity" in note for note in notes) == (format == "huggingface")
  ids = np.asarray([[1, 5, 7, weights.model["text"]["eot"]]])
  found, expected = (Clip(x, make_mesh(-1, 1)).text_features(ids) for x in (again, weights))
  np.testing.assert_array_equal(found, expected)
  model = weights.model | {"heads": weights.model["heads"] | {"embed_dim": 16}}
  with pytest.raises(ValueError, match=r"heads.text_linear=False: text features have 32 dimensions, .*embed_dim=16"):
    make_model(model, views=Views(), heads=("joint",))


def test_a_file_of_big_vision_without_a_projection_of_texts():
  """A guess that the remark names, possible only if the widths are equal."""
  _, tensors, *_ = read_golden("big_vision")
  tensors = {key: x for key, x in tensors.items() if not key.startswith("txt/head/")}
  with pytest.raises(ValueError, match=r"heads.text_linear=False: text features have 24 dimensions, .*embed_dim=32"):
    from_state_dict(tensors)


def test_naflex_of_big_vision_is_named():
  """Its patches are a matrix, and its positions a square."""
  _, tensors, *_ = read_golden("big_vision")
  kernel, positions = tensors["img/embedding/kernel"], tensors["img/pos_embedding"]
  tensors["img/embedding/kernel"] = kernel.reshape(-1, kernel.shape[-1])
  tensors["img/pos_embedding"] = positions.reshape(4, 4, -1)
  with pytest.raises(ValueError, match=r"images of any shape \(NaFlex\) is not supported$"):
    from_state_dict(tensors)
