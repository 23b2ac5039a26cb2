"""Tests of exports with other tools: they load our files strictly and embed the same; and we read theirs."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
import transformers

from declip_jax import architectures, config
from declip_jax.clip import Clip, load
from declip_jax.data.images import EvalView
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.sharding import make_mesh
from declip_jax.weights.layout import abstract_variables
from declip_jax.weights.read import Weights
from declip_jax.weights.write import write

CAPTIONS = ["a photo of a dog", "Two  CATS &amp; a naïve café, it's 1999!", "x" * 300, "", "красный 🚗 №7"]
TINY_TEXT = {"width": 64, "depth": 2, "heads": 2}


def tiny(image, text=None, **fields) -> architectures.Architecture:
  return architectures.Architecture(image, text or architectures.text(64, 2, heads=2), 48, **fields)


ARCHITECTURES = {
  "tiny ViT": tiny(architectures.vit(8, 64, 2, 2), image_size=32),
  "tiny GELU": tiny(
    architectures.vit(8, 64, 2, 1, activation="gelu", mlp_ratio=2.5),
    architectures.text(64, 3, activation="gelu"),
    image_size=32,
  ),
  "tiny ResNet": tiny(architectures.resnet(16, (1, 2, 1, 1)), image_size=64, image_bias=True),
  "tiny SLIP": tiny(architectures.vit(16, 192, 12, 3, **architectures.SLIP)),
  "tiny DeCLIP": tiny(
    architectures.vit(8, 64, 2, 2), architectures.text(64, 2, vocab_size=49409), image_size=32, text_bias=True
  ),
  "tiny DeCLIP, wider joint space": architectures.Architecture(
    architectures.vit(8, 64, 2, 2), architectures.text(64, 2, vocab_size=49409), 96, 32, text_bias=True
  ),
  **{name: architectures.ARCHITECTURES[name] for name in ("ViT-B/32", "RN50")},
}


def random_weights(architecture: architectures.Architecture, heads: tuple[str, ...] = ("joint",)) -> Weights:
  """A model whose parameters are all random, norms and biases too."""
  c = config.default()
  c.model.image, c.model.text = architecture.image, architecture.text
  c.model.heads.embed_dim = architecture.embed_dim
  c.model.heads.image_bias, c.model.heads.text_bias = architecture.image_bias, architecture.text_bias
  c.model.heads.image_linear = architecture.image_linear
  c.model.mean, c.model.std = architecture.mean or c.model.mean, architecture.std or c.model.std
  c.model.dtype = "float32"
  built, shapes = abstract_variables(c.model.to_dict(), heads, architecture.image_size)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    if name in ("scale", "var"):
      return rng.uniform(0.8, 1.2, leaf.shape).astype(np.float32)
    deviation = (
      0.02 if leaf.ndim < 2 or "embedding" in name or name == "bias" else (np.prod(leaf.shape[:-1][-3:])) ** -0.5
    )
    return rng.normal(0, deviation, leaf.shape).astype(np.float32)

  variables = jax.tree.map_with_path(draw, shapes)
  variables["params"]["heads"]["logit_scale"] = np.float32(2.5)
  squash = not architecture.image_linear  # as SigLIP
  view = EvalView(architecture.image_size, 0, "bicubic", c.model.mean, c.model.std, squash)
  return Weights("test", c.model.to_dict(), heads, **variables, view=view)


def assert_near(ours: np.ndarray, theirs: torch.Tensor) -> None:
  theirs = torch.nn.functional.normalize(theirs.float(), dim=-1).numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def pictures() -> list[PIL.Image.Image]:
  rng = np.random.default_rng(1)
  sizes = [(300, 200), (64, 90), (224, 224), (50, 400)]
  return [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((w, h)) for h, w in sizes]


@pytest.fixture(params=ARCHITECTURES)
def name(request) -> str:
  return request.param


@torch.no_grad()
def test_open_clip_loads_our_export(name: str, tmp_path: Path) -> None:
  weights = random_weights(ARCHITECTURES[name])
  write(weights, tmp_path / "export", "open_clip")
  theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
  theirs.eval()
  ours = Clip(weights, make_mesh(-1, 1))
  # Their preprocessing, and ours up to rounding: they resize the picture and leave it uint8, as we do.
  batch = torch.stack([preprocess(picture) for picture in pictures()])
  assert_near(ours.encode_image(pictures()), theirs.encode_image(batch))
  normalised = np.moveaxis(batch.numpy(), 1, -1)
  np.testing.assert_allclose(ours.image_features(normalised), theirs.encode_image(batch), rtol=1e-3, atol=1e-4)
  tokens = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
  np.testing.assert_array_equal(tokens.numpy(), Tokenizer()(CAPTIONS))
  assert_near(ours.encode_text(CAPTIONS), theirs.encode_text(tokens))
  np.testing.assert_allclose(ours.logit_scale, theirs.logit_scale.exp().item(), rtol=1e-6)


@torch.no_grad()
def test_open_clip_loads_the_bias_of_the_sigmoid_loss(tmp_path: Path) -> None:
  weights = random_weights(ARCHITECTURES["tiny ViT"], ("joint", "sigmoid"))
  weights.params["heads"]["logit_bias"] = np.float32(-10.5)
  write(weights, tmp_path / "export", "open_clip")
  theirs, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
  assert (theirs.logit_bias.item(), theirs.logit_scale.item()) == (-10.5, 2.5)


@torch.no_grad()
def test_transformers_loads_our_export(name: str, tmp_path: Path) -> None:
  weights = random_weights(ARCHITECTURES[name])
  if weights.model["image"]["kind"] == "resnet" or not weights.model["image"]["pre_norm"]:
    with pytest.raises(ValueError, match="cannot represent"):
      write(weights, tmp_path / "export", "huggingface")
    assert not (tmp_path / "export").exists()
    return
  write(weights, tmp_path / "export", "huggingface")
  theirs, report = transformers.CLIPModel.from_pretrained(
    tmp_path / "export", local_files_only=True, output_loading_info=True
  )
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "export", local_files_only=True, backend="pil")
  captions = CAPTIONS[:1] + CAPTIONS[2:]  # transformers cleans entities and accents in another way
  inputs = processor(
    text=captions, images=pictures(), return_tensors="pt", padding="max_length", max_length=77, truncation=True
  )
  out = theirs.eval()(**inputs)
  ours = Clip(weights, make_mesh(-1, 1))
  # The other one is 315 pixels wide when it is resized, of which transformers cuts off 45 before and 46 after.
  cut_alike = [0, 2, 3]
  assert_near(ours.encode_image(pictures())[cut_alike], out.image_embeds[cut_alike])
  normalised = np.moveaxis(inputs["pixel_values"].numpy(), 1, -1)
  ids = inputs["input_ids"].numpy()
  assert_near(_unit(ours.image_features(normalised)), out.image_embeds)
  assert_near(ours.encode_text(captions), out.text_embeds)
  assert_near(_unit(ours.text_features(ids)), out.text_embeds)
  again = load(tmp_path / "export")
  np.testing.assert_allclose(again.encode_text(captions), ours.encode_text(captions), rtol=0, atol=1e-5)
  np.testing.assert_array_equal(again.encode_image(pictures()), ours.encode_image(pictures()))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@torch.no_grad()
@pytest.mark.parametrize(
  ("model", "fields"),
  [
    ("ViT-B-32", {}),
    ("ViT-B-32-quickgelu", {}),
    ("RN50", {}),
    ("ViT-H-14", {"vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}),
  ],
)
@pytest.mark.parametrize("form", ["folder", "training"])
def test_checkpoints_of_open_clip_are_loaded(model: str, fields: dict, form: str, tmp_path: Path) -> None:
  theirs_config = open_clip.get_model_config(model)
  for part, values in fields.items():
    theirs_config[part].update(values)
  theirs = open_clip.CLIP(**{key: value for key, value in theirs_config.items() if key != "custom_text"}).eval()
  if form == "folder":
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    about = {"model_cfg": theirs_config, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    path = tmp_path
  else:
    path = tmp_path / "epoch_1.pt"
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    name = f"2026_01_31-00_00_00-model_{model}-lr_0.0005-b_64-j_4-p_amp"  # as open_clip names a run
    torch.save({"epoch": 1, "name": name, "state_dict": state, "optimizer": {}}, path)
  # With fewer layers than the real one, the number of heads must be given.
  settings = {"image.heads": 16} if fields and form == "training" else {}
  with pytest.warns(UserWarning, match="does not specify") if form == "training" else contextlib.nullcontext():
    ours = load(path, settings)
  size = theirs_config["vision_cfg"]["image_size"]
  images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
  tokens = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
  assert_near(_unit(ours.image_features(np.moveaxis(images.numpy(), 1, -1))), theirs.encode_image(images))
  assert_near(ours.encode_text(CAPTIONS), theirs.encode_text(tokens))


@torch.no_grad()
@pytest.mark.parametrize("shard", ["5GB", "200MB"])
def test_checkpoints_of_transformers_are_loaded(shard: str, tmp_path: Path) -> None:
  theirs = transformers.CLIPModel(transformers.CLIPConfig()).eval()
  theirs.save_pretrained(tmp_path, max_shard_size=shard)
  assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "200MB")
  with pytest.warns(UserWarning, match="the file does not specify mean="):  # without preprocessor_config.json
    ours = load(tmp_path)
  images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
  tokens = torch.from_numpy(Tokenizer()(CAPTIONS)).long()
  out = theirs(input_ids=tokens, pixel_values=images)
  assert_near(_unit(ours.image_features(np.moveaxis(images.numpy(), 1, -1))), out.image_embeds)
  assert_near(ours.encode_text(CAPTIONS), out.text_embeds)
