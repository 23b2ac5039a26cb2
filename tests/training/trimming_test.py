"""Tests of `declip_jax.training.trimming`; `methods_test` and `train_test` have trimmed steps and runs."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from declip_jax.sharding import batch_sharding, make_mesh
from declip_jax.training import trimming

EOT = 99


def row(length: int, positions: int = 12) -> list[int]:
  """A text of `length` tokens, the last of which ends it, and padding."""
  return [*range(1, length), EOT, *[0] * (positions - length)]


@pytest.mark.parametrize(
  ("texts", "positions", "expected"),
  [
    ([[row(3)], [row(5)], [row(4)]], None, 5),
    ([[row(3), row(7)], [row(5), row(2)]], None, 7),  # the longest of all views
    ([[row(12)]], None, 12),
    ([[[1, EOT, 7, EOT, *[0] * 8]]], None, 2),  # the first end counts
    ([[row(3)], [[1, 2, *[0] * 10]]], None, 12),  # a row without an end
    ([[row(3)], [row(4)]], [[0, 1], [2, 1]], 4),
    ([[row(3)], [row(4)]], [[0, 8], [2, 1]], 9),  # a prediction after the end
    ([[row(3)], [row(4)]], [[], []], 4),
  ],
)
def test_a_batch_needs_the_positions_up_to_the_last_one_that_is_read(
  texts: list, positions: list | None, expected: int
) -> None:
  batch = {"text": np.array(texts, np.int32)}
  if positions is not None:
    batch["mlm_position"] = np.array(positions, np.int32)
  assert trimming.needed_length(batch, EOT) == expected


def test_the_shortest_length_that_fits_is_chosen_and_the_last_one_holds_every_text() -> None:
  chosen = [trimming.trimmed_length((4, 8, 12), needed) for needed in range(1, 13)]
  assert chosen == [4] * 4 + [8] * 4 + [12] * 4


class Stream:
  """Batches of eight rows whose longest texts have these lengths; `rest` counts those that were not read."""

  def __init__(self, lengths: list[int]):
    self.rest, self.closed = list(lengths), False
    self._sharding = batch_sharding(make_mesh(-1, 1))

  def __next__(self) -> tuple[trimming.Measured, dict[str, int], np.ndarray]:
    length = self.rest.pop(0)
    text = np.array([[row(2)]] * 7 + [[row(length)]], np.int32)
    batch = {"image": np.full((8, 1, 2, 2, 3), length, np.uint8), "text": text}
    return trimming.measure(batch, EOT, self._sharding), {"next_index": length}, np.array([length])

  def close(self) -> None:
    self.closed = True


def trimmed(stream: Stream) -> Iterator:
  return trimming.TrimmedBatches(stream, (4, 8, 12), batch_sharding(make_mesh(-1, 1)))


def test_batches_are_trimmed_and_keep_all_else() -> None:
  lengths = [3, 9, 4, 5, 12]
  stream = Stream(lengths)
  batches = trimmed(stream)
  for length, expected in zip(lengths, [4, 12, 4, 8, 12], strict=True):
    batch, position, bad = next(batches)
    assert batch["text"].shape == (8, 1, expected)
    assert batch["text"].sharding == batch["image"].sharding == batch_sharding(make_mesh(-1, 1))
    np.testing.assert_array_equal(batch["text"][:, 0], [row(2, expected)] * 7 + [row(length, expected)])
    assert (batch["image"][0, 0, 0, 0, 0], position, bad) == (length, {"next_index": length}, [length])
  batches.close()
  assert stream.closed


def test_several_hosts_take_the_length_of_the_longest_text_of_all_one_batch_ahead(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The other host's rows are longer in every second batch: its number is that of the devices after the first."""
  others, shares = iter([2, 10, 2, 10, 2]), []
  place = trimming.to_global

  def with_others(share: object, sharding: object) -> jax.Array:
    if isinstance(share, np.ndarray) and share.ndim == 1:
      shares.append(share)
      share = np.array([share[0], *[next(others)] * (len(share) - 1)], np.int32)
    return place(share, sharding)

  monkeypatch.setattr(trimming, "to_global", with_others)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  stream = Stream([3, 5, 6, 11, 3])
  batches = trimmed(stream)
  for left, expected in ((3, 4), (2, 12), (1, 8), (0, 12)):
    assert next(batches)[0]["text"].shape[-1] == expected
    assert len(stream.rest) == left  # the next batch is measured before the step on this one begins
  assert [share.tolist() for share in shares] == [[length] * 8 for length in (3, 5, 6, 11, 3)]
