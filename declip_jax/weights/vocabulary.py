"""OpenAI's byte-pair vocabulary as the two files that Hugging Face's CLIP tokenizer reads.

`merges.txt.gz` has the 48,894 merges that openai/CLIP uses of its `bpe_simple_vocab_16e6.txt.gz` (MIT licence), one
per line.
"""

import functools
import gzip
from importlib import resources

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_END_OF_WORD = "</w>"


@functools.cache
def merges() -> tuple[str, ...]:
  """The merges, most frequent first, each as two symbols with a space between them."""
  data = resources.files("declip_jax.weights").joinpath("merges.txt.gz").read_bytes()
  return tuple(gzip.decompress(data).decode().splitlines())


def vocabulary() -> dict[str, int]:
  """Maps symbols to ids: 256 bytes, 256 bytes that end a word, the merges, start and end of text."""
  letters = [_letter(byte) for byte in _byte_order()]
  symbols = [*letters, *(letter + _END_OF_WORD for letter in letters)]
  symbols += [merge.replace(" ", "") for merge in merges()]
  return {symbol: index for index, symbol in enumerate((*symbols, *SPECIAL))}


def _printable() -> list[int]:
  return [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]


def _byte_order() -> list[int]:
  """The printable bytes of Latin-1, then the others (GPT-2's order)."""
  return _printable() + [byte for byte in range(256) if byte not in set(_printable())]


def _letter(byte: int) -> str:
  """The character of a byte: itself if it is printable, else the next one from 256."""
  order = _byte_order()
  return chr(byte) if byte in set(_printable()) else chr(256 + order.index(byte) - len(_printable()))
