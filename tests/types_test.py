"""Tests of `declip_jax.types`: entries as attributes, immutable, in pytrees, and between processes."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.types import Features, Outputs
from declip_jax.views import Views


def test_entries_are_attributes_and_none_removes_them() -> None:
  outputs = Outputs(text=np.ones(2), image=np.zeros(3), bias=None)
  assert list(outputs) == ["image", "text"]
  assert "bias" not in outputs
  assert outputs.replace(bias=np.ones(()), text=None).bias == 1
  assert "text" not in outputs.replace(text=None)
  assert "text" in outputs  # a copy was changed
  with pytest.raises(AttributeError, match=r"Outputs has no 'imgae', only \['image', 'text'\]"):
    _ = outputs.imgae
  with pytest.raises(AttributeError, match="Outputs.text is read-only"):
    outputs.text = np.ones(2)


def test_arrays_are_pytrees_whatever_the_order_of_their_entries() -> None:
  one, other = Features(image=jnp.ones(2), text=jnp.zeros(2)), Features(text=jnp.zeros(2), image=jnp.ones(2))
  assert jax.tree.structure(one) == jax.tree.structure(other)
  doubled = jax.jit(lambda features: jax.tree.map(lambda x: 2 * x, features))(one)
  np.testing.assert_array_equal(doubled.image, [2, 2])
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
  assert paths == [".image", ".text"]
  assert jax.tree.map(lambda x: None, one, is_leaf=lambda x: False).image is None  # placeholders are kept


def test_views_are_values() -> None:
  views = Views(ssl_image=(1, 2), mosaic_image=(3,))
  assert views == Views(mosaic_image=(3,), ssl_image=(1, 2)) != Views(ssl_image=(1, 2))
  assert hash(views) == hash(pickle.loads(pickle.dumps(views)))
  assert pickle.loads(pickle.dumps(views)) == views
  assert (views.mosaic_image, views.masked_text, views.numbers("masked_text")) == ((3,), None, ())
  assert views.replace(masked_text=2).numbers("masked_text") == (2,)
  assert views.numbers("tile_image") == ()
  assert Views(title_text=(1,)).other_texts() == ("title_text",)
  with pytest.raises(ValueError, match=r"roles \['mosaic'\]"):
    Views(mosaic=(1,))
