"""Tests of `declip_jax.planning.topology`, with libtpu where it is installed."""

import importlib.util
from pathlib import Path
import subprocess
import sys

import pytest

from declip_jax.planning.topology import topology_devices

ROOT = Path(__file__).parents[2]


def test_the_error_without_libtpu_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ModuleNotFoundError, match=r"v5e:4x4.*pip install.*\[tpu\]"):
    topology_devices("v5e:4x4")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_parameters_are_gathered_in_bfloat16_on_a_tpu():
  code = """
import re, jax, jax.numpy as jnp
from declip_jax import sharding
from declip_jax.planning.topology import topology_devices
mesh = sharding.make_mesh(2, 2, topology_devices("v5e:2x2"))
shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
layout = sharding.shard_like(shape, mesh)
loss = lambda w, x: (x.astype(jnp.bfloat16) @ sharding.gather(w, mesh, jnp.bfloat16)).astype(jnp.float32).sum()
x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=sharding.batch_sharding(mesh))
w = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout)
text = jax.jit(jax.value_and_grad(loss), out_shardings=(None, layout)).lower(w, x).compile().as_text()
print(sorted(set(re.findall(r"= (\\w+[[][0-9,]+[]])[^ ]* all-gather", text))))
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "['bf16[1024,1024]']"
