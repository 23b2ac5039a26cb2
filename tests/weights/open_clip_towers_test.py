"""Image towers of timm in open_clip's models, and CoCa, by open_clip: features of a folder, and every tensor."""

import contextlib
from pathlib import Path

import numpy as np
from open_clip_towers import MODELS, fixture, write_folder
import pytest
from tiers import slow_except

from declip_jax.clip import load
from declip_jax.weights import dialects
from declip_jax.weights.layout import layout, to_state_dict
from declip_jax.weights.read import from_state_dict, read
from declip_jax.weights.write import write

ATOL = 1e-5


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", slow_except(("convnext_large_d", "EVA02-E-14", "coca_ViT-B-32"), MODELS))
def test_features_of_a_folder(name: str, tmp_path: Path) -> None:
  arrays = write_folder(tmp_path, name)
  with pytest.warns(UserWarning, match="decoder") if name.startswith("coca") else contextlib.nullcontext():
    ours = load(tmp_path)
  pixels = np.moveaxis(arrays["pixels"].astype(np.float32), 1, -1)
  np.testing.assert_allclose(unit(ours.image_features(pixels)), unit(arrays["image"]), rtol=0, atol=ATOL)
  np.testing.assert_allclose(unit(ours.text_features(arrays["tokens"])), unit(arrays["text"]), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["convnext_base", "convnext_large_d", "MobileCLIP2-L-14"])
def test_every_tensor_comes_back(name: str) -> None:
  _, tensors, _ = fixture(name)
  weights = from_state_dict(tensors, {"text.eot": 89, "text.activation": "gelu"})
  ours = to_state_dict({"params": weights.params}, layout(weights.model, weights.heads))
  again = dialects.from_openai(ours, weights.origin)
  dot = "text." if "text.token_embedding.weight" in tensors else ""
  expected = {key.removeprefix(dot): x for key, x in tensors.items()}
  if "trunk.head.weight" in "".join(tensors):  # ours is after the trunk
    again["visual.trunk.head.weight"] = again.pop("visual.head.proj.weight")
  assert again.keys() == expected.keys()
  for key, tensor in expected.items():
    np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_what_no_tensor_tells_is_a_remark() -> None:
  _, tensors, _ = fixture("convnext_base")
  (remark,) = from_state_dict(tensors, {"text.eot": 89}).remarks
  for field in ("image.epsilon=1e-06", "image_size=256", "text.heads=1", "squash=False"):
    assert field in remark
  assert "branch_norm" not in remark
  _, tensors, _ = fixture("EVA02-E-14")
  (remark,) = from_state_dict(tensors, {"text.eot": 89}).remarks
  assert "image.branch_norm=False" in remark
  _, tensors, _ = fixture("coca_ViT-B-32")
  remark, _ = from_state_dict(tensors, {"text.eot": 89, "text.activation": "gelu"}).remarks
  assert "guesses, as are text.causal=True. If" in remark


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("convnext_base", {"timm_pool": "avg"}, "timm_pool='avg'"),
    ("convnext_base", {"timm_model_name": "convnextv2_base"}, "ConvNeXt is not supported"),
    ("EVA01-g-14", {"timm_proj": "linear"}, "timm_proj='linear'"),
    ("EVA01-g-14", {"timm_model_name": "eva02_large_patch14_clip_224"}, "EVA-CLIP is not supported"),
    ("coca_ViT-B-32", {"attn_pooler_heads": 4}, "attn_pooler_heads=4"),
    ("coca_ViT-B-32", {"attentional_pool": "parallel"}, "attentional_pool='parallel'"),
  ],
)
def test_other_options_are_rejected(name: str, changes: dict, message: str, tmp_path: Path) -> None:
  write_folder(tmp_path, name, **changes)
  with pytest.raises(ValueError, match=message) as error:
    read(tmp_path)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) - len(str(tmp_path)) < 300


@pytest.mark.parametrize(
  ("name", "old", "new"),
  [
    ("convnext_base", "", "visual.trunk.stages.0.blocks.0.mlp.grn.weight"),
    ("convnext_base", "visual.trunk.stages.0.blocks.0.gamma", ""),
    ("coca_ViT-B-32", "visual.attn_pool.ln_q.weight", ""),
    ("EVA02-E-14", "", "visual.trunk.blocks.0.attn.rope"),
  ],
)
def test_other_forms_of_a_family_are_refused_by_the_tensor_that_differs(name: str, old: str, new: str) -> None:
  _, tensors, _ = fixture(name)
  changed = {key: x for key, x in tensors.items() if key != old} | ({new: np.ones(3, np.float32)} if new else {})
  differs = rf"{old}: missing" if old else rf"{new} \(3,\): unknown"
  with pytest.raises(ValueError, match=rf"^x.pt: this .* is not supported, its tensors differ: {differs}$"):
    from_state_dict(changed, {"text.eot": 89}, name="x.pt")


@pytest.mark.parametrize("name", ["EVA02-E-14", "coca_ViT-B-32", "MobileCLIP2-L-14"])
@pytest.mark.parametrize("format", ["open_clip", "huggingface"])
def test_towers_that_are_only_read_are_not_exported(name: str, format: str, tmp_path: Path) -> None:
  _, tensors, _ = fixture(name)
  weights = from_state_dict(tensors, {"text.eot": 89, "text.activation": "gelu"})
  with pytest.raises(ValueError, match=f"{format} is not written for"):
    write(weights, tmp_path / "export", format)
  assert not (tmp_path / "export").exists()
