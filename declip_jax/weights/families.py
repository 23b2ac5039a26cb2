"""Families of models that compare images and texts but that our towers cannot compute, for errors that name them.

A model of such a family differs from CLIP in many places, of which a reader would name the first that it meets.
"""

from collections.abc import Iterable, Mapping
import re
from typing import Any

_SUPPORTED = (
  "only CLIP, SLIP and DeCLIP with ViTs and ResNets like OpenAI's or ConvNeXts, SigLIP, CoCa, EVA-01-CLIP and "
  "EVA-02-CLIP-E"
)
_OTHER_FORM = "this "  # begins the name of a family of which some models are supported
# Families by patterns of names of tensors, all of which have to be there, in the order in which they are searched for.
_TENSORS = {
  "LiT of big_vision, whose texts are BERT's,": (r"img/cls$",),
  "ViTamin": (r"visual\.trunk\.patch_embed\.backbone\.stem\.",),
  "MobileCLIP": (r"image_encoder\.model\.|visual\.trunk\.(patch_embed\.backbone\.\d|.*\.token_mixer\.)",),
  "Perception Encoder (PE)": (r"visual\.trunk\.norm_pre\.", r"visual\.trunk\.attn_pool\."),
  "this CoCa": (r"text_decoder\.|visual\.attn_pool\.",),
  "this EVA-CLIP": (r"visual\.(trunk\.)?blocks\.\d+\.(attn\.(q_bias|q_proj|rope)|mlp\.(fc1_[gx]|w[12]))",),
  "this ConvNeXt": (r"visual\.trunk\.stages\.\d+\.blocks\.\d+\.conv_dw\.",),
  "Swin": (r"visual\.trunk\.layers\.\d+\.blocks\.",),
  "Chinese-CLIP": (r"text_model\.(embeddings\.word_embeddings|encoder\.layer\.)|bert\.embeddings\.",),
  "AltCLIP": (r"text_model\.roberta\.",),
  "X-CLIP": (r"prompts_generator\.|mit\.",),
  "BLIP": (r"vision_model\.encoder\.layers\.\d+\.self_attn\.qkv\.|visual_encoder\.blocks\.",),
  "a CLIP with a text tower of transformers (RoBERTa, mT5, NLLB)": (r"text\.transformer\.(?!resblocks\.)",),
  "a CLIP with layer scale": (r"(visual\.|text\.)?transformer\.resblocks\.\d+\.ls_[12]\.",),
  "a CLIP with another image tower of timm": (
    r"visual\.trunk\.(norm_pre|fc_norm|head|stem|stages|layers|rel_pos\w*|blocks\.\d+\.(ls[12]|attn\.rel_pos\w*))\.",
  ),
}
# Families by the beginning of `timm_model_name` in open_clip's configs.
_TIMM = {
  r"vit_\w+_siglip_gap": "SigLIP without its pooling",
  r"(vit_)?pe_": "Perception Encoder (PE)",
  r"fastvit|\w+_mci": "MobileCLIP",
  r"convnext": "this ConvNeXt",
  r"eva": "this EVA-CLIP",
  r"vitamin": "ViTamin",
  r"swin": "Swin",
}
# Families by `model_type` of transformers.
_TRANSFORMERS = {
  "align": "ALIGN",
  "altclip": "AltCLIP",
  "blip": "BLIP",
  "blip-2": "BLIP-2",
  "chinese_clip": "Chinese-CLIP",
  "clipseg": "CLIPSeg",
  "groupvit": "GroupViT",
  "owlv2": "OWLv2",
  "owlvit": "OWL-ViT",
  "siglip2": "SigLIP 2 for images of any shape (NaFlex)",
  "vision-text-dual-encoder": "VisionTextDualEncoder",
  "xclip": "X-CLIP",
}


def of_tensors(names: Iterable[str]) -> tuple[str, str]:
  """The family of a state dict with these names, and the first name by which it is known; "" if it is like none."""
  names = list(names)
  for family, patterns in _TENSORS.items():
    found = [next((name for name in names if re.match(pattern, name)), "") for pattern in patterns]
    if all(found):
      return family, found[0]
  return "", ""


def of_open_clip(model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> str:
  """The family that `model_cfg` of an open_clip config describes, with its two towers; "" if it is like none."""
  timm, language_model = (
    str(tower.get(name) or "")[:80] for tower, name in ((vision, "timm_model_name"), (text, "hf_model_name"))
  )
  if family := next((family for start, family in _TIMM.items() if re.match(start, timm)), ""):
    return family
  if "multimodal_cfg" in model:
    return "this CoCa"
  if language_model:
    return f"a CLIP with the text tower {language_model}"
  return "a CLIP with layer scale" if vision.get("ls_init_value") else ""


def of_transformers(model_type: Any) -> str:
  """The family of a `model_type` of transformers; "" if it is not known."""
  return _TRANSFORMERS.get(model_type, "") if isinstance(model_type, str) else ""


def is_other_form(family: str) -> bool:
  """Whether other models of a family are supported, so that the family alone does not say what is wrong."""
  return family.startswith(_OTHER_FORM)


def unsupported(where: str, family: str, found: str) -> ValueError:
  """The error of a model of a family, at a file or a field, with the first thing by which it differs."""
  supported = "" if is_other_form(family) else f", {_SUPPORTED}"
  return ValueError(f"{where}: {family} is not supported{supported}; found {found}")
