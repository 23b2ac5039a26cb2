"""Tests of recognising architectures from names and shapes, of config files, and of errors for what does not match."""

from collections.abc import Callable
import functools
import json
import operator
import os
from pathlib import Path
import pickle
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references as reference
import safetensors.numpy
from tiers import slow_except
from tiny import tiny_config
import torch_files
from torch_files import dictionary, plain, tensor, write_zip

import declip_jax
from declip_jax import config
from declip_jax.architectures import ARCHITECTURES, IMAGENET_MEAN
from declip_jax.models.positions import resize_positions
from declip_jax.weights import dialects
from declip_jax.weights.layout import abstract_variables, expected_shapes, layout
from declip_jax.weights.read import Weights, from_state_dict, parse_step, read
from declip_jax.weights.recognise import recognise
from declip_jax.weights.settings import parse_settings
from declip_jax.weights.write import write

HEADS = {"clip": ("joint",), "slip": ("joint", "simclr"), "declip": ("joint", "simsiam", "mlm")}


def shapes_of(name: str, method: str) -> tuple[config.ConfigDict, dict[str, np.ndarray]]:
  """The config of a published model, and arrays of its shapes without memory, under OpenAI's names."""
  c = config.default(method, name)
  _, variables = abstract_variables(c.model.to_dict(), HEADS[method], c.data.image_size)
  shapes = expected_shapes(variables, layout(c.model.to_dict(), HEADS[method]))
  return c, {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


# Architectures and methods of the fast tier.
REPRESENTATIVES = (("DeCLIP ViT-B/32", "declip"),)


def _from_config_file(name: str, c: config.ConfigDict) -> dict[str, Any]:
  """The settings of released weights that no tensor tells, and the config file beside them does."""
  if not name.startswith(("CLIPA", "MetaCLIP", "ViT-bigG", "ViT-e")):
    return {}
  fields = {"image": ("heads", "pooling"), "text": ("heads", "causal", "pooling", "eot")}
  return {f"{tower}.{field}": c.model[tower][field] for tower, names in fields.items() for field in names}


@pytest.mark.parametrize(
  ("name", "method"),
  [
    pytest.param(name, method, marks=() if (name, method) in REPRESENTATIVES else pytest.mark.slow)
    for name in ARCHITECTURES
    if "RegNet" not in name and not name.startswith("SigLIP")  # whose files have other tensors: siglip_test.py
    for method in HEADS
  ],
)
def test_published_architectures_are_recognised(name: str, method: str) -> None:
  c, tensors = shapes_of(name, method)
  dialect = "SLIP" if name.startswith("SLIP") else "DeCLIP" if method == "declip" else "OpenAI"
  theirs = dialects.from_openai(tensors, dialect)
  assert dialects.recognise(theirs) == dialect
  given = {"text.activation": c.model.text.activation} | _from_config_file(name, c)
  found = recognise(dialects.to_openai(theirs, dialect), dialect, "torch", {}, given)
  if c.model.image.get("activation") == "gelu" and method == "declip":  # DeCLIP has none with GELU
    found.model["image"]["activation"] = found.model["text"]["activation"] = "gelu"
  if name == "ViT-Nano/8@32px":  # which has heads of 32 channels
    found.model["image"]["heads"], found.model["text"]["heads"] = c.model.image.heads, c.model.text.heads
  for tower, field in (setting.split(".") for setting in given):  # as `read` sets them
    found.model[tower][field] = given[f"{tower}.{field}"]
  found.model["text"]["tokenizer"] = c.model.text.tokenizer  # a file beside the weights
  if "initializer" in found.model["image"]:
    found.model["image"]["initializer"] = c.model.image.initializer
  for part in ("image", "text"):
    ours = {key: value for key, value in c.model[part].items() if value is not None}
    assert {key: value for key, value in found.model[part].items() if value is not None} == ours
  assert found.model["heads"]["embed_dim"] == c.model.heads.embed_dim
  assert (found.image_size, tuple(found.heads)) == (c.data.image_size, HEADS[method])
  imagenet = dialect != "OpenAI"
  assert (found.model["mean"] == IMAGENET_MEAN, found.interpolation == "bilinear") == (
    imagenet,
    imagenet,
  )


WRAPPERS = ("module.", "model.", "clip_model.", "module._orig_mod.", "net.clip.")


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_one_model_below_a_prefix_is_read(prefix: str, openai: dict[str, np.ndarray]) -> None:
  tensors = {f"{prefix}{key}": value for key, value in openai.items()}
  others = {"classifier.weight": np.ones(3), "ema.visual.conv1.weight": np.ones(2)}
  for beside in ({}, others):
    found = from_state_dict(tensors | beside, reference.TOLD)
    np.testing.assert_array_equal(found.params["heads"]["image_projection"]["kernel"], openai["visual.proj"])
    assert any("not read: classifier.weight, ema.visual" in remark for remark in found.remarks) == bool(beside)
  with pytest.raises(ValueError, match=r"has several models, .*teacher\."):
    from_state_dict(tensors | {f"teacher.{key}": value for key, value in openai.items()})


def test_modules_that_are_compiled_or_sharded_on_their_own_are_read(openai: dict[str, np.ndarray]) -> None:
  names = {
    key: key.replace("visual.", "visual._orig_mod.").replace("ln_final.", "_fsdp_wrapped_module.ln_final.")
    for key in openai
  }
  found = from_state_dict({names[key]: value for key, value in openai.items()}, reference.TOLD)
  assert set(found.rest) == set()
  with pytest.raises(ValueError, match="two tensors have the same name"):
    from_state_dict({"visual._orig_mod.conv1.weight": np.ones(1), "visual.conv1.weight": np.ones(1)})


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_weights_are_floating_point_numbers(dtype: type, openai: dict[str, np.ndarray]) -> None:
  tensors = openai | {"ln_final.bias": np.ones(openai["ln_final.bias"].shape).astype(dtype)}
  with pytest.raises(ValueError, match=rf"ln_final.bias {np.dtype(dtype).name}: should be one of float16, float32"):
    from_state_dict(tensors)
  tensors = openai | {"ln_final.bias": openai["ln_final.bias"].astype(ml_dtypes.bfloat16)}
  found = from_state_dict(tensors, reference.TOLD)
  assert found.params["towers"]["text"]["final_norm"]["bias"].dtype == np.float32


def test_an_error_about_many_tensors_is_one_line(openai: dict[str, np.ndarray]) -> None:
  with pytest.raises(ValueError, match=r"decoder.0 .*and \d\d more$") as error:
    from_state_dict(openai | {f"decoder.{index}": np.ones(1) for index in range(100)})
  assert len(str(error.value)) <= 300
  assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def openai() -> dict[str, np.ndarray]:
  """The state dict of a tiny model."""
  return reference.below(reference.load("openai_vit"), "sd/")


@pytest.mark.slow
def test_prefixes_of_wrappers_are_dropped(openai: dict[str, np.ndarray], tmp_path: Path) -> None:
  file = tmp_path / "compiled.safetensors"
  safetensors.numpy.save_file({f"_orig_mod.module.{key}": value for key, value in openai.items()}, file)
  given = {"text.activation": "gelu", "text.eot": 127}
  found = read(file, given)
  np.testing.assert_array_equal(
    found.params["heads"]["image_projection"]["kernel"], openai["visual.proj"].astype(np.float32)
  )
  assert found.model["image"]["activation"] == "gelu"
  (remark,) = found.remarks
  guesses = ("image.activation='gelu'", "image.heads=1", "image.epsilon=1e-05", "text.heads=2", "squash=False")
  for guess in guesses:
    assert guess in remark
  assert "--settings=image.activation=gelu" in remark
  assert not [field for field in ("text.activation", "text.eot") if field in remark]  # which were given
  assert "guesses, as are image.pooling='token', text.causal=True, text.pooling='eot'. If" in remark
  given |= {"image.activation": "gelu", "image.heads": 2, "image.epsilon": 1e-5, "text.heads": 4}
  given |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "squash": True}
  (remark,) = read(file, given | {"text.pooling": "eot", "text.causal": True, "image.pooling": "token"}).remarks
  assert "does not specify interpolation='bicubic': these are guesses. If" in remark
  assert read(file, given | {"interpolation": "bicubic"}).remarks == ()


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "ema", "my_model"])
def test_a_training_file_of_anybody_is_read_once_the_activation_is_given(
  key: str, openai: dict[str, np.ndarray], tmp_path: Path
) -> None:
  content, storages = torch_files.state_dict(openai)
  others = {"epoch": plain(3), "optimizer": dictionary(state=dictionary(w=tensor(key="w")))}
  file = tmp_path / "x.pt"
  entries = {f"data/{name}": data for name, data in storages.items()}
  write_zip(file, dictionary(**{key: content}, **others), **entries)
  found = read(file, reference.TOLD)
  np.testing.assert_array_equal(found.params["heads"]["image_projection"]["kernel"], openai["visual.proj"])
  assert len(found.remarks) == 1
  with pytest.raises(ValueError, match=r"x.pt .*text.activation \('quick_gelu' .*, text.eot"):
    read(file)
  if key != "ema":
    write_zip(file, dictionary(**{key: content}, model_ema=content, **others), **entries)
    assert read(file, reference.TOLD).remarks[1:] == ("other state dicts of the file, which were not read: model_ema",)


@pytest.mark.parametrize("form", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_every_form_of_the_weights_of_transformers_is_read_with_its_configs(form: str, tmp_path: Path) -> None:
  truth = from_state_dict(reference.below(reference.load("hf_clip"), "sd/"), reference.TOLD | {"image.heads": 4})
  write(truth, tmp_path, "huggingface")
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  (tmp_path / "model.safetensors").unlink()
  count = 2 if form.endswith("json") else 1
  files = {}
  for index in range(count):
    part = {name: tensors[name] for name in sorted(tensors)[index::count]}
    file = tmp_path / (f"part-{index}.bin" if count > 1 and "bin" in form else f"part-{index}.safetensors")
    if "bin" in form:
      content, storages = torch_files.state_dict(part)
      file = tmp_path / form if count == 1 else file
      write_zip(file, content, **{f"data/{name}": data for name, data in storages.items()})
    else:
      safetensors.numpy.save_file(part, file)
    files |= dict.fromkeys(part, file.name)
  if count > 1:
    (tmp_path / form).write_text(json.dumps({"weight_map": files}))
  for path in (tmp_path, tmp_path / form):
    found = read(path)
    assert (found.model, found.view, found.remarks) == (truth.model, truth.view, ())
    jax.tree.map(np.testing.assert_array_equal, found.params, truth.params)


def test_half_precision_is_openai(openai: dict[str, np.ndarray]) -> None:
  halves = {key: value.astype(np.float16) for key, value in openai.items()}
  extra = {"input_resolution": np.int64(32), "context_length": np.int64(16), "vocab_size": np.int64(128)}
  found = from_state_dict(halves | extra, kind="safetensors")
  assert (found.model["image"]["activation"], found.remarks) == ("quick_gelu", ())
  assert found.params["heads"]["image_projection"]["kernel"].dtype == np.float32
  assert set(found.rest) == set(extra)


# Models of DeCLIP's repository: additional arrays of the fixture, their heads, whether they compare tokens.
_SIMSIAM, _TOKENS = ("projector", "predictor"), ("image_mapping", "text_mapping", "logit_scale_dense")
RELEASED = {
  "clip": ((*_SIMSIAM, "text_label_predictor", *_TOKENS), ("joint",), False),
  "declip": (_TOKENS, ("joint", "simsiam", "mlm"), False),
  "filip": (_SIMSIAM, ("joint", "mlm", "filip"), True),
  "defilip": ((), ("joint", "simsiam", "mlm", "filip"), False),
}


@pytest.mark.parametrize("method", slow_except(("declip",), RELEASED))
def test_heads_of_released_models_are_read(method: str) -> None:
  lacks, heads, tokens = RELEASED[method]
  sd = reference.below(reference.load("declip"), "sd/")
  sd = {name: x for name, x in sd.items() if name.partition(".")[0] not in lacks}
  found = from_state_dict(sd, {"image.heads": 2, "text.heads": 3})
  assert (found.heads, found.tokens, found.remarks) == (heads, tokens, ())
  assert all("num_batches_tracked" in name for name in found.rest)
  if "filip" in heads:
    ours = found.params["heads"]
    np.testing.assert_array_equal(ours["text_mapping"]["kernel"], sd["text_mapping.weight"].T)
    np.testing.assert_array_equal(ours["image_mapping"]["bias"], sd["image_mapping.bias"])
    np.testing.assert_array_equal(ours["dense_logit_scale"], sd["logit_scale_dense"].reshape(()))
    assert found.model["heads"]["dense_dim"] == len(sd["image_mapping.bias"])
    del sd["text_mapping.bias"]
    with pytest.raises(ValueError, match=r"text_mapping.bias \(\d+,\): missing"):
      from_state_dict(sd, {"image.heads": 2, "text.heads": 3})


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_of_the_logits_is_read(shape: tuple[int, ...], openai: dict[str, np.ndarray]) -> None:
  found = from_state_dict(openai | {"logit_bias": np.full(shape, -10, np.float32)}, reference.TOLD)
  assert found.heads == ("joint", "sigmoid")
  assert (found.params["heads"]["logit_bias"].shape, float(found.params["heads"]["logit_bias"])) == ((), -10)
  assert (dict(found.rest), from_state_dict(openai, reference.TOLD).heads) == ({}, ("joint",))


# Others are only read, or have tensors that OpenAI's model does not have.
THERE_AND_BACK = (
  "Hugging Face",
  "DeCLIP",
  "DeCLIP's SLIP",
  "open_clip, timm trunk",
  "open_clip, separate text",
  "SLIP",
)


@pytest.mark.parametrize("dialect", THERE_AND_BACK)
def test_every_dialect_translates_there_and_back(openai: dict[str, np.ndarray], dialect: str) -> None:
  tensors = dict(openai)
  if "timm" in dialect or dialect == "SLIP":  # which have no norm before the blocks, and a bias
    tensors = {key: value for key, value in tensors.items() if "ln_pre" not in key}
    tensors["visual.conv1.bias"] = tensors["visual.ln_post.bias"]
  theirs = dialects.from_openai(tensors, dialect)
  assert dialects.recognise(theirs) == dialect
  assert len(theirs.keys() - tensors.keys()) > 5
  back = dialects.to_openai(theirs, dialect)
  assert back.keys() == tensors.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


class Evil:
  """Unpickled, it would create a file."""

  def __init__(self, marker: Path):
    self.marker = marker

  def __reduce__(self) -> tuple:
    return os.mkdir, (str(self.marker),)


def test_hostile_and_broken_files_are_clear_errors(openai: dict[str, np.ndarray], tmp_path: Path) -> None:
  marker = tmp_path / "harmed"
  files = {name: tmp_path / name for name in ("evil.pt", "evil_zip.pt", "empty.pt", "cut.pt", "resnet18.safetensors")}
  files["evil.pt"].write_bytes(pickle.dumps(Evil(marker)))
  with zipfile.ZipFile(files["evil_zip.pt"], "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Evil(marker)}))
    archive.writestr("archive/version", "3\n")
  files["empty.pt"].touch()
  whole = Path(__file__).parent.parent / "fixtures" / "weights" / "training.pt"
  files["cut.pt"].write_bytes(whole.read_bytes()[:-200])
  safetensors.numpy.save_file(
    {"conv1.weight": np.zeros((8, 3, 7, 7)), "fc.bias": np.zeros(10)}, files["resnet18.safetensors"]
  )
  messages = {
    "evil.pt": "evil.pt",
    "evil_zip.pt": "mkdir",
    "empty.pt": "0 bytes",
    "cut.pt": "cut.pt",
    "resnet18.safetensors": "resnet18.*CLIP, SLIP or DeCLIP.* conv1.weight, fc.bias",
  }
  for name, message in messages.items():
    with pytest.raises(ValueError, match=message):
      declip_jax.load(files[name])
  assert not marker.exists()
  with pytest.raises(FileNotFoundError, match="nowhere"):
    declip_jax.load(tmp_path / "nowhere")
  (tmp_path / "folder").mkdir()
  with pytest.raises(FileNotFoundError, match="has no weights"):
    declip_jax.load(tmp_path / "folder")


def test_tensors_that_do_not_match_are_named(openai: dict[str, np.ndarray]) -> None:
  tensors = dict(openai)
  del tensors["visual.ln_post.bias"]
  tensors["ln_final.weight"] = np.ones(7)
  tensors["decoder.weight"] = np.ones((2, 3))
  with pytest.raises(ValueError, match=r"x.pt \(OpenAI\)") as error:
    from_state_dict(tensors, name="x.pt")
  wrong = (
    "visual.ln_post.bias (64,): missing",
    "ln_final.weight (7,): should be (128,)",
    "decoder.weight (2, 3): unknown",
  )
  assert all(text in str(error.value) for text in wrong)
  with pytest.raises(ValueError, match="'image.head'.*image.heads"):
    from_state_dict(openai, reference.TOLD | {"image.head": 2})
  with pytest.raises(ValueError, match="cannot recognise"):
    from_state_dict({"visual.conv1.weight": np.zeros(4)})


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("vision_cfg.attentional_pool", True, "pool_width=0: expected a multiple of 8"),
    ("text_cfg.embed_cls", True, "cls_emb .*: missing"),
    ("text_cfg.pool_type", "first", "text_cfg.pool_type='first' is not supported"),
  ],
)
def test_open_clip_configs_of_other_models_are_rejected(
  field: str, value: object, message: str, tmp_path: Path
) -> None:
  write(
    from_state_dict(reference.below(reference.load("openai_vit"), "sd/"), reference.TOLD), tmp_path / "out", "open_clip"
  )
  file = tmp_path / "out" / "open_clip_config.json"
  about = json.loads(file.read_text())
  part, name = field.split(".")
  about["model_cfg"][part][name] = value
  file.write_text(json.dumps(about))
  with pytest.raises(ValueError, match=message):
    read(tmp_path / "out")


AUTOMATIC = "2026_01_31-00_00_00-model_{}-lr_0.0005-b_512-j_4-p_amp"  # as open_clip names a run


@pytest.mark.parametrize(
  ("dialect", "extras", "half", "activation"),
  [
    ("OpenAI", {"epoch": 32, "name": AUTOMATIC.format("ViT-B-32")}, False, "gelu"),
    ("OpenAI", {"epoch": 32, "name": AUTOMATIC.format("ViT-B-32-quickgelu")}, False, "quick_gelu"),
    ("OpenAI", {"epoch": 32, "name": "ViT-B-32-quickgelu"}, False, "quick_gelu"),
    ("OpenAI", {"epoch": 32, "name": "my-run"}, False, None),  # of a model with either
    ("OpenAI", {"epoch": 5}, False, None),  # OpenAI's or open_clip's model, trained further
    ("OpenAI", {}, False, None),
    ("OpenAI", {}, True, "quick_gelu"),  # OpenAI's, as they load on a GPU
    ("OpenAI", {"epoch": 32, "name": "my-run"}, True, None),
    ("open_clip, separate text", {}, True, None),
    ("open_clip, separate text", {"epoch": 1, "name": "ViT-B-32-quickgelu"}, False, "quick_gelu"),
    ("open_clip, timm trunk", {}, False, "gelu"),
    ("Hugging Face", {}, False, None),  # without its config
    ("SLIP", {}, False, "quick_gelu"),
    ("DeCLIP", {}, False, "quick_gelu"),
  ],
)
def test_activations(
  dialect: str, extras: dict, half: bool, activation: str | None, openai: dict[str, np.ndarray]
) -> None:
  """What the file tells is a remark, except in formats of one architecture; otherwise, the user has to say."""
  if dialect in ("SLIP", "open_clip, timm trunk"):
    openai = {key: value for key, value in openai.items() if "ln_pre" not in key}
    openai["visual.conv1.bias"] = openai["visual.ln_post.bias"]
  if half:
    openai = {key: value.astype(np.float16) for key, value in openai.items()}
  tensors, given = dialects.from_openai(openai, dialect), {"text.eot": 127}
  if activation is None:
    with pytest.raises(ValueError, match=r"x.pt .* text.activation \('quick_gelu' .*'gelu'.*--settings=text.act"):
      from_state_dict(tensors, given, extras=extras, name="x.pt")
    for field in ("text.activation", "image.activation"):  # either is enough
      found = from_state_dict(tensors, given | {field: "gelu"}, extras=extras)
      assert (found.model["image"]["activation"], found.model["text"]["activation"]) == ("gelu", "gelu")
      (remark,) = found.remarks
      assert {"image.activation='gelu'" in remark, "text.activation='gelu'" in remark} == {True, False}
    return
  found = from_state_dict(tensors, given, extras=extras)
  timm = dialect in ("SLIP", "open_clip, timm trunk")
  assert found.model["text"]["activation"] == activation
  assert found.model["image"]["activation"] == ("gelu" if timm else activation)
  told_by_format = dialect in ("SLIP", "DeCLIP")
  assert any("text.activation" in remark for remark in found.remarks) != told_by_format
  if told_by_format:  # which is not that of the image tower
    found = from_state_dict(tensors, given | {"image.activation": "gelu"}, extras=extras)
    assert found.model["text"]["activation"] == "quick_gelu"


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({}, "text.eot"),  # a vocabulary of 128 tokens may end texts with any of them
    ({"visual.ln_pre.weight": None, "visual.ln_pre.bias": None}, "image.pooling"),  # may be pooled by its mean
  ],
)
def test_a_field_with_several_likely_values_has_to_be_given(
  change: dict, field: str, openai: dict[str, np.ndarray]
) -> None:
  tensors = {key: value for key, value in openai.items() if key not in change}
  given = reference.TOLD | {"image.pooling": "token"}
  assert from_state_dict(tensors, given).model["text"]["eot"] == 127
  del given[field]
  with pytest.raises(ValueError, match=rf"x.pt .*{field}.*--settings={field}") as error:
    from_state_dict(tensors, given, extras={"epoch": 1, "name": "my-run"}, name="x.pt")
  assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
  ("family", "tensors"),
  [
    ("Perception Encoder", ("visual.trunk.attn_pool.latent", "visual.trunk.norm_pre.weight")),
    ("LiT", ("img/cls", "img/embedding/kernel")),
    ("CoCa", ("text_decoder.cross_attn.0.ln_1.weight",)),
    ("EVA-CLIP", ("visual.trunk.cls_token", "visual.trunk.blocks.0.attn.q_bias")),
    ("ConvNeXt", ("visual.trunk.stages.0.blocks.0.conv_dw.weight",)),
    ("ViTamin", ("visual.trunk.patch_embed.backbone.stem.conv1.weight", "visual.trunk.blocks.0.mlp.w1.weight")),
    ("MobileCLIP", ("visual.trunk.stages.0.blocks.0.token_mixer.mixer.conv_kxk.0.conv.weight",)),
    ("another image tower of timm", ("visual.trunk.cls_token", "visual.trunk.head.weight")),
    ("RoBERTa", ("visual.conv1.weight", "text.transformer.embeddings.word_embeddings.weight")),
    ("layer scale", ("visual.conv1.weight", "visual.transformer.resblocks.0.ls_1.gamma")),
    ("Chinese-CLIP", ("vision_model.embeddings.class_embedding", "text_model.embeddings.word_embeddings.weight")),
  ],
)
def test_a_refused_model_is_named_by_its_family(family: str, tensors: tuple[str, ...]) -> None:
  tensors = {
    name: np.zeros(3, np.float32) for name in (*tensors, *(f"text.transformer.resblocks.{i}.x" for i in range(99)))
  }
  with pytest.raises(ValueError, match=rf"x.pt: .*{family}.* is not supported") as error:
    from_state_dict(tensors, name="x.pt")
  assert len(str(error.value)) <= 300


def test_a_timm_trunk_may_have_a_separate_text_tower_and_a_vector_temperature(
  openai: dict[str, np.ndarray],
) -> None:
  tensors = {key: value for key, value in openai.items() if "ln_pre" not in key}
  tensors |= {"visual.conv1.bias": tensors["visual.ln_post.bias"], "logit_scale": openai["logit_scale"].reshape(1)}
  trunk = dialects.from_openai(tensors, "open_clip, timm trunk")
  separate = {f"text.{key}" if not key.startswith(("visual.", "logit")) else key: x for key, x in trunk.items()}
  found, expected = (from_state_dict(x, {"text.eot": 127}) for x in (separate, trunk))
  assert found.params["heads"]["logit_scale"].shape == ()
  np.testing.assert_array_equal(
    found.params["towers"]["text"]["final_norm"]["scale"], expected.params["towers"]["text"]["final_norm"]["scale"]
  )


def test_guesses_warn_and_other_vocabularies_take_ids_only(openai: dict[str, np.ndarray], tmp_path: Path) -> None:
  safetensors.numpy.save_file(openai, tmp_path / "bare.safetensors")
  with pytest.warns(UserWarning, match=r"bare.safetensors: .*activation"):
    clip = declip_jax.load(tmp_path / "bare.safetensors", reference.TOLD)
  with pytest.raises(ValueError, match="128 tokens .* 127.* tokenizer has 49408 .*text_features"):
    clip.encode_text(["a dog"])
  assert np.isfinite(clip.text_features(np.array([[126, 5, 127]]))).all()


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"remat": "all"}, r"config.model.remat='all': choose one of \['dots', 'full', 'narrow_dots', 'none'\]"),
    ({"image.activation": "relu"}, r"image.activation='relu': choose one of \['gelu', 'gelu_tanh', 'quick_gelu'\]"),
    ({"image.heads": "two"}, "image.heads='two': expected a value like 1"),
    ({"image.heads": True}, "image.heads=True: expected a value like 1"),
    ({"image.heads": None}, "image.heads=None: expected"),
    ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\): expected three numbers"),
    ({"std": (0.5, 0.5, 0)}, r"std=\(0.5, 0.5, 0\): expected three numbers"),
    ({"dtype": "bf16"}, r"config.model.dtype='bf16': choose one of \['bfloat16', 'float16', 'float32'\]"),
    ({"image_size": 20}, "image_size=20: expected a multiple of 8"),
    ({"image_size": 0}, "image_size=0: expected a multiple"),
    ({"image_size": 32, "image.patch": 0}, "image.patch=0: expected 1 or more|not a possible model"),
    (
      {"image_size": 32, "image.kind": "swin"},
      r"image.kind='swin': choose one of \['convnext', 'regnet', 'resnet', 'vit'\]",
    ),
    ({"mean": ("a", 0, 0)}, r"mean=\('a', 0, 0\): expected three numbers"),
    ({"text.eot": 128}, "text.eot=128: expected an id of the 128 tokens"),
    ({"interpolation": "lanczos"}, r"interpolation='lanczos': choose one of \['bilinear', 'bicubic'\]"),
    ({"resize": 20}, "resize=20: expected 0, or at least 32 pixels"),
    ({"resize": 40, "squash": True}, "resize=40: expected 0"),
    ({"text.context_length": 17}, "text.context_length=17: expected 2 to 16, the trained positions"),
    ({"image.width": 128}, r"visual\.\w+ .*: should be"),
    ({"text.heads": 3}, r"config.model.text.heads=3 does not divide config.model.text.width=128"),
  ],
)
def test_impossible_models_are_rejected(setting: dict, message: str, openai: dict[str, np.ndarray]) -> None:
  with pytest.raises(ValueError, match=message):
    from_state_dict(openai, reference.TOLD | setting)


@pytest.mark.parametrize(("vocab_size", "eot"), [(49408, 49407), (49409, 49407), (128, 127)])
def test_texts_end_with_openais_id_or_the_largest(vocab_size: int, eot: int, openai: dict[str, np.ndarray]) -> None:
  embedding = np.zeros((vocab_size, openai["token_embedding.weight"].shape[1]), np.float32)
  tensors, given = openai | {"token_embedding.weight": embedding}, {"text.activation": "gelu"}
  if eot != 49407:
    given["text.eot"] = eot
  assert from_state_dict(tensors, given).model["text"]["eot"] == eot


def test_the_largest_id_ends_texts_where_hugging_face_says_2(tmp_path: Path) -> None:
  """An old mistake of their configs: eos_token_id=2 means the largest id; any other id means itself."""
  write(
    from_state_dict(
      reference.below(reference.load("hf_clip"), "sd/"), reference.TOLD | {"image.heads": 4, "text.heads": 2}
    ),
    tmp_path,
    "huggingface",
  )
  file = tmp_path / "config.json"
  about = json.loads(file.read_text())
  size = about["text_config"]["vocab_size"]
  for written, expected in ((2, size - 1), (3, 3), (size - 1, size - 1)):
    about["text_config"]["eos_token_id"] = written
    file.write_text(json.dumps(about))
    assert read(tmp_path).model["text"]["eot"] == expected


def test_what_a_config_describes_is_not_assumed(tmp_path: Path) -> None:
  sd = reference.below(reference.load("openai_vit"), "sd/")
  for format in ("open_clip", "huggingface"):
    write(from_state_dict(sd, reference.TOLD | {"squash": True}), tmp_path / format, format)
    found = read(tmp_path / format)
    assert (found.remarks, found.view.squash) == ((), True)


@pytest.mark.parametrize("name", ["openai_vit", pytest.param("openai_resnet", marks=pytest.mark.slow)])
def test_another_resolution_resizes_positions_and_a_shorter_context_cuts_them(name: str, tmp_path: Path) -> None:
  tensors = reference.below(reference.load(name), "sd/")
  native = from_state_dict(tensors, reference.TOLD)
  write(native, tmp_path / "export", "orbax")
  path = ("attention_pool", "position_embedding") if name == "openai_resnet" else ("position_embedding",)

  def positions(weights: Weights) -> np.ndarray:
    return functools.reduce(operator.getitem, path, weights.params["towers"]["image"])

  size, length = 2 * native.view.size, native.model["text"]["context_length"] - 3
  settings = {"image_size": size, "text.context_length": length, "resize": size + 8}
  for found in (from_state_dict(tensors, reference.TOLD | settings), read(tmp_path / "export", settings)):
    assert (found.view.size, found.view.resize, found.model["text"]["context_length"]) == (size, size + 8, length)
    count = len(positions(native))
    expected = resize_positions(jnp.asarray(positions(native)), 4 * (count - 1) + 1)
    np.testing.assert_array_equal(positions(found), expected)
    np.testing.assert_array_equal(
      found.params["towers"]["text"]["position_embedding"],
      native.params["towers"]["text"]["position_embedding"][:length],
    )
    assert any(f"resized from {count} to {4 * (count - 1) + 1} positions" in remark for remark in found.remarks)
  with pytest.raises(ValueError, match=r"need other weights: heads/image_projection/\w+ is \(.*\), not \(.*\)"):
    read(tmp_path / "export", {"heads.embed_dim": 7})


@pytest.mark.slow
def test_one_checkpoint_of_a_run_is_read_by_its_step_or_path(save_run: Callable[..., Path], tmp_path: Path) -> None:
  c = tiny_config("clip")
  c.checkpoint.best_metric = "eval/heldout/top1"
  workdir = save_run(c)
  for checkpoint in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "3"):
    assert read(checkpoint).step == 3
  assert read(workdir, step=3).step == 3
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4; its checkpoints are of steps \[3\]"):
    read(workdir, step=4)
  with pytest.raises(ValueError, match=r"none of the steps \[3\] was evaluated by eval/heldout/top1"):
    read(workdir, step="best")
  (workdir / "checkpoints" / "3" / "scores.json").write_text('{"eval/heldout/top1": 0.5}')
  for found in (read(workdir, step="best"), read(workdir / "checkpoints" / "best")):
    assert found.step == 3
  with pytest.raises(ValueError, match="is a checkpoint of a run, so step=3 does not apply"):
    read(workdir / "checkpoints" / "3", step=3)
  with pytest.raises(ValueError, match="has no best checkpoint, since its config.checkpoint.best_metric is ''"):
    read(save_run(tiny_config("clip")), step="best")
  assert [parse_step(text) for text in (None, "7", "best")] == [None, 7, "best"]
  with pytest.raises(ValueError, match="--step=newest: expected the step of a checkpoint, or best"):
    parse_step("newest")


def test_settings_are_parsed() -> None:
  texts = ["image.heads=16", "image.activation=gelu", "mean=(0.5, 0.5, 0.5)", "squash=True"]
  expected = {"image.heads": 16, "image.activation": "gelu", "mean": (0.5, 0.5, 0.5), "squash": True}
  assert parse_settings(texts, "--settings") == expected
  with pytest.raises(ValueError, match="--settings: 'gelu' is not of the form"):
    parse_settings(["gelu"], "--settings")


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
  """An exported folder."""
  write(from_state_dict(reference.below(reference.load("hf_clip"), "sd/"), reference.TOLD), tmp_path, "huggingface")
  return tmp_path


@pytest.mark.slow
def test_added_tokens_do_not_move_the_end_where_hugging_face_says_2(hugging_face: Path) -> None:
  """Their old configs pool at the largest id of a text, which is OpenAI's end of text whatever was added after it."""
  tensors = safetensors.numpy.load_file(hugging_face / "model.safetensors")
  name = "text_model.embeddings.token_embedding.weight"
  tensors[name] = np.zeros((49410, tensors[name].shape[1]), np.float32)
  safetensors.numpy.save_file(tensors, hugging_face / "model.safetensors")
  about = json.loads((hugging_face / "config.json").read_text())
  about["text_config"] |= {"eos_token_id": 2, "vocab_size": 49410}
  (hugging_face / "config.json").write_text(json.dumps(about))
  found = read(hugging_face)
  assert (found.model["text"]["eot"], found.remarks) == (49407, ())


def test_exports_without_the_fields_that_were_added_since_are_read(tmp_path: Path) -> None:
  write(from_state_dict(reference.below(reference.load("openai_vit"), "sd/"), reference.TOLD), tmp_path, "orbax")
  whole, file = read(tmp_path), tmp_path / "weights.json"
  about = json.loads(file.read_text())
  del about["model"]["attention"], about["declip_jax"]
  added = {"image": ("pooling", "branch_norm"), "text": ("pooling", "causal"), "heads": ("image_linear", "text_linear")}
  for part, fields in added.items():
    for field in fields:
      del about["model"][part][field]
  file.write_text(json.dumps(about))
  assert read(tmp_path).model == whole.model


@pytest.mark.parametrize(
  "change", [{"model": 3}, {"heads": ["joints"]}, {"image_size": "x"}, {"interpolation": 3}, None]
)
def test_damaged_exports_are_value_errors(change: dict | None, tmp_path: Path) -> None:
  write(
    from_state_dict(reference.below(reference.load("openai_vit"), "sd/"), reference.TOLD), tmp_path / "out", "orbax"
  )
  file = tmp_path / "out" / "weights.json"
  if change is None:
    for array in (tmp_path / "out" / "arrays").rglob("*"):
      if array.is_file():
        array.write_bytes(array.read_bytes()[: len(array.read_bytes()) // 2])
  else:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(ValueError, match="is damaged|expected a value|choose one of"):
    read(tmp_path / "out", {"resize": 0})
