"""ONNX exports: their models read what transformers' processors make of the same folder."""

from pathlib import Path
import sys

import numpy as np
import onnxruntime
import pytest
import transformers

from declip_jax.clip import Clip
from declip_jax.sharding import make_mesh
from declip_jax.weights.write import write

sys.path.append(str(Path(__file__).parent))
from exports_test import ARCHITECTURES, pictures, random_weights
from siglip_test import GEMMA_OPTIONS, gemma, make

TEXTS = ["a photo of a dog", "two cats, a car & 3 birds", "x" * 300, ""]


@pytest.mark.parametrize("family", ["CLIP", "SigLIP 2"])
def test_a_folder_is_complete(family: str, tmp_path: Path) -> None:
  if family == "CLIP":
    weights = random_weights(ARCHITECTURES["tiny ViT"])
  else:
    name = f"huggingface:{gemma(tmp_path)}?{GEMMA_OPTIONS}lower"
    weights = make({"patch": 14, "width": 64, "depth": 2, "heads": 2}, 90, name)
  assert not [note for note in write(weights, tmp_path / "out", "onnx") if "tokenizer" in note]
  images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  pixels = images(pictures(), return_tensors="np")["pixel_values"]
  ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
  image, text = (onnxruntime.InferenceSession(tmp_path / "out" / f"{side}.onnx") for side in ("image", "text"))
  ours = Clip(weights, make_mesh(-1, 1))
  np.testing.assert_allclose(image.run(None, {"pixel_values": pixels})[0], ours.encode_image(pictures()), atol=1e-4)
  np.testing.assert_allclose(text.run(None, {"input_ids": ids})[0], ours.encode_text(TEXTS), rtol=0, atol=1e-5)
