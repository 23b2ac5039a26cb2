"""What a model that answers at random reaches."""

from collections.abc import Callable
import math

# Losses that are the cross-entropy of finding the partner among a number of candidates, by batch size; at its logarithm
# a model ranks them at random.
_CANDIDATES: dict[str, Callable[[int], int]] = {
  "clip": lambda batch: batch,
  "mvs": lambda batch: batch,
  "nns": lambda batch: batch,
  "filip": lambda batch: batch,
  "simclr": lambda batch: 2 * batch - 1,
}


def chance_losses(batch_size: int) -> dict[str, float]:
  """The loss of a model that answers at random, for each term that has one, when this many pairs are compared."""
  return {term: math.log(candidates(batch_size)) for term, candidates in _CANDIDATES.items()}


def recalls_at_chance(rank: int, images: float, texts: float) -> tuple[float, float]:
  """The recall at a rank of a random order, from image to text and from text to image.

  One image is right for each text. An image has `c = texts / images` right texts, of which one is among the first `k`
  of `t` texts with probability `1 - C(t - c, k) / C(t, k)`; exact where all images have as many.
  """
  first = min(rank, texts)
  if first > texts - texts / images:
    return 1.0, min(rank / images, 1.0)
  ways = (_log_choices(texts - texts / images, first), _log_choices(texts, first))
  return 1 - math.exp(ways[0] - ways[1]), min(rank / images, 1.0)


def _log_choices(count: float, chosen: float) -> float:
  return math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)
