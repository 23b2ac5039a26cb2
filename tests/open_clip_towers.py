"""Small models of open_clip with image towers of timm, and CoCa, as folders; `fixtures/make_towers.py` made them."""

import json
from pathlib import Path

import numpy as np
import references as reference
import safetensors.numpy

MODELS = ("convnext_base", "convnext_large_d", "convnext_xxlarge", "EVA01-g-14", "EVA02-E-14", "MobileCLIP2-L-14")
MODELS = (*MODELS, "coca_ViT-B-32")


def fixture(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
  """The arrays of a model, its state dict and its config."""
  arrays = reference.load("open_clip_towers")
  of_model = reference.below(arrays, f"{name}/")
  found = {"pixels": arrays["pixels"], "tokens": arrays["tokens"], "image": of_model["image"], "text": of_model["text"]}
  return found, reference.below(of_model, "sd/"), json.loads(str(of_model["config"]))


def write_folder(folder: Path, name: str, **changes: object) -> dict[str, np.ndarray]:
  """A folder of open_clip with changes of its `vision_cfg`; returns the arrays of the model."""
  arrays, tensors, config = fixture(name)
  config["vision_cfg"] |= changes
  (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
  contiguous = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
  safetensors.numpy.save_file(contiguous, folder / "open_clip_model.safetensors")
  return arrays
