"""Checkpoints as PyTorch writes them, of each project, give the numbers of their reference implementations."""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import references as reference
import torch

from declip_jax.clip import load
from declip_jax.models.positions import resize_positions
from declip_jax.weights.read import read

FORWARD = {"rtol": 1e-4, "atol": 2e-5}


class Node(torch.nn.Module):
  """A module with the parameters and buffers that a state dict names, so that it can be scripted."""

  def __init__(self, tensors: dict[str, torch.Tensor]):
    super().__init__()
    for child in {name.split(".")[0] for name in tensors if "." in name}:
      below = {name.removeprefix(f"{child}."): x for name, x in tensors.items() if name.startswith(f"{child}.")}
      self.add_module(child, Node(below))
    for name, tensor in tensors.items():
      if "." not in name:
        if tensor.is_floating_point():
          self.register_parameter(name, torch.nn.Parameter(tensor))
        else:
          self.register_buffer(name, tensor)

  def forward(self) -> int:
    return 0


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
  arrays = reference.load(name)
  return arrays, {key: torch.from_numpy(np.array(x)) for key, x in reference.below(arrays, "sd/").items()}


def nhwc(images: np.ndarray) -> np.ndarray:
  return np.moveaxis(images, 1, -1)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # released files are TorchScript all the same
@pytest.mark.parametrize("name", ["openai_vit", "openai_resnet"])
@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_openai(name: str, form: str, tmp_path: Path) -> None:
  arrays, sd = golden(name)
  # As released: matrices and convolutions in half precision, exact for these numbers; with their sizes.
  halves = {key: x.half() if x.ndim > 1 and "embedding" not in key else x for key, x in sd.items()}
  sizes = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(16), "vocab_size": torch.tensor(128)}
  if form == "archive":
    torch.jit.script(Node(halves | sizes)).save(str(tmp_path / "model.pt"))
  else:
    torch.save(halves | sizes, tmp_path / "model.pt")
  clip = load(tmp_path / "model.pt")
  assert clip.remarks == ()
  np.testing.assert_allclose(clip.image_features(nhwc(arrays["images"])), arrays["image_features"], **FORWARD)
  np.testing.assert_allclose(clip.text_features(arrays["tokens"]), arrays["text_features"], **FORWARD)


@pytest.mark.parametrize("variant", ["SLIP", "CLIP", "SIMCLR"])
def test_slip(variant: str, tmp_path: Path) -> None:
  arrays, sd = golden("slip")
  if variant == "CLIP":
    sd = {key: x for key, x in sd.items() if not key.startswith("image_mlp.")}
  if variant == "SIMCLR":
    sd = {key: x for key, x in sd.items() if key.startswith(("visual.", "image_mlp."))}
  model = torch.nn.Linear(2, 2)
  checkpoint = {
    "epoch": 25,
    "state_dict": {f"module.{key}": x for key, x in sd.items()},
    "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
    "scaler": {"scale": 65536.0},
    "best_acc1": np.float64(42.8),
    "args": argparse.Namespace(model=f"{variant}_VITB16", lr=3e-3),
  }
  torch.save(checkpoint, tmp_path / "slip_base_25ep.pt")
  settings = {"image.heads": 3} | ({} if variant == "SIMCLR" else {"text.heads": 2})
  weights = read(tmp_path / "slip_base_25ep.pt", settings)
  assert weights.heads == {"CLIP": ("joint",), "SIMCLR": ("simclr",), "SLIP": ("joint", "simclr")}[variant]
  clip = load(tmp_path / "slip_base_25ep.pt", settings)
  if variant == "SIMCLR":
    with pytest.raises(ValueError, match="no text tower"):
      clip.encode_text("a dog")
    return
  np.testing.assert_allclose(clip.image_features(nhwc(arrays["image"])), arrays["eval/image_embed"], **FORWARD)
  np.testing.assert_allclose(clip.text_features(arrays["tokens"]), arrays["eval/text_embed"], **FORWARD)


# The parameters of each method besides towers and temperature.
DECLIP_HEADS = {
  "CLIP": (),
  "SLIP": ("predictor_sim",),
  "DeCLIP": ("projector", "predictor", "text_label_predictor"),
  "FILIP": ("text_label_predictor", "image_mapping", "text_mapping", "logit_scale_dense"),
  "DeFILIP": (
    "projector",
    "predictor",
    "text_label_predictor",
    "image_mapping",
    "text_mapping",
    "logit_scale_dense",
  ),
}
FOUND = {
  "CLIP": ("joint",),
  "SLIP": ("joint", "simclr"),
  "DeCLIP": ("joint", "simsiam", "mlm"),
  "FILIP": ("joint", "mlm", "filip"),
  "DeFILIP": ("joint", "simsiam", "mlm", "filip"),
}


@pytest.mark.parametrize("method", DECLIP_HEADS)
def test_declip(method: str, tmp_path: Path) -> None:
  arrays, sd = golden("declip")
  kept = {
    key: x
    for key, x in sd.items()
    if key.startswith(("visual.", "encode_text.")) or key == "logit_scale" or key.split(".")[0] in DECLIP_HEADS[method]
  }
  if method == "SLIP":  # whose head has a norm that is never used
    for index, (out, inner) in enumerate([(96, 64), (96, 96), (32, 96)], start=1):
      kept[f"predictor_sim.linear{index}.weight"] = torch.randn(out, inner)
      kept[f"predictor_sim.linear{index}.bias"] = torch.randn(out)
    for index in (1, 2, 3):
      norm = torch.nn.BatchNorm1d(96).state_dict()
      kept |= {f"predictor_sim.bn{index}.{key}": x for key, x in norm.items()}
    kept = {key.replace("encode_text.", "text_encoder."): x for key, x in kept.items()}
  model = {f"module.{key}": x for key, x in kept.items()}
  torch.save({"model": model, "optimizer": {"state": {}}, "last_iter": 128000}, tmp_path / "ckpt.pth.tar")
  settings = {"image.heads": 2, "text.heads": 3}
  weights = read(tmp_path / "ckpt.pth.tar", settings)
  assert weights.heads == FOUND[method]
  assert (weights.remarks, weights.tokens) == ((), method == "FILIP")
  clip = load(tmp_path / "ckpt.pth.tar", settings)
  features = clip.image_features(nhwc(arrays["images1"]))
  np.testing.assert_allclose(features, arrays["declip/image_features1"], **FORWARD)
  our_id = np.concatenate([np.arange(128), [130, 128, 129]])  # mask, start and end of text become start, end, mask
  tokens = our_id[arrays["tokens2"]]
  np.testing.assert_allclose(clip.text_features(tokens), arrays["declip/text_features2"], **FORWARD)


@pytest.mark.parametrize(("before", "after"), [(7, 12), (14, 7), (7, 24)])
def test_positions_are_resized_as_by_open_clip(before: int, after: int) -> None:
  positions = np.random.default_rng(0).normal(size=(before**2 + 1, 6)).astype(np.float32)
  grid = torch.from_numpy(positions[1:]).reshape(1, before, before, 6).permute(0, 3, 1, 2)
  theirs = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", antialias=True)
  ours = resize_positions(jnp.asarray(positions), after**2 + 1)
  np.testing.assert_allclose(ours[1:], theirs.permute(0, 2, 3, 1).reshape(-1, 6), atol=1e-5)
