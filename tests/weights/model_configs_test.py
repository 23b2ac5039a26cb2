"""Tests of `declip_jax.weights.model_configs`: config files of open_clip and transformers as settings, or an error."""

import functools
import json
import operator
from pathlib import Path

import pytest

from declip_jax.architectures import OPENAI_MEAN, OPENAI_STD
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
  "text.epsilon": 1e-5,
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
    (CLIP | {"model_type": "siglip2"}, r"SigLIP 2 .*NaFlex\) is not supported.* model_type='siglip2'"),
    ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "vision_use_head=False is not supported"),
    (
      {"model_type": "clip_vision_model", "num_attention_heads": "8"},
      "num_attention_heads='8': expected a value like 12",
    ),
    (CLIP | {"model_type": "bert"}, "model_type='bert' is not supported, only 'clip', 'metaclip_2' and 'siglip'"),
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
  "text.epsilon": 1e-5,
  "text.causal": True,
  "text.pooling": "eot",
  "text.eot": 127,
  "image.activation": "gelu",
  "image.heads": 1,
  "image.epsilon": 1e-5,
  "image.pre_norm": True,
  "image.pooling": "token",
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
    ({"preprocess_cfg": {}}, {"mean": OPENAI_MEAN, "std": OPENAI_STD}),  # as in open_clip
    ({"preprocess_cfg.resize_mode": "longest"}, "preprocess_cfg.resize_mode='longest' is not supported"),
    ({"preprocess_cfg.mean": 0.5}, "preprocess_cfg.mean=0.5: expected three numbers"),
    ({"model_cfg.text_cfg.pool_type": "eos", "model_cfg.text_cfg.eos_id": 5}, {"text.eot": 5}),
    ({"model_cfg.text_cfg.tokenizer_kwargs": {"clean": "canonicalize"}}, "text_cfg.tokenizer_kwargs=.* not supported"),
    ({"model_cfg.text_cfg.norm_kwargs": {"eps": 1e-6}}, {"text.epsilon": 1e-6}),
    ({"model_cfg.text_cfg.act_kwargs": {"approximate": "tanh"}}, {"text.activation": "gelu_tanh"}),
    ({"model_cfg.vision_cfg.act_kwargs": {"approximate": "tan"}}, "vision_cfg.act_kwargs=.*'tan'.* is not supported"),
    ({"model_cfg.text_cfg.pool_type": "last"}, {"text.pooling": "last", "text.eot": 127}),
    ({"model_cfg.text_cfg.pool_type": "first"}, "text_cfg.pool_type='first' is not supported"),
    ({"model_cfg.vision_cfg.pool_type": "avg"}, "vision_cfg.pool_type='avg' is not supported, .* final_ln_after_pool"),
    (
      {"model_cfg.vision_cfg.pool_type": "avg", "model_cfg.vision_cfg.final_ln_after_pool": True},
      {"image.pooling": "average"},
    ),
    ({"model_cfg.vision_cfg.norm_kwargs": {"eps": 1e-6}}, {"image.epsilon": 1e-6}),
    ({"model_cfg.vision_cfg.norm_kwargs": {"elementwise_affine": True}}, r"norm_kwargs has \['elementwise_affine'\]"),
    ({"model_cfg.vision_cfg.head_width": 0}, "vision_cfg.head_width=0 is not supported"),
    ({"model_cfg.vision_cfg.head_width": 16}, {"image.heads": 4}),
    (
      {"model_cfg.vision_cfg.layers": [1, 1, 1, 1]},
      {f"image.{name}": None for name in ("activation", "heads", "epsilon", "pre_norm", "pooling")},
    ),
    (
      {"model_cfg.vision_cfg.layers": [1, 1, 1, 1], "model_cfg.vision_cfg.head_width": 32},
      "head_width=32 is not .* 64",
    ),
    (TIMM, {"image.heads": 6, "image.epsilon": 1e-6, "image.pre_norm": None, "image.pooling": None}),
    (
      {**TIMM, "model_cfg.vision_cfg.timm_pool": "map"},
      "vision_cfg.timm_pool='map' is not supported, only 'token' and ''",
    ),
    (
      {"model_cfg.vision_cfg.input_patchnorm": 3},
      "input_patchnorm=3 is not .* without effect: false, 0 or an empty text",
    ),
    ({"model_cfg.vision_cfg.no_ln_pre": True}, {"image.pre_norm": False}),
    ({"model_cfg.vision_cfg.patch_dropout": 0.5}, {}),  # without effect after training
    (
      {"model_cfg.vision_cfg.timm_model_name": "xcit_nano_12_p16_224"},
      "timm is not supported.*='xcit_nano_12_p16_224'",
    ),
    ({"model_cfg.vision_cfg": []}, r"model_cfg.vision_cfg=\[\]: expected a value like {}"),
    ({"model_cfg.text_cfg.heads": "2"}, "text_cfg.heads='2': expected a value like 8"),
    ({"model_cfg.text_cfg.no_causal_mask": True}, {"text.causal": False}),
    (
      {
        "model_cfg.vision_cfg": {
          "timm_model_name": "vit_base_patch8_siglip_224",
          "timm_pool": "map",
          "timm_proj": "none",
        }
      },
      "timm_model_name='vit_base_patch8_siglip_224' is not supported, only .*vit_base_patch16_siglip_224",
    ),
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
  "SigLIP without its pooling": {"vision_cfg.timm_model_name": "vit_base_patch16_siglip_gap_224"},
  "Perception Encoder": {"vision_cfg.timm_model_name": "vit_pe_core_base_patch16_224"},
  "MobileCLIP": {"vision_cfg.timm_model_name": "fastvit_mci1", "vision_cfg.timm_drop_path": 0.1},
  "EVA-CLIP": {"vision_cfg.timm_model_name": "eva02_base_patch16_clip_224"},
  "ConvNeXt": {"vision_cfg.timm_drop_path": 0.1, "vision_cfg.timm_model_name": "convnextv2_base"},
  "ViTamin": {"vision_cfg.timm_drop_path": 0.1, "vision_cfg.timm_model_name": "vitamin_base_224"},
  "CoCa": {"text_cfg.pad_id": 1, "multimodal_cfg": {"width": 512}},
  "xlm-roberta-base": {"text_cfg.hf_model_name": "xlm-roberta-base", "text_cfg.hf_pooler_type": "mean_pooler"},
  "layer scale": {"vision_cfg.ls_init_value": 1e-4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_open_clip_are_refused_by_the_family_of_their_model(family: str, tmp_path: Path) -> None:
  write_open_clip(tmp_path, {f"model_cfg.{path}": value for path, value in FAMILIES[family].items()})
  with pytest.raises(ValueError, match=f"open_clip_config.json: .*{family}.* is not supported") as error:
    settings_beside(tmp_path / "open_clip_model.safetensors")
  assert "timm_drop_path" not in str(error.value)
  assert len(str(error.value).removeprefix(str(tmp_path))) <= 300


# As in open_clip 3.3 and on the hub: SigLIP 2's So400m/16, CLIPA and MetaCLIP 2.
SIGLIP_TEXT = {"vocab_size": 256000, "hf_tokenizer_name": "timm/x", "tokenizer_kwargs": {"clean": "canonicalize"}}
SIGLIP_TEXT |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
SIGLIP_VISION = {"image_size": 384, "timm_model_name": "vit_so400m_patch16_siglip_384", "timm_model_pretrained": False}
SIGLIP_VISION |= {"timm_pool": "map", "timm_proj": "none"}
CLIPA_TEXT = {"vocab_size": 32000, "hf_tokenizer_name": "bert", "tokenizer_kwargs": {"strip_sep_token": True}}
CLIPA_TEXT |= {"no_causal_mask": True, "pool_type": "last"}
METACLIP_TEXT = {"vocab_size": 901629, "hf_tokenizer_name": "xlm", "pool_type": "eos", "eos_id": 2}
MT5_TEXT = {"vocab_size": 250112, "hf_tokenizer_name": "mt5", "pool_type": "eos", "eos_id": 1}
# What their tokenizers add to a text, as `tokenizer.json` says it.
T5_ENDS = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}]}
XLM_ENDS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, *T5_ENDS["single"]]}
BERT_ENDS = {"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}


@pytest.mark.parametrize(
  ("text", "vision", "expected", "ends", "options"),
  [
    (
      SIGLIP_TEXT | {"heads": 16, "act_kwargs": {"approximate": "tanh"}},
      SIGLIP_VISION,
      {"image_size": 384, "image.activation": "gelu_tanh", "image.heads": 16, "image.epsilon": 1e-6}
      | {"text.activation": "gelu_tanh", "text.heads": 16, "text.epsilon": 1e-6, "text.eot": 1}
      | {"text.causal": False, "text.pooling": "last"},
      T5_ENDS,
      "?pad=</s>&start=none&clean=repair,underscores,lower,no_punctuation,spaces",
    ),
    (
      SIGLIP_TEXT | {"heads": 12},
      SIGLIP_VISION | {"timm_model_name": "vit_base_patch16_siglip_384"},  # which timm computes with another GELU
      {"image.activation": "gelu", "image.heads": 12, "text.activation": "gelu"},
      T5_ENDS,
      "?pad=</s>&start=none&clean=repair,underscores,lower,no_punctuation,spaces",
    ),
    (
      CLIPA_TEXT,
      {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
      {"image.pooling": "average", "image.pre_norm": False, "text.eot": 0, "text.pooling": "last"},
      BERT_ENDS,
      "?pad=</s>&start=[CLS]&end=[PAD]&clean=repair,spaces",
    ),
    (
      METACLIP_TEXT,
      {},
      {"text.eot": 2, "text.pooling": "eot", "text.causal": True},
      {"type": "Sequence", "processors": [{"type": "ByteLevel"}, XLM_ENDS]},
      "?pad=</s>&start=<s>&clean=repair,spaces",
    ),
    (MT5_TEXT, {}, {"text.eot": 1, "text.pooling": "eot"}, T5_ENDS, "?pad=</s>&start=none&clean=repair,spaces"),
  ],
)
def test_configs_of_other_families_of_open_clip(
  text: dict, vision: dict, expected: dict, ends: dict, options: str, tmp_path: Path
) -> None:
  about = {"model_cfg": {"text_cfg": text, "vision_cfg": vision}, "preprocess_cfg": {"resize_mode": "squash"}}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
  found = settings_beside(tmp_path / "open_clip_model.safetensors")
  assert {name: found[name] for name in expected} == expected
  assert found["squash"]
  assert "text.tokenizer" not in found
  (tmp_path / "sentencepiece.bpe.model").touch()  # XLM's, whose ids transformers shifts
  assert "text.tokenizer" not in settings_beside(tmp_path / "open_clip_model.safetensors")
  (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": ends}))
  if "no_causal_mask" in text:
    with pytest.raises(ValueError, match="open_clip_config.json: the text tower sees padding, .* a usable pad_token"):
      settings_beside(tmp_path / "open_clip_model.safetensors")
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "</s>"}}))
  found = settings_beside(tmp_path / "open_clip_model.safetensors")
  assert found["text.tokenizer"] == f"huggingface:{tmp_path / 'tokenizer.json'}{options}"


def test_metaclip_2_of_transformers(tmp_path: Path) -> None:
  about = CLIP | {"model_type": "metaclip_2", "text_config": {"eos_token_id": 2, "vocab_size": 128}}
  found = settings(
    tmp_path, config=about, tokenizer={"post_processor": XLM_ENDS}, tokenizer_config={"pad_token": "<pad>"}
  )
  assert found["text.eot"] == 2
  assert found["text.tokenizer"] == f"huggingface:{tmp_path / 'tokenizer.json'}?pad=<pad>&start=<s>"
  for change in ({"tokenizer": {"post_processor": T5_ENDS}}, {"tokenizer_config": {"add_bos_token": False}}):
    (tmp_path / "tokenizer_config.json").unlink()
    assert settings(tmp_path, **change)["text.tokenizer"].endswith("tokenizer.json?start=none")
    settings(tmp_path, tokenizer={"post_processor": XLM_ENDS}, tokenizer_config={})


def test_the_tokenizers_of_siglip_in_transformers(tmp_path: Path) -> None:
  assert settings(tmp_path, config={"model_type": "siglip"}) == {
    **{f"{side}.{name}": value for side in ("image", "text") for name, value in SIGLIP_TOWER.items()},
    "text.eot": 1,
    "image_size": 224,
  }
  (tmp_path / "tokenizer.json").touch()
  second = settings(tmp_path, tokenizer_config={"pad_token": "<pad>", "padding_side": "right"})
  assert second["text.tokenizer"].endswith("tokenizer.json?pad=<pad>&start=none&clean=lower")
  with pytest.raises(ValueError, match="tokenizer_config.json: padding_side='left' is not supported, only 'right'"):
    settings(tmp_path, tokenizer_config={"padding_side": "left"})
  (tmp_path / "spiece.model").touch()
  first = settings(tmp_path, tokenizer_config={"do_lower_case": False})
  assert first["text.tokenizer"].endswith("spiece.model?start=none&clean=no_punctuation,spaces&pad=</s>")


SIGLIP_TOWER = {"activation": "gelu_tanh", "heads": 12, "epsilon": 1e-6}
