import fsspec
import pytest

from declip_jax.data.storage import layouts

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


def test_classnames_are_read_next_to_a_file_or_above_its_split(folder):
  def write(place: str, contents: bytes) -> None:
    with fsspec.open(f"{folder}/{place}", "wb") as file:
      file.write(contents)

  assert layouts.classnames(f"{folder}/a-08.bin") == ()
  write("classnames.txt", b"dog\n hot dog \n\ncat\n \n\n")
  assert layouts.classnames(f"{folder}/a-08.bin") == ("dog", "hot dog", "", "cat")
  assert layouts.classnames(f"{folder}/test/0.tar") == layouts.classnames(f"{folder}/val2017/0.tar") != ()
  assert layouts.classnames(f"{folder}/pets/0.tar") == ()
  write("test/classnames.txt", "\ufeffcafé\r\nsquare".encode())
  assert layouts.classnames(f"{folder}/test/0.tar") == ("café", "square")
  assert layouts.templates(f"{folder}/test/0.tar") == ()
  write(layouts.TEMPLATES, b"a photo of a {c}.\n\n{}\n")
  assert layouts.templates(f"{folder}/test/0.tar") == ("a photo of a {}.", "{}")


@pytest.mark.parametrize(
  ("lines", "names"),
  [
    (["0: cat", "1: dog", "2: Cat"], ["cat", "dog", "Cat"]),
    (["1 dog", "0 cat", ""], ["cat", "dog"]),
    (["1\tcat", "", "2\tdog"], ["cat", "dog"]),
    (["1 001.Bird_1", "2 002.Bird_2"], ["001.Bird_1", "002.Bird_2"]),  # CUB
    (['0,"shark, great"', "1,ray"], ["shark, great", "ray"]),
    (["{0: 'tench, Tinca tinca',", ' 1: "crane\'s bill"}'], ["tench, Tinca tinca", "crane's bill"]),
    (['{"0": "tench",', '"1": "crane"}'], ["tench", "crane"]),
    (['"shark, great"', "ray", 'a "big" dog', '"hot" "dog"', '"a ""b"" c"'],) * 2,
    (["0 objects", "1 object", "2 objects"],) * 2,  # numbers are part of the names
    (["0: cat", "dog"],) * 2,
    (["0: cat", "2: dog"],) * 2,
    (["2 euros", "3 pounds"],) * 2,
    (["1 euro"],) * 2,
    (["{0: tench,", "1: crane}"],) * 2,
  ],
)
def test_names_are_paired_by_the_numbers_in_their_lines(tmp_path, lines, names):
  (tmp_path / "classnames.txt").write_text("\n".join(lines))
  plain = {'"shark, great"': "shark, great", '"a ""b"" c"': 'a "b" c'}
  assert layouts.classnames(f"{tmp_path}/0.tar") == tuple(plain.get(name, name) for name in names)


@pytest.mark.parametrize(
  ("name", "split", "is_split"),
  [
    ("train", "train", True),
    ("val2017", "validation", True),
    ("Training_Set", "train", True),
    ("cc3m-test-0001.tar", "test", False),
    ("captions_train2017.json", "train", False),
    ("trains", "", False),
    ("contest", "", False),
    ("images", "", False),
  ],
)
def test_names_of_splits(name, split, is_split):
  assert (layouts.split_of(name), layouts.is_split(name)) == (split, is_split)


def named(tmp_path, folders: list[str], lines: list[str]) -> list[str]:
  """The names of the folders, in the order given."""
  (tmp_path / "classnames.txt").write_text("\n".join(lines) + "\n")
  order = sorted(folders)
  names = dict(zip(order, layouts.classnames_of_folders(f"{tmp_path}/", order), strict=True))
  return [names[folder] for folder in folders]


@pytest.mark.parametrize(
  ("folders", "lines", "names"),
  [
    ([str(number) for number in range(12)], NUMBERS, NUMBERS),
    ([str(number + 1) for number in range(12)], NUMBERS, NUMBERS),
    ([f"class_{number}" for number in range(12)], NUMBERS, NUMBERS),
    ([f"{number}.{name[:2]}" for number, name in enumerate(NUMBERS)], NUMBERS, NUMBERS),
    (["cat", "Hot_Dog", "bird"], ["Bird", "cat", "hot dog"], ["cat", "hot dog", "Bird"]),
    (["n02", "n01"], ["n01 tench, Tinca tinca", "n02\tgoldfish"], ["goldfish", "tench, Tinca tinca"]),
    (["dog", "cat"], ["dog: Hound", "cat: Kitten"], ["Hound", "Kitten"]),
    (["n01440764", "n01443537"], ["tench", "goldfish"], ["tench", "goldfish"]),
    (["cold", "hot"], ["cold beer", "hot dog"], ["cold beer", "hot dog"]),
    (["one"], ["first"], ["first"]),
    (["n01440764", "n01443537"], ["1: goldfish", '0: "tench, x"'], ["tench, x", "goldfish"]),
    (["n01440764", "n01443537"], ["{0: 'tench', 1: 'goldfish'}"], ["tench", "goldfish"]),
    (["2.b", "1.a"], ["1 1.a", "2 2.b"], ["2.b", "1.a"]),
    (["1", "0", "2"], ['0: "a, b"', "1: c", "2: d"], ["c", "a, b", "d"]),
  ],
)
def test_folders_and_lines_that_fit(tmp_path, folders, lines, names):
  assert named(tmp_path, folders, lines) == names


@pytest.mark.parametrize(
  ("folders", "lines", "message"),
  [
    (["n03", "n07", "n09"], NUMBERS, "classnames.txt has 12 lines, but there are 3 folders"),
    (["cat", "dog"], ["cat"], "has 1 line, but there are 2"),
    (["a", "b", "c"], ["A1", "", "C1"], "line 2 is blank"),
    (["3", "7", "10"], ["x", "y", "z"], r"order of their numbers \(3 first\) or of the alphabet \(10 first\)"),
    (["bird", "cat", "dog"], ["dog", "cat", "birds"], "line 1, 'dog', would name the folder 'bird'"),
  ],
)
def test_folders_and_lines_that_do_not_fit(tmp_path, folders, lines, message):
  with pytest.raises(ValueError, match=message):
    named(tmp_path, folders, lines)


def test_folders_without_classnames_txt_have_their_own_names(tmp_path):
  assert layouts.classnames_of_folders(f"{tmp_path}/", ["a", "b"]) == ("a", "b")
