"""These tests need PyTorch, open_clip, transformers and CLIP_benchmark: `make test-interop` installs them apart."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("open_clip") else ["*_test.py"]
