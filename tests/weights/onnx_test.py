"""ONNX exports in onnxruntime: embeddings by the reference implementations, and ours for other towers."""

from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import numpy as np
import open_clip_towers
import pytest
import references as reference
from tiers import slow_except

import declip_jax
from declip_jax import architectures, config, extras
from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.sharding import make_mesh
from declip_jax.unit_norm import unit_norm
from declip_jax.weights import onnx_graph
from declip_jax.weights import write as write_lib
from declip_jax.weights.layout import abstract_variables
from declip_jax.weights.onnx_primitives import to_onnx
from declip_jax.weights.read import Weights, from_state_dict, read
from declip_jax.weights.write import write

HEADS = {"image.heads": 2, "text.heads": 2}
SIGLIP = HEADS | {"image_size": 36}
# Settings of each fixture, and its features of images and texts.
GOLDEN = {
  "openai_vit": (reference.TOLD, "image_features", "text_features"),
  "openai_resnet": (reference.TOLD, "image_features", "text_features"),
  "siglip_transformers": (SIGLIP, "image_features", "text_features"),
  "openclip_vit": (
    reference.TOLD | HEADS | {"image.activation": "gelu", "text.activation": "gelu"},
    "gelu/encode_image",
    "gelu/encode_text",
  ),
  "openclip_rn": (
    {"text.heads": 4, "text.activation": "gelu", "text.eot": 99},
    "gelu/encode_image",
    "gelu/encode_text",
  ),
  "hf_clip": (
    reference.TOLD | {"image.heads": 4, "text.heads": 2},
    "quick_gelu/image_embeds",
    "quick_gelu/text_embeds",
  ),
  "slip": ({"image.heads": 3, "text.heads": 2}, "eval/image_embed", "eval/text_embed"),
  "siglip_open_clip": (SIGLIP, "image_features", "text_features"),
  "siglip_big_vision": ({"image_size": 36}, "image", "text"),
}
FAST = ("openai_vit", "openai_resnet", "siglip_transformers")
TEXT = {"heads": 2, "vocab_size": 100, "eot": 99, "context_length": 12}
OTHERS = {
  "average pooling": architectures.Architecture(
    architectures.vit(8, 32, 2, 2, pooling="average"),
    architectures.text(32, 2, **TEXT, pooling="last", causal=False),
    24,
    32,
  ),
  "RegNet": architectures.Architecture(
    architectures.regnet(8, 6.0, 1.8, 7, 12), architectures.text(32, 2, **TEXT), 24, 64
  ),
  "bias of texts": architectures.Architecture(
    architectures.vit(8, 32, 2, 2), architectures.text(32, 2, **TEXT), 24, 32, text_bias=True
  ),
}


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def run(folder: Path, side: str, inputs: np.ndarray) -> np.ndarray:
  """The embeddings by onnxruntime, which a batch of another size does not change."""
  onnxruntime = pytest.importorskip("onnxruntime")
  session = onnxruntime.InferenceSession(folder / f"{side}.onnx", providers=["CPUExecutionProvider"])
  ((given,), (made,)) = session.get_inputs(), session.get_outputs()
  (found,) = session.run([made.name], {given.name: inputs})
  (one,) = session.run([made.name], {given.name: inputs[:1]})
  np.testing.assert_allclose(one, found[:1], rtol=0, atol=2e-6)
  return found


@pytest.mark.parametrize("name", slow_except(FAST, GOLDEN))
def test_embeddings_are_those_of_the_references(name: str, tmp_path: Path) -> None:
  onnx = pytest.importorskip("onnx")
  settings, image, text = GOLDEN[name]
  arrays = reference.load(name)
  tensors = {key.removeprefix("params/"): x for key, x in reference.below(arrays, "sd/").items()}
  write(from_state_dict(tensors, settings), tmp_path / "out", "onnx")
  pixels, tokens = (
    next(arrays[key] for key in names if key in arrays)
    for names in (("images", "pixel_values", "image"), ("tokens", "input_ids"))
  )
  for side, inputs, features in (("image", pixels, arrays[image]), ("text", tokens, arrays[text])):
    onnx.checker.check_model(str(tmp_path / "out" / f"{side}.onnx"), full_check=True)
    np.testing.assert_allclose(
      run(tmp_path / "out", side, inputs.astype(np.float32 if side == "image" else np.int64)),
      unit(features),
      rtol=0,
      atol=1e-5,
    )


def random_weights(architecture: architectures.Architecture) -> Weights:
  c = config.default()
  c.model.image, c.model.text, c.model.dtype = architecture.image, architecture.text, "bfloat16"
  c.model.heads.embed_dim, c.model.heads.text_bias = architecture.embed_dim, architecture.text_bias
  _, shapes = abstract_variables(c.model.to_dict(), ("joint",), architecture.image_size)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    low, high = (0.8, 1.2) if path[-1].key in ("scale", "var") else (-0.3, 0.3)
    return rng.uniform(low, high, leaf.shape).astype(np.float32)

  variables = jax.tree.map_with_path(draw, shapes)
  view = EvalView(architecture.image_size, 40, "bicubic", c.model.mean, c.model.std)
  return Weights("test", c.model.to_dict(), ("joint",), **variables, view=view)


@pytest.mark.filterwarnings("ignore:.*decoder of captions")
@pytest.mark.parametrize("name", slow_except(("EVA02-E-14", "coca_ViT-B-32"), open_clip_towers.MODELS))
def test_embeddings_of_towers_of_open_clip(name: str, tmp_path: Path) -> None:
  (tmp_path / "model").mkdir()
  arrays = open_clip_towers.write_folder(tmp_path / "model", name)
  write(read(tmp_path / "model"), tmp_path / "out", "onnx")
  for side, inputs in (("image", arrays["pixels"].astype(np.float32)), ("text", arrays["tokens"].astype(np.int64))):
    np.testing.assert_allclose(run(tmp_path / "out", side, inputs), unit(arrays[side]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", slow_except(("average pooling",), OTHERS))
def test_embeddings_of_other_towers_are_ours(name: str, tmp_path: Path) -> None:
  """The compute dtype of training does not matter: exports compute in float32."""
  weights = random_weights(OTHERS[name])
  write(weights, tmp_path / "out", "onnx")
  clip = Clip(weights._replace(model={**weights.model, "dtype": "float32"}), make_mesh(-1, 1))
  rng = np.random.default_rng(1)
  pixels = rng.normal(size=(3, weights.view.size, weights.view.size, 3)).astype(np.float32)
  tokens = rng.integers(0, TEXT["eot"] + 1, (3, TEXT["context_length"]))
  tokens[0, 5:] = TEXT["eot"]
  for side, inputs, ours in (
    ("image", pixels.transpose(0, 3, 1, 2), clip.image_features(pixels)),
    ("text", tokens, clip.text_features(tokens)),
  ):
    np.testing.assert_allclose(run(tmp_path / "out", side, inputs), unit(ours), rtol=0, atol=1e-5)


def test_large_weights_are_in_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  pytest.importorskip("onnx")
  weights = random_weights(OTHERS["bias of texts"])
  tokens = np.arange(24).reshape(2, 12)
  write(weights, tmp_path / "one", "onnx")
  monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 0)
  write(weights, tmp_path / "two", "onnx")
  size, graph, data = (
    (tmp_path / file).stat().st_size for file in ("one/text.onnx", "two/text.onnx", "two/text.onnx.data")
  )
  assert graph < size / 2 < data
  np.testing.assert_array_equal(run(tmp_path / "two", "text", tokens), run(tmp_path / "one", "text", tokens))


def test_the_folder_has_processor_and_temperature(tmp_path: Path) -> None:
  onnxruntime = pytest.importorskip("onnxruntime")
  c = architectures.Architecture(architectures.vit(8, 32, 2, 2), architectures.text(32, 1, heads=2), 24, 32)
  weights = random_weights(c)
  weights.params["heads"]["logit_scale"], weights.model["heads"]["max_scale"] = np.float32(5), 100.0
  assert write(weights, tmp_path / "out", "onnx") == []
  names = {file.name for file in (tmp_path / "out").iterdir()}
  assert names == {
    *("image.onnx", "text.onnx", "preprocessor_config.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json"),
  }
  session = onnxruntime.InferenceSession(tmp_path / "out" / "text.onnx", providers=["CPUExecutionProvider"])
  facts = session.get_modelmeta().custom_metadata_map
  assert facts == {"origin": "test", "declip_jax": declip_jax.__version__, "logit_scale": "100.0", "logit_bias": "0.0"}
  texts = ["a red ring", "zwei blaue Sterne"]
  clip = Clip(weights._replace(model={**weights.model, "dtype": "float32"}), make_mesh(-1, 1))
  found = run(tmp_path / "out", "text", clip.tokenizer(texts).astype(np.int64))
  np.testing.assert_allclose(found, clip.encode_text(texts), rtol=0, atol=1e-5)
  (note,) = write(random_weights(OTHERS["RegNet"]), tmp_path / "other", "onnx")
  assert note.startswith("omitted: a tokenizer; these weights have 100 tokens and end texts with id 99")


def test_without_the_extra_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(ModuleNotFoundError, match=r"^onnx is not installed: pip install .*\[onnx\]'?$") as error:
    write(random_weights(OTHERS["bias of texts"]), tmp_path / "out", "onnx")
  assert extras.install_command("onnx") in str(error.value)
  assert not (tmp_path / "out").exists()


def test_an_unknown_primitive_is_named() -> None:
  pytest.importorskip("onnx")
  interface = onnx_graph.Interface("x", "y", (4,), np.float32)
  with pytest.raises(ValueError, match="the primitive 'sin' of JAX has no translation"):
    to_onnx(lambda params, x: jnp.sin(x) * params, np.float32(2), interface)


def test_a_loop_with_outputs_of_each_step_is_rejected() -> None:
  pytest.importorskip("onnx")

  def stacked(layers: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, layer: (carry + layer[None], carry), x, layers)[1]

  interface = onnx_graph.Interface("x", "y", (4,), np.float32)
  with pytest.raises(ValueError, match="a loop that returns outputs of each step has no translation"):
    to_onnx(stacked, np.ones((3, 4), np.float32), interface)


def test_nothing_is_written_unless_both_towers_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  pytest.importorskip("onnx")
  calls = iter([unit_norm, jnp.sin])  # of images, then of texts
  monkeypatch.setattr(write_lib, "unit_norm", lambda x: next(calls)(x))
  with pytest.raises(ValueError, match="the primitive 'sin' of JAX has no translation"):
    write(random_weights(OTHERS["bias of texts"]), tmp_path / "out", "onnx")
  assert not (tmp_path / "out").exists()
