"""These tests need PyTorch, open_clip, transformers and CLIP_benchmark: `make test-interop` installs them."""

import importlib.util
import re

collect_ignore_glob = [] if importlib.util.find_spec("open_clip") else ["*_test.py"]

if not collect_ignore_glob:
  import torch

  # torchvision's CUDA build with PyTorch's CPU build cannot load its operators, and lacks a few at import. Nothing
  # here uses them; their names are enough.
  for _ in range(10):
    try:
      import torchvision  # noqa: F401

      break
    except RuntimeError as error:
      missing = re.match(r"operator (torchvision::\w+) does not exist", str(error))
      if not missing:
        raise
      torch.library.define(missing[1], "(Tensor x) -> Tensor")
