"""500 captions and 20 images on which implementations like to differ, the same on every machine.

python tests/interop/nasty.py    # prints the captions
"""

import html.entities
import io
import random
import unicodedata

import numpy as np
import PIL.Image

WORDS = (
  "a photo of",
  "Two  CATS",
  "naïve café",
  "it's 1999!",
  "red-hot",
  "№7",
  "the dog's",
  "I'll",
  "snake_case",
  "...",
)
HANDWRITTEN = (
  *("", " ", "\n", "\t\t", "\0", "\ufeff", ".", "''", "'s", "&", "&;", "_"),
  *(
    "\ufeffa cat",
    "a\0cat",
    "a\u200bcat",
    "a\u00adcat",
    "a\u2028cat",
    "a\x85cat",
    "a\x1fcat",
    "a cat\r\n\r\n",
    "a cat \t",
  ),
  *(
    "&amp;",
    "&amp;amp;",
    "&amp;amp;amp;lt;b&gt;",
    "AT&T",
    "&#39;",
    "&#x1F600;",
    "&#0;",
    "&#128;",
    "&lt;br/&gt;",
    "&nbsp;cat",
  ),
  *("<b>cat</b>", "a<br>b", "&notit;", "&hellip", "x&copy=1", "&#xD800;", "&#1114112;"),
  *("cafÃ© au lait", "donâ€™t", "â€œquotedâ€\x9d", "Ã¼ber", "l’humanitÃ©", "ðŸ˜€ smile", "\x91quoted\x92"),
  *(
    "İstanbul",
    "ISTANBUL ı",
    "STRASSE ẞ",
    "ΟΔΥΣΣΕΥΣ ΑΣ.",
    "ﬁne ﬂoor ﬃ",
    "ＦＵＬＬ　ＷＩＤＴＨ",
    "½ ² ① Ⅻ",
    "٣٤٥ ４５６",
    "K Å Ω",
  ),
  *("\N{FAMILY}", "👨‍👩‍👧‍👦 family", "👍🏽👍🏿", "🇩🇪🇫🇷🇯", "1️⃣2️⃣", "❤️❤", "🏴\U000e0067\U000e0062\U000e007f", "🙂🙃" * 60),
  *(
    "e\u0301 é",
    "a\u0328\u0301",
    "\u0345",
    "Z" + "\u0335\u0321\u0489" * 30,
    "가\u1100\u1161",
    "नमस्ते",
    "ภาษาไทย",
    "שָׁלוֹם",
    "مرحبا",
  ),
  *("\u202eright\u202c", "日本語のテキスト", "中文，标点。", "한국어 문장", "ქართული", "🀄︎︎", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𐍈𐌰"),
  *(
    "don't won't I'M you'RE we'd they'VE he'll 'tis",
    "1,000.50 3/4 7:30",
    "C++ C# .NET",
    "a_b__c ___",
    "--- === ***",
    "U.S.A.",
  ),
  *(
    "http://example.com/?a=1&b=2",
    "user@mail.com #tag @you",
    "x" * 300,
    "x " * 300,
    "123456789" * 40,
    "!" * 500,
    "ab" * 5000,
  ),
  *(
    "a photo of a dog " * 200,
    "\n".join(["line"] * 100),
    "é" * 400,
    "漢" * 400,
    "&amp;" * 300,
    "'" * 100,
    "a\u0301" * 200,
  ),
)


def captions() -> list[str]:
  """500 captions: those above, the names of HTML, and words with characters of every class of Unicode."""
  rng = random.Random(0)
  found = [*HANDWRITTEN]
  for name in rng.sample(sorted(html.entities.html5), 60):
    found.append(f"{rng.choice(WORDS)} &{name} {rng.choice(WORDS)}")
  classes: dict[str, list[str]] = {}
  for code in range(0x110000):
    if (kind := unicodedata.category(chr(code))) != "Cs":  # which UTF-8 cannot represent
      classes.setdefault(kind, []).append(chr(code))
  kinds = sorted(classes)
  while len(found) < 500:
    kind = kinds[len(found) % len(kinds)]
    characters = "".join(rng.choices(classes[kind], k=rng.choice((1, 1, 2, 5, 20))))
    found.append(
      rng.choice(("{0} {1} {2}", "{0}{1}{2}", "{1}", "{1}{2}", "{2} {1}")).format(
        rng.choice(WORDS), characters, rng.choice(WORDS)
      )
    )
  return found


def pictures() -> list[PIL.Image.Image]:
  """Images of many sizes and formats, decoded by Pillow.

  None is of another mode than RGB and grey, which open_clip resizes before it converts them. None leaves an odd number
  of pixels beside a crop of 224, of which transformers gives the larger half to the other side.
  """
  rng = np.random.default_rng(0)
  sizes = [
    (300, 200),
    (64, 96),
    (224, 224),
    (225, 224),
    (50, 400),
    (400, 50),
    (5, 7),
    (1, 1),
    (1, 30),
    (640, 480),
    (37, 91),
  ]
  found = [_picture(rng, *size) for size in sizes]
  odd = _picture(rng, 231, 177)
  found += [odd.convert("L"), odd.convert("L").resize((99, 300)), odd.crop((0, 0, 177, 177))]
  for format, options in (
    ("JPEG", {"quality": 30}),
    ("JPEG", {"progressive": True, "subsampling": 0}),
    ("JPEG", {"exif": _rotated()}),
    ("PNG", {}),
    ("WEBP", {"quality": 50}),
    ("BMP", {}),
  ):
    file = io.BytesIO()
    odd.save(file, format, **options)
    found.append(PIL.Image.open(file))
  return found


def _picture(rng: np.random.Generator, width: int, height: int) -> PIL.Image.Image:
  """Smooth in parts, and noisy in parts."""
  noise = rng.integers(0, 256, (height, width, 3))
  ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
  mixed = np.where(np.arange(width)[:, None] < width / 2, noise, ramp)
  return PIL.Image.fromarray(mixed.astype(np.uint8))


def _rotated() -> PIL.Image.Exif:
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  return exif


if __name__ == "__main__":
  for caption in captions():
    print(repr(caption))
