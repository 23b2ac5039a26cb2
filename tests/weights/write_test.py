"""Tests of exports: they are read back bit for bit, the vocabulary is OpenAI's, and nothing is overwritten."""

from collections.abc import Callable
import json
from pathlib import Path
import subprocess
import sys

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import PIL.Image
import pytest
import references as reference
import safetensors.numpy
from tiny import FinishedRun, tiny_config

import declip_jax
from declip_jax import architectures
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.methods import METHODS, SUPERVISED
from declip_jax.weights.read import from_state_dict, read, read_run
from declip_jax.weights.vocabulary import merges, vocabulary
from declip_jax.weights.write import FORMATS, _fold_text_bias, write

SETTINGS = {
  "openai_vit": reference.TOLD,
  "openai_resnet": reference.TOLD,
  "openclip_vit": reference.TOLD | {"image.heads": 2, "text.heads": 2, "text.activation": "gelu"},
  "openclip_rn": {"text.heads": 4, "text.activation": "gelu", "text.eot": 99},
  "hf_clip": reference.TOLD | {"image.heads": 4, "text.heads": 2},
  "slip": {"image.heads": 3, "text.heads": 2},
  "declip": {"image.heads": 2, "text.heads": 3, "text.eot": 130},  # the largest id, at which the others pool
}
ONLY_OURS = ("mlm", "filip", "simclr", "simsiam")  # heads that open_clip does not have
REJECTED = {
  ("openai_resnet", "huggingface"): "cannot represent a resnet",
  ("openclip_rn", "huggingface"): "cannot represent a resnet",
  ("slip", "huggingface"): "cannot represent one without that norm",
  ("slip", "open_clip"): r"image tower with gelu and a text tower with quick_gelu, .* \(48, 2, 3\)",
}


READABLE = [format for format in FORMATS if format != "onnx"]  # see onnx_test
ABOUT = {"open_clip": "open_clip_config.json", "huggingface": "config.json", "orbax": "weights.json"}
# Formats and fixtures of the fast tier.
REPRESENTATIVES = (("hf_clip", "huggingface"), ("openclip_vit", "open_clip"), ("declip", "orbax"), *REJECTED)


@pytest.mark.parametrize(
  ("name", "format"),
  [
    pytest.param(name, format, marks=() if (name, format) in REPRESENTATIVES else pytest.mark.slow)
    for name in SETTINGS
    for format in READABLE
  ],
)
def test_files_read_back_equal_the_model(name: str, format: str, tmp_path: Path) -> None:
  sd = reference.below(reference.load(name), "sd/")
  weights = from_state_dict(sd, SETTINGS[name])
  if (name, format) in REJECTED:
    with pytest.raises(ValueError, match=REJECTED[name, format]):
      write(weights, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    return
  notes = write(weights, tmp_path / "out", format)
  again = read(tmp_path / "out")
  about = json.loads((tmp_path / "out" / ABOUT[format]).read_text())
  assert about["declip_jax"] == declip_jax.__version__
  moved = ()
  if (name, format) == ("declip", "huggingface"):
    assert any("bias of the text projection" in note for note in notes)
    moved = ("towers/text/final_norm/scale", "towers/text/final_norm/bias")
    moved += ("heads/text_projection/kernel", "heads/text_projection/bias")
  ours, theirs = (flatten_dict(x.params, sep="/") for x in (weights, again))
  if format == "orbax":
    assert ours.keys() == theirs.keys()
  assert ours.keys() - theirs.keys() - set(moved) <= {key for key in ours if key.startswith("heads/")}
  for key in theirs.keys() - set(moved):
    np.testing.assert_array_equal(theirs[key], ours[key], err_msg=key)
  assert (again.view.size, again.view.interpolation) == (weights.view.size, weights.view.interpolation)
  assert weights.view.resize == (36 if name == "declip" else 0)  # as 256 to 224
  if format == "open_clip":  # which cannot store it
    assert (again.view.resize, any("omitted: resizing" in note for note in notes)) == (0, name == "declip")
  else:
    assert again.view == weights.view
  for part in ("image", "text", "mean", "std"):
    ours, theirs = weights.model[part], again.model[part]
    assert dict(ours.items()) == dict(theirs.items()) if part in ("image", "text") else ours == theirs
  without = {"orbax": (), "open_clip": ONLY_OURS, "huggingface": (*ONLY_OURS, "sigmoid")}[format]
  assert again.heads == tuple(head for head in weights.heads if head not in without)
  assert any("omitted: the heads" in note for note in notes) == bool({*weights.heads} & {*without} - {"sigmoid"})
  assert ("sigmoid" in weights.heads) == (name == "openclip_vit")
  lost = "omitted: logit_bias, which CLIPModel does not have"
  assert (lost in notes) == (format == "huggingface" and name == "openclip_vit")
  if (tmp_path / "out" / "open_clip_config.json").exists() and "sigmoid" in weights.heads:
    about = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert about["model_cfg"]["init_logit_bias"] == float(weights.params["heads"]["logit_bias"]) != 0
  # Written again, the files are identical.
  write(again, tmp_path / "twice", format)
  for file in (tmp_path / "out").glob("*.safetensors"):
    assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("openai_vit", marks=pytest.mark.slow),
    "openclip_vit",
    pytest.param("openclip_rn", marks=pytest.mark.slow),
  ],
)
def test_open_clip_files_keep_every_tensor(name: str, tmp_path: Path) -> None:
  sd = reference.below(reference.load(name), "sd/")
  write(from_state_dict(sd, SETTINGS[name]), tmp_path / "out", "open_clip")
  written = safetensors.numpy.load_file(tmp_path / "out" / "open_clip_model.safetensors")
  assert written.keys() == sd.keys()
  for key, tensor in sd.items():
    assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape), key
    assert written[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize(("width", "embed_dim"), [(8, 16), (16, 8)])
def test_hugging_face_text_embeddings_keep_the_bias_of_the_projection(width: int, embed_dim: int) -> None:
  rng = np.random.default_rng(0)
  normed = rng.normal(size=(5, width))
  normed -= normed.mean(axis=1, keepdims=True)
  shapes = {"text_projection.weight": (embed_dim, width), "text_projection.bias": embed_dim}
  shapes |= {"ln_final.weight": width, "ln_final.bias": width}
  before = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  after = dict(before)
  _fold_text_bias(after, [])
  assert after.keys() == {"text_projection", "ln_final.weight", "ln_final.bias"}
  states = [normed * of["ln_final.weight"] + of["ln_final.bias"] for of in (before, after)]
  expected = states[0] @ before["text_projection.weight"].T + before["text_projection.bias"]
  np.testing.assert_allclose(states[1] @ after["text_projection"], expected, atol=1e-5)


def test_hugging_face_files_keep_every_tensor(tmp_path: Path) -> None:
  golden = reference.load("hf_clip")
  sd = reference.below(golden, "sd/")
  write(from_state_dict(sd, SETTINGS["hf_clip"]), tmp_path / "out", "huggingface")
  written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert written.keys() == sd.keys()
  for key, tensor in sd.items():
    assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape), key
    assert written[key].tobytes() == tensor.tobytes(), key
  ours, theirs = (
    json.loads(text)
    for text in ((tmp_path / "out" / "config.json").read_text(), str(golden["hf_config_json_quick_gelu"]))
  )
  for part in ("text_config", "vision_config"):
    for field in ours[part].keys() & theirs[part].keys() - {"bos_token_id", "pad_token_id"}:
      assert ours[part][field] == theirs[part][field], (part, field)


def test_vocabulary_is_openais() -> None:
  symbols = vocabulary()
  assert (len(merges()), len(symbols), merges()[0]) == (48894, 49408, "i n")
  assert (symbols["<|startoftext|>"], symbols["<|endoftext|>"], symbols["!"]) == (49406, 49407, 0)
  names = {index: symbol for symbol, index in symbols.items()}
  for text in ("a photo of a dog", "two cats' 7 red-hot Éclairs!"):
    pieces = [names[index] for index in Tokenizer().encode(text)]
    # UTF-8 in GPT-2's letters: é is two bytes.
    assert "".join(pieces).replace("</w>", "").replace("Ã©", "é") == text.lower().replace(" ", "")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
  weights = from_state_dict(reference.below(reference.load("openai_vit"), "sd/"), reference.TOLD)
  (tmp_path / "mine.txt").write_text("precious")
  with pytest.raises(ValueError, match="already exists"):
    write(weights, tmp_path, "open_clip")
  with pytest.raises(ValueError, match=r"'tf': choose one of \['huggingface', 'onnx', 'open_clip', 'orbax'\]"):
    write(weights, tmp_path / "out", "tf")
  assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("format", FORMATS)
def test_exported_files_have_the_modes_of_other_files(format: str, tmp_path: Path) -> None:
  if format == "onnx":
    pytest.importorskip("onnx")
  weights = from_state_dict(reference.below(reference.load("hf_clip"), "sd/"), SETTINGS["hf_clip"])
  write(weights, tmp_path / "out", format)
  (tmp_path / "other").touch()
  mode = (tmp_path / "other").stat().st_mode
  assert {file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()} == {mode}


@pytest.mark.parametrize("format", READABLE)
def test_a_view_of_the_whole_image_is_kept(format: str, tmp_path: Path) -> None:
  weights = from_state_dict(
    reference.below(reference.load("hf_clip"), "sd/"),
    SETTINGS["hf_clip"] | {"squash": True, "interpolation": "bilinear"},
  )
  write(weights, tmp_path / "out", format)
  assert read(tmp_path / "out").view == weights.view
  assert weights.view.squash


@pytest.mark.slow
def test_exports_of_another_tokenizer_say_so(tmp_path: Path) -> None:
  """At which id other projects pool: at the largest by default, so one that is not has to be named."""
  sd = reference.below(reference.load("hf_clip"), "sd/")
  for eot, tokenizer, pooling in ((5, "openai", "eos"), (127, "openai", None), (127, "sentencepiece:a.model", "eos")):
    weights = from_state_dict(sd, SETTINGS["hf_clip"] | {"text.eot": eot, "text.tokenizer": tokenizer})
    assert weights.model["text"]["vocab_size"] == 128
    folder = tmp_path / f"{eot} {tokenizer}"
    for format in ("open_clip", "huggingface"):
      (note,) = [note for note in write(weights, folder / format, format) if "tokenizer" in note]
      assert f"128 tokens and end texts with id {eot} (config.model.text.tokenizer='{tokenizer}')" in note
      assert read(folder / format).model["text"]["eot"] == eot
    text = json.loads((folder / "open_clip" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text.get("pool_type"), text.get("eos_id")) == ((pooling, eot) if pooling else (None, None))
  weights = from_state_dict(sd, SETTINGS["hf_clip"] | {"text.eot": 2})  # transformers takes 2 for the largest id
  with pytest.raises(ValueError, match="cannot represent texts that end with id 2; open_clip's format can"):
    write(weights, tmp_path / "two", "huggingface")
  assert not (tmp_path / "two").exists()


def tiny_of(method: str) -> ConfigDict:
  """A tiny config of a method, or of CLIP with a convolutional network."""
  c = tiny_config(method if method in METHODS or method in SUPERVISED else "clip")
  if method in CONVOLUTIONS:
    c.model.image, c.model.heads.image_bias = CONVOLUTIONS[method], method == "resnet"
    c.data.image_size = 32
  return c


CONVOLUTIONS = {
  "resnet": architectures.resnet(8, (1, 2, 1, 1)),
  "regnet": architectures.regnet(8, 6.0, 1.8, 7, 12),
}


@pytest.mark.parametrize(
  "method",
  [
    pytest.param(method, marks=() if method == "simclr" else pytest.mark.slow)
    for method in (*METHODS, *SUPERVISED, *CONVOLUTIONS)
  ],
)
def test_a_run_of_every_method_is_exported_and_read_back(
  method: str, save_run: Callable[[ConfigDict], Path], tmp_path: Path
) -> None:
  weights = read_run(save_run(tiny_of(method)))
  assert weights.tokens == (method == "filip")
  assert weights.collections.keys() == {"towers", "heads"}
  assert ("momentum" in weights.heads) == (method in ("slip_mocov3", "slip_byol"))
  notes = write(weights, tmp_path / "orbax [1]*", "orbax")
  again = read(tmp_path / "orbax [1]*")
  assert again.heads == tuple(head for head in weights.heads if head != "bank")
  assert notes == (["omitted: the neighbour bank"] if "declip" in method or method == "defilip" else [])
  collections = {half: dict(weights.collections[half]) for half in ("towers", "heads")}
  assert (collections["heads"].pop("bank", None) is None) == ("bank" not in weights.heads)
  ours, theirs = {"p": weights.params, "c": collections}, {"p": again.params, "c": again.collections}
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert (again.tokens, again.view) == (weights.tokens, weights.view)
  assert again.model == weights.model
  for format in ("open_clip", "huggingface"):
    rejected = {
      **dict.fromkeys(("simclr", "finetune"), rf"\(declip_jax, step 3\) have no text tower: {format} cannot"),
      "filip": rf"compare tokens, not pooled embeddings: {format} cannot",
      "regnet": "cannot represent an? (image tower of kind 'regnet'|regnet)",
      **({"resnet": "cannot represent a resnet"} if format == "huggingface" else {}),
    }
    if method in rejected:
      with pytest.raises(ValueError, match=rejected[method]):
        write(weights, tmp_path / format, format)
      assert not (tmp_path / format).exists()
    elif format == "open_clip":
      write(weights, tmp_path / format, format)
      again = read(tmp_path / format)
      assert again.heads == (("joint", "sigmoid") if method == "siglip" else ("joint",))
      ours, theirs = (flatten_dict(x.params, sep="/") for x in (weights, again))
      left = ours.keys() - theirs.keys()
      assert not {key for key in left if "_projection/" in key or "towers/" in key} - {"towers/image/mask_embedding"}
      for key, value in theirs.items():
        np.testing.assert_array_equal(value, ours[key], err_msg=key)


def test_released_filip_has_no_other_format(tmp_path: Path) -> None:
  sd = reference.below(reference.load("declip"), "sd/")
  sd = {name: x for name, x in sd.items() if not name.startswith(("projector.", "predictor."))}
  weights = from_state_dict(sd, SETTINGS["declip"])
  for format in ("open_clip", "huggingface"):
    with pytest.raises(ValueError, match=rf"\(DeCLIP\) were trained to compare tokens.* {format} cannot"):
      write(weights, tmp_path / "out", format)
  assert not (tmp_path / "out").exists()
  write(weights, tmp_path / "out", "orbax")
  again = read(tmp_path / "out")
  assert (again.tokens, again.heads) == (True, weights.heads)
  jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


@pytest.mark.slow
def test_export_by_command(finished_run: FinishedRun, tmp_path: Path) -> None:
  workdir = finished_run.workdir
  command = [sys.executable, "-m", "declip_jax.export", "--workdir", str(workdir), "--format", "open_clip"]
  command += ["--output", str(tmp_path / "out")]
  best = subprocess.run([*command, "--step=best"], capture_output=True, text=True)
  assert (best.returncode, best.stderr.count("\n")) == (2, 1)
  assert "has no best checkpoint, since its config.checkpoint.best_metric is ''" in best.stderr
  settings = ["--step=8", "--settings=interpolation=bicubic", "--settings=mean=(0.5, 0.25, 0.5)"]
  done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
  view = declip_jax.load(tmp_path / "out").view
  assert (view.interpolation, view.mean) == ("bicubic", (0.5, 0.25, 0.5))
  lines = done.stdout.splitlines()
  assert lines[0].startswith("declip_jax, step 8: ")
  assert "omitted: the heads that only training uses (bank, mlm, simsiam)" in lines
  assert lines[-1] == f"wrote {tmp_path / 'out'} in the format of open_clip"
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 2
  assert "already exists" in again.stderr
  ours, theirs = declip_jax.load(workdir), declip_jax.load(tmp_path / "out")
  texts = ["a red ring", "two blue stars"]
  np.testing.assert_allclose(theirs.encode_text(texts), ours.encode_text(texts), atol=1e-6)


@pytest.mark.slow
def test_images_of_all_kinds_and_numbers_are_encoded(finished_run: FinishedRun, tmp_path: Path) -> None:
  clip = declip_jax.load(finished_run.workdir)
  assert (clip.step, clip.view.size) == (8, 16)
  pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  file = tmp_path / "image.png"
  PIL.Image.fromarray(pixels).save(file)
  kinds = [pixels, PIL.Image.fromarray(pixels), file, str(file), file.read_bytes()]
  rows = clip.encode_image(kinds)
  assert (rows.shape, rows.dtype) == ((5, 16), np.float32)
  for row in rows:
    np.testing.assert_allclose(row, rows[0], atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
  for one in kinds:
    np.testing.assert_allclose(clip.encode_image(one), rows[:1], atol=1e-6)
  many = clip.encode_image([pixels] * 21, batch_size=8)
  np.testing.assert_allclose(many, np.repeat(rows[:1], 21, axis=0), atol=1e-6)
  np.testing.assert_allclose(clip.encode_image(np.stack([pixels] * 3)), rows[:3], atol=1e-6)
  np.testing.assert_allclose(clip.encode_image(x for x in (file, pixels)), rows[:2], atol=1e-6)
  np.testing.assert_allclose(clip.encode_image(jnp.asarray(pixels)), rows[:1], atol=1e-6)
  grey = np.repeat(pixels[..., :1], 3, axis=2)
  np.testing.assert_allclose(clip.encode_image(grey[..., 0]), clip.encode_image(grey), atol=1e-6)
  assert clip.encode_image([]).shape == clip.encode_text([]).shape == (0, 16)
  with pytest.raises(ValueError, match="batch_size=0"):
    clip.encode_image([pixels], batch_size=0)
  features = clip.image_features(clip.normalise(clip.preprocess(pixels)[None]))
  np.testing.assert_allclose(features / np.linalg.norm(features), rows[:1], atol=1e-5)
  text = clip.text_features(clip.tokenizer(["a ring"]))
  np.testing.assert_allclose(text / np.linalg.norm(text), clip.encode_text("a ring"), atol=1e-5)
  with pytest.raises(ValueError, match="not a known image format"):
    clip.encode_image(b"not an image")
