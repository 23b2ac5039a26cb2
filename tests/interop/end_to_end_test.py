"""Folders of open_clip and transformers on nasty captions and odd images: their tokens, pixels, features and logits.

Everything is theirs until `load`: the files of the model, of the tokenizer and of the preprocessing.
"""

import json
from pathlib import Path
import sys
from typing import NamedTuple
import unicodedata

import numpy as np
import open_clip
import pytest
import torch
import transformers

from declip_jax.clip import Clip, load
from declip_jax.data.text.cleaning import clean
from declip_jax.weights.vocabulary import merges, vocabulary

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fixtures")]
from make_siglip import gemma, sentence_pieces
import nasty

pytestmark = pytest.mark.timeout(900)
CAPTIONS, PICTURES = nasty.captions(), nasty.pictures()


class Theirs(NamedTuple):
  """What their code gives: token ids `[n t]`, unit features `[n d]`, and logits of images against texts."""

  ids: np.ndarray
  image: np.ndarray
  text: np.ndarray
  logits: np.ndarray


def by_open_clip(folder: Path, captions: list[str]) -> Theirs:
  model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
  ids = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
  image = model.eval().encode_image(torch.stack([preprocess(picture) for picture in PICTURES]), normalize=True)
  text = torch.cat([model.encode_text(part, normalize=True) for part in ids.split(100)])
  logits = model.logit_scale.exp() * image @ text.T + (0 if model.logit_bias is None else model.logit_bias)
  return Theirs(ids.numpy(), image.numpy(), text.numpy(), logits.numpy())


def by_transformers(folder: Path, captions: list[str]) -> Theirs:
  model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
  processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
  length = model.config.text_config.max_position_embeddings
  pictures = [picture.convert("RGB") for picture in PICTURES]
  inputs = processor(
    text=captions, images=pictures, return_tensors="pt", padding="max_length", max_length=length, truncation=True
  )
  out = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
  found = inputs["input_ids"], out.image_embeds, out.text_embeds, out.logits_per_image
  return Theirs(*(x.numpy() for x in found))


def check(ours: Clip, theirs: Theirs, captions: list[str]) -> None:
  assert ours.remarks == ()
  ids = ours.tokenizer(captions)
  if ours.model.towers.text.ignores_padding:  # transformers pads CLIP's texts with their end
    ends = theirs.ids == ours.tokenizer.eot
    theirs = theirs._replace(ids=np.where(ends.cumsum(axis=1) > ends, ours.tokenizer.pad, theirs.ids))
  wrong = [captions[row] for row in np.flatnonzero((ids != theirs.ids).any(axis=1))]
  assert not wrong, (len(wrong), wrong[:20])
  image, text = ours.encode_image(PICTURES), ours.encode_text(captions)
  np.testing.assert_allclose(image, theirs.image, rtol=0, atol=1e-4)
  np.testing.assert_allclose(text, theirs.text, rtol=0, atol=1e-4)
  bias = float(ours.params["heads"].get("logit_bias", 0))
  np.testing.assert_allclose(ours.logit_scale * image @ text.T + bias, theirs.logits, rtol=0, atol=1e-4)


def is_split_by_version(character: str) -> bool:
  """Whether its place in words depends on the version of Unicode, see `data.text.tokenizer`."""
  return character == "\u0345" or unicodedata.category(character) == "Cn"


def perturb(model: torch.nn.Module) -> None:
  """Adds noise to all parameters, so that no bias is 0 and no gain 1."""
  generator = torch.Generator().manual_seed(0)
  for parameter in model.parameters():
    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def save_open_clip(model: torch.nn.Module, fields: dict, preprocess: dict, folder: Path) -> None:
  perturb(model)
  torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
  about = {"model_cfg": fields, "preprocess_cfg": preprocess}
  (folder / "open_clip_config.json").write_text(json.dumps(about))


@torch.no_grad()
def test_clip_of_open_clip(tmp_path: Path) -> None:
  fields = open_clip.get_model_config("ViT-B-32-quickgelu")
  for part in ("vision_cfg", "text_cfg"):
    fields[part]["layers"] = 2
  save_open_clip(open_clip.CLIP(**fields), fields, {}, tmp_path)
  captions = [text for text in CAPTIONS if not any(map(is_split_by_version, text))]
  assert len(captions) > 470
  check(load(tmp_path), by_open_clip(tmp_path, captions), captions)


@torch.no_grad()
def test_siglip_of_open_clip(tmp_path: Path) -> None:
  fields = open_clip.get_model_config("ViT-B-32-SigLIP2-256")
  fields["text_cfg"] |= {"layers": 2, "vocab_size": 420, "hf_tokenizer_name": str(tmp_path)}
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(gemma(tmp_path)), eos_token="<eos>", pad_token="<pad>", padding_side="right"
  )
  made.save_pretrained(tmp_path)
  model = open_clip.CustomTextCLIP(**{name: value for name, value in fields.items() if name != "custom_text"})
  preprocess = {"resize_mode": "squash", "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
  save_open_clip(model, fields, preprocess, tmp_path)
  check(load(tmp_path), by_open_clip(tmp_path, CAPTIONS), CAPTIONS)


@torch.no_grad()
def test_clip_of_transformers(tmp_path: Path) -> None:
  """Captions that OpenAI's code repairs are exceptions, see the README: transformers repairs none.

  So is the Greek sigma at the end of a word, for which transformers has no letter of its own in lower case.
  """
  two = {"num_hidden_layers": 2}
  model = transformers.CLIPModel(transformers.CLIPConfig(text_config=two, vision_config=two))
  perturb(model)
  model.save_pretrained(tmp_path)
  tokenizer = transformers.CLIPTokenizer(vocab=vocabulary(), merges=[tuple(merge.split()) for merge in merges()])
  transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(), tokenizer).save_pretrained(tmp_path)
  captions = [text for text in CAPTIONS if " ".join(text.split()).lower() == clean(text)]
  captions = [text for text in captions if "Σ" not in text and not any(map(is_split_by_version, text))]
  assert len(captions) > 320
  check(load(tmp_path), by_transformers(tmp_path, captions), captions)


@torch.no_grad()
@pytest.mark.parametrize("version", ["SigLIP", "SigLIP 2"])
def test_siglip_of_transformers(version: str, tmp_path: Path) -> None:
  """Captions that begin with a space are exceptions, see the README, and in SigLIP 2 so is the Greek final sigma."""
  two = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 300}
  text = two | {"vocab_size": 512}
  model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=two | {"image_size": 224}))
  perturb(model)
  model.save_pretrained(tmp_path)
  if version == "SigLIP":
    tokenizer = transformers.SiglipTokenizer(str(sentence_pieces(tmp_path, "nmt_nfkc")))
  else:
    tokenizer = transformers.Siglip2Tokenizer(tokenizer_file=str(gemma(tmp_path)), padding_side="right")
  images = transformers.SiglipImageProcessorPil(size={"height": 224, "width": 224})
  transformers.SiglipProcessor(images, tokenizer).save_pretrained(tmp_path)
  captions = [text for text in CAPTIONS if not text.startswith(" ") and "Σ" not in text]
  check(load(tmp_path), by_transformers(tmp_path, captions), captions)
