import codecs

import pytest

from declip_jax.data.storage import texts

GREEN = "ein grünes Quadrat"


@pytest.mark.parametrize(
  ("data", "text"),
  [
    *((GREEN.encode(encoding), GREEN) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252")),
    *((GREEN.encode(encoding), GREEN) for encoding in ("utf-16-le", "utf-16-be")),
    (codecs.BOM_UTF16_BE + GREEN.encode("utf-16-be"), GREEN),
    ("“quoted” – 5 €".encode("cp1252"), "“quoted” – 5 €"),
    ("北京".encode()[:-1] + b" x", "北\ufffd x"),  # cut off, but UTF-8
    (b"\x81 \xe9", "\ufffd \ufffd"),  # neither
    ("北京".encode("utf-16")[:-1], "北\ufffd"),
    (b"", ""),
    (b"a\0b", "a\0b"),
  ],
)
def test_encodings(data, text):
  assert texts.decode(data, "x.txt") == text


def test_lines_end_at_line_ends_only():
  assert texts.lines("a\x0cb\n c\u2028d \r\ne\x85f\rg\x1ch\n\n") == ["a\x0cb", "c\u2028d", "e\x85f", "g\x1ch", "", ""]
