"""SigLIP with transformers and open_clip: they load our exports strictly, we read their folders, and features agree."""

import json
from pathlib import Path
import sys

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers

from declip_jax import architectures
from declip_jax.clip import Clip, load
from declip_jax.data.text.tokenizer import make_tokenizer
from declip_jax.sharding import make_mesh
from declip_jax.weights.read import Weights
from declip_jax.weights.write import write

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fixtures")]
from exports_test import CAPTIONS, assert_near, pictures, random_weights
from make_siglip import CAPTIONS as NASTY
from make_siglip import gemma, randomise, sentence_pieces

TEXTS = [*CAPTIONS, *(text for text in NASTY if not text.startswith(" "))]
SP_OPTIONS = "start=none&pad=</s>&clean=lower,no_punctuation,spaces"
GEMMA_OPTIONS = "start=none&pad=<pad>&clean="
TEXT = {"width": 64, "depth": 2, "heads": 2, "vocab_size": 420, "eot": 1, "context_length": 64}
TEXT |= {"activation": "gelu_tanh", "epsilon": 1e-6, "causal": False, "pooling": "last"}


def make(image: dict, size: int, tokenizer: str) -> Weights:
  """A model with random weights and a text tower of two layers."""
  width = image["width"]
  architecture = architectures.Architecture(
    architectures.vit(**image, **architectures.SIGLIP),
    architectures.text(**TEXT, tokenizer=tokenizer),
    width,
    size,
    text_bias=True,
    image_linear=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
  )
  weights = random_weights(architecture, ("joint", "sigmoid"))
  weights.params["heads"]["logit_bias"] = np.float32(-10.5)
  return weights


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def normalised(pixels: torch.Tensor) -> np.ndarray:
  return np.moveaxis(pixels.numpy(), 1, -1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_transformers_loads_our_export(kind: str, tmp_path: Path) -> None:
  if kind == "sentencepiece":
    name = f"sentencepiece:{sentence_pieces(tmp_path, 'nmt_nfkc')}?{SP_OPTIONS}"
  else:
    name = f"huggingface:{gemma(tmp_path)}?{GEMMA_OPTIONS}lower"
  weights = make({"patch": 14, "width": 64, "depth": 2, "heads": 2}, 90, name)
  assert write(weights, tmp_path / "export", "huggingface") == []
  theirs, report = transformers.SiglipModel.from_pretrained(
    tmp_path / "export", local_files_only=True, output_loading_info=True
  )
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "export", local_files_only=True)
  assert type(processor).__name__ == "SiglipProcessor"
  inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding="max_length", truncation=True)
  ours = Clip(weights, make_mesh(-1, 1))
  np.testing.assert_array_equal(ours.tokenizer(TEXTS), inputs["input_ids"].numpy())
  out = theirs.eval()(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
  assert_near(unit(ours.image_features(normalised(inputs["pixel_values"]))), out.image_embeds)
  assert_near(ours.encode_text(TEXTS), out.text_embeds)
  image, text = ours.image_features(normalised(inputs["pixel_values"])), ours.encode_text(TEXTS)
  heads = weights.params["heads"]
  logits = np.exp(heads["logit_scale"]) * unit(image) @ text.T + heads["logit_bias"]
  np.testing.assert_allclose(logits, out.logits_per_image, rtol=0, atol=1e-3)
  again = load(tmp_path / "export")
  np.testing.assert_array_equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
  np.testing.assert_array_equal(again.encode_image(pictures()), ours.encode_image(pictures()))


@torch.no_grad()
@pytest.mark.parametrize("shard", ["5GB", "1MB"])
def test_folders_of_transformers_are_loaded(shard: str, tmp_path: Path) -> None:
  tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128, "intermediate_size": 500}
  config = transformers.SiglipConfig(
    text_config=tower | {"vocab_size": 512},
    vision_config=tower | {"image_size": 50, "patch_size": 14},
  )
  theirs = transformers.SiglipModel(config).eval()
  randomise(theirs)
  theirs.save_pretrained(tmp_path, max_shard_size=shard)
  assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "1MB")
  processor = transformers.SiglipProcessor(
    transformers.SiglipImageProcessorPil(size={"height": 50, "width": 50}, resample=2),
    transformers.SiglipTokenizer(str(sentence_pieces(tmp_path, "nmt_nfkc"))),
  )
  processor.save_pretrained(tmp_path)
  ours = load(tmp_path)
  assert (ours.remarks, ours.view.interpolation) == ((), "bilinear")
  inputs = processor(
    text=TEXTS, images=pictures(), return_tensors="pt", padding="max_length", truncation=True, max_length=64
  )
  out = theirs(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
  assert_near(ours.encode_image(pictures()), out.image_embeds)
  assert_near(ours.encode_text(TEXTS), out.text_embeds)


@torch.no_grad()
def test_open_clip_loads_our_export(tmp_path: Path) -> None:
  name = f"huggingface:{gemma(tmp_path)}?{GEMMA_OPTIONS}repair,underscores,lower,no_punctuation,spaces"
  weights = make({"patch": 32, "width": 768, "depth": 12, "heads": 12}, 256, name)
  assert write(weights, tmp_path / "export", "open_clip") == []
  theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
  tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")
  ours = Clip(weights, make_mesh(-1, 1))
  np.testing.assert_array_equal(ours.tokenizer(TEXTS), tokenizer(TEXTS).numpy())
  batch = torch.stack([preprocess(picture) for picture in pictures()])
  assert_near(ours.encode_image(pictures()), theirs.eval().encode_image(batch))
  assert_near(ours.encode_text(TEXTS), theirs.encode_text(tokenizer(TEXTS)))
  assert (theirs.logit_bias.item(), theirs.logit_scale.item()) == (-10.5, 2.5)
  again = load(tmp_path / "export")
  assert again.remarks == ()
  np.testing.assert_array_equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
  np.testing.assert_array_equal(again.encode_image(pictures()), ours.encode_image(pictures()))


@torch.no_grad()
@pytest.mark.parametrize(
  ("model", "tokenizer"), [("ViT-B-16-SigLIP", "gemma"), ("ViT-L-14-CLIPA", ""), ("ViT-L-14-worldwide-quickgelu", "")]
)
def test_folders_of_open_clip_are_loaded(model: str, tokenizer: str, tmp_path: Path) -> None:
  """Real configs with a small vocabulary and few layers, but for the image tower of timm."""
  config = open_clip.get_model_config(model)
  config["text_cfg"] |= {"layers": 2, "vocab_size": 420}
  if "layers" in config["vision_cfg"]:
    config["vision_cfg"]["layers"] = 2
  kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
  theirs = kind(**config).eval()
  torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
  about = {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
  size, rng = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(0)
  ids = torch.randint(3, 420, (3, config["text_cfg"].get("context_length", 77)), generator=rng)
  ids[:, -1] = ids[0, 9] = 2  # MetaCLIP 2 pools at the first of these
  texts: list[str] = []
  if tokenizer:
    made = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(gemma(tmp_path)), eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )
    made.save_pretrained(tmp_path)
    ids, texts = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")(TEXTS), TEXTS
  ours = load(tmp_path)
  assert ours.remarks == ()
  images = torch.rand(2, 3, size, size, generator=rng)
  assert_near(unit(ours.image_features(normalised(images))), theirs.encode_image(images))
  assert_near(unit(ours.text_features(ids.numpy())), theirs.encode_text(ids))
  if texts:
    assert_near(ours.encode_text(texts), theirs.encode_text(ids))


def test_the_towers_of_timm_exist() -> None:
  """Every name that an export may write, with the activation that we take it to have."""
  from declip_jax.weights.model_configs import EXACT_IN_TIMM, TANH_IN_TIMM

  for names, module in ((EXACT_IN_TIMM, torch.nn.GELU), (TANH_IN_TIMM, timm.layers.GELUTanh)):
    for name in names:
      with torch.device("meta"):
        model = timm.create_model(f"vit_{name}")
      assert type(model.blocks[0].mlp.act) is type(model.attn_pool.mlp.act) is module, name


def test_ids_of_a_sentence_piece_model_with_unicode_normalisation(tmp_path: Path) -> None:
  model = sentence_pieces(tmp_path, "nmt_nfkc")
  theirs = transformers.SiglipTokenizer(str(model))
  ours = make_tokenizer(f"sentencepiece:{model}?{SP_OPTIONS}", 64)
  expected = theirs(TEXTS, padding="max_length", max_length=64, truncation=True, return_tensors="np")["input_ids"]
  np.testing.assert_array_equal(ours(TEXTS), expected)
