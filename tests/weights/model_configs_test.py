"""Tests of `declip_jax.weights.model_configs`: config files of open_clip and transformers as settings, or an error."""

import functools
import json
import operator
from pathlib import Path

import pytest

from declip_jax.weights.model_configs import settings_beside

# As transformers 5 writes it.
PROCESSOR = {
  "crop_size": {"height": 32, "width": 32},
  "do_center_crop": True,
  "do_convert_rgb": True,
  "do_normalize": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": [0.5, 0.25, 0.5],
  "image_processor_type": "CLIPImageProcessor",
  "image_std": [0.5, 0.5, 0.25],
  "resample": 2,
  "rescale_factor": 0.00392156862745098,
  "size": {"shortest_edge": 36},
}
VIEW = {"interpolation": "bilinear", "squash": False, "resize": 36, "mean": (0.5, 0.25, 0.5), "std": (0.5, 0.5, 0.25)}
CLIP = {"model_type": "clip", "text_config": {"eos_token_id": 49407}, "vision_config": {"image_size": 32}}
TOWERS = {
  "text.activation": "quick_gelu",
  "text.heads": 8,
  "text.eot": 49407,
  "image.activation": "quick_gelu",
  "image.heads": 12,
  "image.epsilon": 1e-5,
}


def settings(folder: Path, **configs: object) -> dict:
  """The settings of a folder of transformers with these config files."""
  for name, content in configs.items():
    (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
  return settings_beside(folder / "model.safetensors")


def test_the_processor_of_transformers_5_takes_precedence_over_older_ones(tmp_path: Path) -> None:
  assert settings(tmp_path, config=CLIP) == TOWERS
  older = PROCESSOR | {"resample": 3}
  assert settings(tmp_path, preprocessor_config=older) == TOWERS | VIEW | {"interpolation": "bicubic"}
  assert settings(tmp_path, processor_config={"image_processor": PROCESSOR}) == TOWERS | VIEW
  # Before version 5 the file had other things.
  found = settings(tmp_path, processor_config={"processor_class": "CLIPProcessor"})
  assert found == TOWERS | VIEW | {"interpolation": "bicubic"}


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, {"resize": 0, "squash": True}),
    ({"size": {"height": 32, "width": 32}}, {"resize": 0, "squash": True}),
    ({"size": 36, "crop_size": 32}, {}),
    ({"size": {"shortest_edge": 32}}, {"resize": 0}),
    ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    ({"resample": 1}, "resample=1 is not supported"),
    ({"do_resize": False}, "do_resize=False is not supported"),
    ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not supported"),
    ({"do_center_crop": False}, "do_center_crop=False is not supported"),
    ({"size": {"shortest_edge": 30}}, "size={'shortest_edge': 30} is not supported"),
    ({"size": {"longest_edge": 32}}, "size={'longest_edge': 32} is not supported"),
    ({"crop_size": {"height": 32, "width": 40}}, "images of 32 x 40 pixels do not fit vision_config.image_size=32"),
    ({"size": {"height": 40, "width": 32}}, "size={'height': 40, 'width': 32} is not supported"),
    ({"image_mean": [0.5, 0.5]}, r"image_mean=\[0.5, 0.5\]: expected three numbers"),
    ({"do_resize": "yes"}, "do_resize='yes': expected a value like True"),
  ],
)
def test_processors(change: dict, expected: dict | str, tmp_path: Path) -> None:
  configs = {"config": CLIP, "processor_config": {"image_processor": PROCESSOR | change}}
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=rf"processor_config.json: image_processor\.?.*{expected}"):
      settings(tmp_path, **configs)
    return
  assert settings(tmp_path, **configs) == TOWERS | VIEW | expected


@pytest.mark.parametrize(
  ("text", "eot"),
  [
    ({"eos_token_id": 5, "vocab_size": 128}, 5),
    # An old mistake: 2 means the largest id of a text, which is OpenAI's end of text whatever was added after it.
    ({"eos_token_id": 2, "vocab_size": 128}, 127),
    ({"eos_token_id": 2, "vocab_size": 49410}, 49407),
    ({"eos_token_id": 2}, 49407),
    ({}, 49407),
    ({"eos_token_id": None}, 49407),
  ],
)
def test_the_end_of_texts_of_hugging_face(text: dict, eot: int, tmp_path: Path) -> None:
  assert settings(tmp_path, config=CLIP | {"text_config": text})["text.eot"] == eot


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (CLIP | {"model_type": "siglip"}, "SigLIP is not supported.* model_type='siglip'"),
    (CLIP | {"model_type": "clip_vision_model"}, "one tower of CLIP is not supported"),
    (CLIP | {"model_type": "bert"}, "model_type='bert' is not supported, only 'clip'"),
    (CLIP | {"text_config": {"layer_norm_eps": 1e-6}}, "text_config.layer_norm_eps=1e-06 is not supported"),
    (CLIP | {"vision_config": []}, r"vision_config=\[\]: expected a value like {}"),
    (
      CLIP | {"text_config": {"num_attention_heads": "8"}},
      "text_config.num_attention_heads='8': expected a value like 8",
    ),
    ([CLIP], "contains list, expected an object"),
    ("[" * 100_000, "is not JSON"),
    ("\xff", "is not JSON"),
  ],
)
def test_bad_configs_of_hugging_face(config: object, message: str, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=rf"config.json.*{message}"):
    settings(tmp_path, config=config)


VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
OPEN_CLIP = {
  "model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": {"vocab_size": 128, "width": 64, "heads": 2}},
  "preprocess_cfg": {"mean": [0.5, 0.25, 0.5], "std": [0.5, 0.5, 0.25], "interpolation": "bicubic"},
}
FOUND = {
  "text.activation": "gelu",
  "text.heads": 2,
  "text.eot": 127,
  "image.activation": "gelu",
  "image.heads": 1,
  "image.epsilon": 1e-5,
  "image.pre_norm": True,
  "squash": False,
  "mean": (0.5, 0.25, 0.5),
  "std": (0.5, 0.5, 0.25),
  "interpolation": "bicubic",
}
TIMM = {"model_cfg.vision_cfg": {"image_size": 224, "timm_model_name": "vit_small_patch16_224", "timm_pool": "token"}}


def write_open_clip(folder: Path, change: dict) -> None:
  """Writes a config of open_clip with some fields changed, by their paths."""
  about = json.loads(json.dumps(OPEN_CLIP))
  for path, value in change.items():
    *above, last = path.split(".")
    functools.reduce(operator.getitem, above, about)[last] = value
  (folder / "open_clip_config.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({}, {}),
    ({"model_cfg.quick_gelu": True}, {"text.activation": "quick_gelu", "image.activation": "quick_gelu"}),
    ({"preprocess_cfg.resize_mode": "squash"}, {"squash": True}),
    ({"preprocess_cfg.resize_mode": "longest"}, "preprocess_cfg.resize_mode='longest' is not supported"),
    ({"preprocess_cfg.mean": 0.5}, "preprocess_cfg.mean=0.5: expected three numbers"),
    ({"model_cfg.text_cfg.pool_type": "eos", "model_cfg.text_cfg.eos_id": 5}, {"text.eot": 5}),
    ({"model_cfg.text_cfg.tokenizer_kwargs": {"clean": "canonicalize"}}, "text_cfg.tokenizer_kwargs=.* not supported"),
    ({"model_cfg.text_cfg.norm_kwargs": {"eps": 1e-6}}, "text_cfg.norm_kwargs.eps=1e-06 is not supported"),
    ({"model_cfg.vision_cfg.norm_kwargs": {"eps": 1e-6}}, {"image.epsilon": 1e-6}),
    ({"model_cfg.vision_cfg.norm_kwargs": {"elementwise_affine": True}}, r"norm_kwargs has \['elementwise_affine'\]"),
    ({"model_cfg.vision_cfg.head_width": 0}, "vision_cfg.head_width=0 is not supported"),
    ({"model_cfg.vision_cfg.head_width": 16}, {"image.heads": 4}),
    (
      {"model_cfg.vision_cfg.layers": [1, 1, 1, 1]},
      {f"image.{name}": None for name in ("activation", "heads", "epsilon", "pre_norm")},
    ),
    (
      {"model_cfg.vision_cfg.layers": [1, 1, 1, 1], "model_cfg.vision_cfg.head_width": 32},
      "head_width=32 is not .* 64",
    ),
    (TIMM, {"image.heads": 6, "image.epsilon": 1e-6, "image.pre_norm": None}),
    ({"model_cfg.vision_cfg.no_ln_pre": True}, {"image.pre_norm": False}),
    ({"model_cfg.vision_cfg.patch_dropout": 0.5}, {}),  # without effect after training
    (
      {"model_cfg.vision_cfg.timm_model_name": "xcit_nano_12_p16_224"},
      "timm is not supported.*='xcit_nano_12_p16_224'",
    ),
    ({"model_cfg.vision_cfg": []}, r"model_cfg.vision_cfg=\[\]: expected a value like {}"),
    ({"model_cfg.text_cfg.heads": "2"}, "text_cfg.heads='2': expected a value like 8"),
    ({"model_cfg.text_cfg.no_causal_mask": True}, "text_cfg.no_causal_mask=True is not supported"),
    ({"model_cfg": 3}, "model_cfg=3: expected a value like {}"),
  ],
)
def test_configs_of_open_clip(change: dict, expected: dict | str, tmp_path: Path) -> None:
  write_open_clip(tmp_path, change)
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=f"open_clip_config.json.*{expected}"):
      settings_beside(tmp_path / "open_clip_model.safetensors")
    return
  found = settings_beside(tmp_path / "open_clip_model.safetensors")
  assert found == {name: value for name, value in (FOUND | expected).items() if value is not None}


# Fields of configs of open_clip 3.3.
FAMILIES = {
  "SigLIP": {"vision_cfg.timm_model_name": "vit_base_patch16_siglip_224", "text_cfg.no_causal_mask": True},
  "Perception Encoder": {"vision_cfg.timm_model_name": "vit_pe_core_base_patch16_224"},
  "MobileCLIP": {"vision_cfg.timm_model_name": "fastvit_mci1", "vision_cfg.timm_drop_path": 0.1},
  "EVA-CLIP": {"vision_cfg.timm_model_name": "eva02_base_patch16_clip_224"},
  "ConvNeXt": {"vision_cfg.timm_drop_path": 0.1, "vision_cfg.timm_model_name": "convnext_base"},
  "ViTamin": {"vision_cfg.timm_drop_path": 0.1, "vision_cfg.timm_model_name": "vitamin_base_224"},
  "CoCa": {"vision_cfg.output_tokens": True, "multimodal_cfg": {"width": 512}},
  "xlm-roberta-base": {"text_cfg.hf_model_name": "xlm-roberta-base", "text_cfg.hf_pooler_type": "mean_pooler"},
  "CLIPA": {"vision_cfg.no_ln_pre": True, "vision_cfg.pool_type": "avg", "text_cfg.no_causal_mask": True},
  "MetaCLIP 2": {"text_cfg.hf_tokenizer_name": "facebook/xlm-v-base", "text_cfg.pool_type": "eos"},
  "layer scale": {"vision_cfg.ls_init_value": 1e-4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_open_clip_are_refused_by_the_family_of_their_model(family: str, tmp_path: Path) -> None:
  write_open_clip(tmp_path, {f"model_cfg.{path}": value for path, value in FAMILIES[family].items()})
  with pytest.raises(ValueError, match=f"open_clip_config.json: .*{family}.* is not supported") as error:
    settings_beside(tmp_path / "open_clip_model.safetensors")
  assert "timm_drop_path" not in str(error.value)
  assert len(str(error.value).removeprefix(str(tmp_path))) <= 300
