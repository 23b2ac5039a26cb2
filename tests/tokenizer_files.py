"""Tiny tokenizers like those of SigLIP and SigLIP 2, made by `fixtures/make_siglip.py`."""

from pathlib import Path

import numpy as np


def write(folder: Path) -> dict[str, np.ndarray]:
  """Writes `spiece.model` and `tokenizer.json`; returns captions and their ids by transformers and open_clip."""
  arrays = dict(np.load(Path(__file__).parent / "fixtures" / "siglip_tokens.npz"))
  (folder / "spiece.model").write_bytes(arrays.pop("spiece").tobytes())
  (folder / "tokenizer.json").write_text(str(arrays.pop("tokenizer_json")), encoding="utf-8")
  return arrays
