"""The search command: images are encoded once, also after an interruption; bad flags; the end by Ctrl-C."""

import copy
import http.client
import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys

from clips import Counting, make_clip
import numpy as np
import pytest

from declip_jax import search as command
from declip_jax.data.sources import open_source
from declip_jax.evals import feature_cache
from declip_jax.image_search.searcher import Query
from declip_jax.search import make_searcher

ROOT = Path(__file__).parents[1]
IMAGES = "scenes:train/40/24"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_images_are_encoded_once_even_if_interrupted(dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(feature_cache, "BLOCK", 16)
  options = {"features_dtype": dtype, "cache": tmp_path}
  with monkeypatch.context() as patch:
    Counting(patch, command, make_clip(0), batches=4)  # fetched one late: three, hence a block
    with pytest.raises(KeyboardInterrupt):
      make_searcher("weights", IMAGES, **options)
  for batches in (3, 0):
    with monkeypatch.context() as patch:
      counting = Counting(patch, command, make_clip(0))
      found = make_searcher("weights", IMAGES, **options)
      assert counting.batches == batches
  (file,) = tmp_path.glob("*/*.npy")
  stored = np.load(file, "r")
  assert (stored.dtype, stored.shape) == (dtype, (40, 48))
  embedding = found.index._embedding
  assert embedding.dtype == dtype
  assert isinstance(embedding, np.memmap)
  with monkeypatch.context() as patch:
    Counting(patch, command, make_clip(0))
    in_memory = make_searcher("weights", IMAGES)
  query = Query(texts=("a red circle",), unlikes=(3,))
  ours, theirs = found.search(query, 0, 40), in_memory.search(query, 0, 40)
  tolerance = 1e-6 if dtype == "float32" else 1e-3
  np.testing.assert_allclose(ours.cosine, theirs.cosine, atol=tolerance)
  image = make_clip(0).encode_image([open_source(IMAGES)[7]["image"]])[0]
  np.testing.assert_allclose(found.index.unit(7), image, atol=tolerance)


def test_sources_without_images_are_named(tmp_path, monkeypatch):
  Counting(monkeypatch, command, make_clip(0))
  (tmp_path / "a.jpg").write_bytes(b"broken")
  with pytest.raises(ValueError, match=f"--images={tmp_path}: no readable image among 1"):
    make_searcher("weights", str(tmp_path))
  with pytest.raises(FileNotFoundError, match="absent"):
    make_searcher("weights", str(tmp_path / "absent"))


def test_a_model_that_compares_tokens_is_rejected(monkeypatch):
  clip = copy.copy(make_clip(0))
  clip.tokens = True
  monkeypatch.setattr(command, "load", lambda *arguments: clip)
  with pytest.raises(ValueError, match="--weights=mine.pt compares tokens"):
    make_searcher("mine.pt", IMAGES)


def start(*flags):
  """Starts the command, whose Ctrl-C works even where the tests run in the background of a shell."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
  hear = "import signal, sys; signal.signal(2, signal.default_int_handler); from declip_jax.search import main; main()"
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen([sys.executable, "-c", hear, *flags], env=environment, **pipes)


def test_the_command_serves_until_ctrl_c(finished_run, tmp_path):
  process = start("--weights", str(finished_run.workdir), "--images", IMAGES, "--port=0", f"--cache={tmp_path}")
  try:
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines[0] == f"{IMAGES}: 40 images\n", process.communicate()
    port = int(re.search(r"http://127\.0\.0\.1:([0-9]+)/", lines[1])[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/api/search?text=a+red+circle&limit=3")
    found = json.loads(connection.getresponse().read())
    assert (found["total"], len(found["results"])) == (40, 3)
    assert found["results"][0]["captions"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().endswith("interrupted\n")
  finally:
    process.kill()
    process.communicate()


def test_a_port_in_use_is_reported_before_the_weights_are_read():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    process = start("--weights=absent", f"--images={IMAGES}", f"--port={port}")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert errors.startswith(f"error: port {port} is in use")
    assert errors.count("\n") == 1
