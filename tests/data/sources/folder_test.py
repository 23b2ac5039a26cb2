import inspect
import os
from pathlib import Path
import pickle
import sys

import fsspec
import pytest

from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.folder import open_folder
from declip_jax.data.storage import patterns


def write(folder: Path, *names: str, **texts: str) -> str:
  """Images whose contents are their names, and texts with the given contents."""
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))
  for name, text in texts.items():
    (folder / f"{name}.txt").write_text(text, "utf-8")
  return str(folder)


def test_folders_are_classes_in_alphabetical_order(tmp_path):
  names = ["n2/b.JPEG", "n10/ä ü.png", "n10/deep/c.webp", "n2/a.jpg"]
  path = write(tmp_path / "train", *names, "n2/notes.txt", "n2/.hidden.jpg", ".git/x.jpg", "n2/no images/x.json")
  source = open_folder(path + "/")
  assert source.classnames == ("n10", "n2")
  assert [(example["id"], example["label"], example["captions"]) for example in source] == [
    ("n10/ä ü.png", 0, ()),
    ("n10/deep/c.webp", 0, ()),
    ("n2/a.jpg", 1, ()),
    ("n2/b.JPEG", 1, ()),
  ]
  assert [example["image"].decode() for example in source] == [example["id"] for example in source]
  assert list(pickle.loads(pickle.dumps(source))) == list(source)
  assert len(pickle.dumps(source)) < 500
  assert not (tmp_path / "train" / ".declip_jax").exists()  # other tools would treat it as a class


def test_folders_below_those_of_the_classes_are_groups(tmp_path):
  path = write(tmp_path, "cat/v_2/a/1.jpg", "cat/v_1/1.jpg", "dog/v_2/1.jpg", "dog/1.jpg")
  source = open_folder(f"{path}?group=video,part")
  assert source.classnames == ("cat", "dog")
  groups = {example["id"]: example["groups"] for example in source}
  videos = {name: of["video"] for name, of in groups.items()}
  assert videos["cat/v_2/a/1.jpg"] == videos["dog/v_2/1.jpg"] != videos["cat/v_1/1.jpg"]
  assert groups["dog/1.jpg"] == {"video": -1, "part": -1}
  assert [name for name, of in groups.items() if of["part"] >= 0] == ["cat/v_2/a/1.jpg"]
  assert "groups" not in open_folder(path)[0]
  with pytest.raises(ValueError, match=r"group=a,b,c, but it has at most 2 folders between a class and an image"):
    open_folder(f"{path}?group=a,b,c")
  (tmp_path / "flat").mkdir()
  with pytest.raises(ValueError, match=r"group=video, but it has no classes"):
    open_folder(write(tmp_path / "flat", "a.jpg") + "?group=video")


@pytest.mark.parametrize(("images", "classnames", "left_out"), [(6, ("cat", "dog"), {".txt": 1}), (5, (), {})])
def test_folders_are_classes_although_a_few_images_have_texts(tmp_path, images, classnames, left_out):
  names = [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(images)]
  source = open_folder(write(tmp_path, *names, **{"cat/0": "a photo of a cat"}))
  assert source.classnames == classnames
  assert source.left_out == left_out
  assert source[0]["captions"] == (() if classnames else ("a photo of a cat",))


@pytest.mark.parametrize("changed", ["a.jpg", "a.txt"])
def test_files_that_are_replaced_in_place_change_the_stamp_but_not_the_index(tmp_path, changed):
  path = write(tmp_path, "a.jpg", "b.jpg", a="one", b="two")
  before = open_folder(path)
  assert open_folder(path).stamp == before.stamp == pickle.loads(pickle.dumps(before)).stamp
  (tmp_path / changed).write_bytes(b"other")
  after = open_folder(path)
  assert after.stamp != before.stamp
  assert after._index == before._index
  assert pickle.loads(pickle.dumps(before)).stamp == before.stamp  # workers agree with the process that opened it


def test_numbers_as_folders_are_names_too(tmp_path):
  source = open_folder(write(tmp_path, *(f"{number}/x.png" for number in (0, 1, 2, 10))))
  assert source.classnames == ("0", "1", "10", "2")
  assert [example["label"] for example in source] == [0, 1, 2, 3]


def test_classnames_txt_names_the_folders(tmp_path):
  path = write(tmp_path, "n1/x.jpg", "n2/x.jpg", classnames="tench\nhot dog\n")
  assert open_folder(path).classnames == ("tench", "hot dog")
  write(tmp_path, classnames="tench\n")
  with pytest.raises(ValueError, match="classnames.txt has 1 line, but there are 2 folders"):
    open_folder(path)


def test_classnames_txt_names_numbered_folders_by_their_number(tmp_path):
  numbers = [str(number) for number in range(12)]
  path = write(tmp_path, *(f"{number}/x.png" for number in numbers), classnames="\n".join(f"no {n}" for n in numbers))
  source = open_folder(path)
  assert [(example["id"], source.classnames[example["label"]]) for example in source] == [
    (f"{number}/x.png", f"no {number}") for number in sorted(numbers)
  ]


def test_equal_names_of_classes_are_reported(tmp_path, caplog):
  path = write(tmp_path, "n1/x.jpg", "n2/x.jpg", "n3/x.jpg", classnames="crane\nheron\ncrane\n")
  assert open_folder(path).classnames == ("crane", "heron", "crane")
  assert f"folder:{path}: several classes are named 'crane'" in caplog.text


def test_classnames_txt_above_a_split(tmp_path):
  write(tmp_path, "val/n1/x.jpg", "val/n2/x.jpg", classnames="tench\nhot dog\n")
  assert open_folder(f"{tmp_path}/val").classnames == ("tench", "hot dog")


def test_with_texts_next_to_images_folders_are_not_classes(tmp_path):
  path = write(tmp_path, "0/a.b.jpg", "1/c.png", "1/d.png", **{"0/a.b": " one\n\n  two \r\n", "1/c": "ünï"})
  source = open_folder(path)
  assert [(example["id"], example["captions"], example["label"]) for example in source] == [
    ("0/a.b.jpg", ("one", "two"), -1),
    ("1/c.png", ("ünï",), -1),
    ("1/d.png", (), -1),
  ]
  assert source.classnames == ()
  write(tmp_path, **{"1/c": "changed"})
  assert source[1]["captions"] == ("changed",)


@pytest.mark.parametrize(
  "name", ["IMG_1.TXT", "IMG_1.Txt", "IMG_1.JPG.txt", "IMG_1.JPG.TXT", "IMG_1.caption", "IMG_1.CAPTION"]
)
def test_names_of_texts(tmp_path, name):
  path = write(tmp_path, "a/IMG_1.JPG", "b/2.png")
  (tmp_path / "a" / name).write_text("a dog")
  assert [example["captions"] for example in open_folder(path)] == [("a dog",), ()]
  (tmp_path / "a" / "IMG_1.txt").write_text("the first that exists")
  assert open_folder(path)[0]["captions"] == ("the first that exists",)


def test_captions_are_cut_at_line_ends_only(tmp_path):
  path = write(tmp_path, "1.jpg", **{"1": "a\x0cred\u2028square\r\nblue\x85square\x1cin grey\n"})
  assert open_folder(path)[0]["captions"] == ("a\x0cred\u2028square", "blue\x85square\x1cin grey")


def test_a_flat_folder_of_images_alone(tmp_path):
  source = open_folder(write(tmp_path, "a.jpg", "b.jpg"))
  assert [(example["captions"], example["label"]) for example in source] == [((), -1)] * 2


def test_images_next_to_the_folders_of_classes_are_counted(tmp_path):
  source = open_folder(write(tmp_path, "cat/a.jpg", "overview.jpg"))
  assert ([example["id"] for example in source], source.skipped) == (["cat/a.jpg"], {"damaged record": 1})


def test_files_of_other_formats_are_counted_by_suffix(tmp_path):
  names = ["cat/1.jpg", "cat/2.HEIC", "cat/deep/3.HEIC", "dog/4.png", "dog/5.jxl", "dog/6", "dog/notes.txt"]
  path = write(tmp_path, *names, "dog/.hidden.heic", classnames="a cat\na dog\n")
  source = open_folder(path)
  assert source.left_out == {".HEIC": 2, ".jxl": 1, ".txt": 1, "no suffix": 1}
  assert pickle.loads(pickle.dumps(source)).left_out == source.left_out
  captioned = open_folder(write(tmp_path / "dog", **{"4": "a dog"}))
  assert captioned.left_out == {".jxl": 1, ".txt": 1, "no suffix": 1}  # 4.txt is a caption, notes.txt is not
  (tmp_path / "cat" / "1.jpg").unlink()
  with pytest.raises(FileNotFoundError, match=r"no image .*; found 2 \.HEIC"):
    open_folder(f"{path}/cat")


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path):
  deep = "d/" * 200
  path = write(tmp_path, "d/a.jpg", f"{deep}b.jpg")
  before = sys.getrecursionlimit()
  sys.setrecursionlimit(len(inspect.stack()) + 100)
  try:
    source = open_folder(path)
  finally:
    sys.setrecursionlimit(before)
  assert [example["id"] for example in source] == ["d/a.jpg", f"{deep}b.jpg"]


def test_splits_are_not_classes(tmp_path):
  path = write(tmp_path, "train/cat/a.jpg", "val/cat/a.jpg")
  with pytest.raises(ValueError, match=f"train, val are splits.*open {path}/train"):
    open_folder(path)
  path = write(tmp_path / "kaggle", "test_set/cat/a.jpg", "training_set/cat/a.jpg")
  with pytest.raises(ValueError, match=f"open {path}/training_set"):
    open_folder(path)


def test_a_class_without_images_is_an_error_and_does_not_renumber_the_others(tmp_path):
  path = write(tmp_path, "ant/notes.json", "bee/a.jpg", "cat/a.jpg")
  (tmp_path / "dog").mkdir()
  with pytest.raises(ValueError, match="no image in ant, dog, but each folder is a class"):
    open_folder(path)
  write(tmp_path, "ant/deep/a.jpg", "dog/a.jpg")
  assert [example["label"] for example in open_folder(path)] == [0, 1, 2, 3]
  (tmp_path / "empty").mkdir()
  assert open_folder(write(tmp_path, **{"bee/a": "a bee"})).classnames == ()  # with captions, folders are not classes


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
  path = write(tmp_path, "ant/a.jpg", "bee/a.jpg")
  scandir = os.scandir

  def deny(folder):
    if os.fspath(folder).endswith("/ant"):
      raise PermissionError(13, "Permission denied", folder)
    return scandir(folder)

  monkeypatch.setattr(os, "scandir", deny)
  with pytest.raises(PermissionError, match="/ant"):
    open_folder(path)


def test_links_that_go_round_in_a_circle_add_nothing(tmp_path):
  path = write(tmp_path, "a/1.jpg", "b/2.jpg")
  links = {"a/up": "..", "loop": ".", "a/b/x": "..", "b/self": "../b", "self": "self", "a/3.jpg": "3.jpg"}
  for name, target in links.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(target)
  assert [example["id"] for example in open_folder(path)] == ["a/1.jpg", "b/2.jpg"]
  assert patterns.folders(str(tmp_path)) == ["a", "b", "loop"]


def test_the_stamp_follows_classnames_txt(tmp_path):
  path = write(tmp_path, "ant/a.jpg", "bee/a.jpg")
  stamps = [open_folder(path).stamp]
  for names in ("Ant\nBee\n", "a\nb\n", "b\na\n"):
    (tmp_path / "classnames.txt").write_text(names)
    stamps.append(open_folder(path).stamp)
  assert len(set(stamps)) == 4
  assert open_folder(path).stamp == stamps[-1]


def test_texts_that_are_not_utf_8_are_read_and_one_of_them_is_named(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr("absl.logging._log_counter_per_token", {})  # once per process, whatever ran before
  write(tmp_path, "1.jpg", "2.jpg", "3.jpg")
  for name, text in {"1": "grün".encode("utf-16"), "2": b"caf\xe9", "3": b"\xff latin"}.items():
    (tmp_path / f"{name}.txt").write_bytes(text)
  assert [example["captions"] for example in open_folder(str(tmp_path))] == [
    ("grün",),
    ("café",),
    ("ÿ latin",),
  ]
  assert f"{tmp_path}/2.txt is not UTF-8" in caplog.text
  assert caplog.text.count("is not UTF-8") == 1


def test_the_index_follows_the_files(tmp_path):
  path = write(tmp_path / "x", "a/1.jpg")
  assert len(open_folder(path)) == len(open_folder(path)) == 1
  assert len(list((tmp_path / ".declip_jax").iterdir())) == 1
  source = open_folder(write(tmp_path / "x", "a/2.jpg"))
  assert len(source) == 2
  (tmp_path / "x" / "a" / "1.jpg").unlink()
  with pytest.raises(BadSample, match=r"a/1\.jpg: .*No such file") as error:
    source[0]
  assert error.value.kind == "missing file"
  assert len(open_folder(path)) == 1


def test_links_and_names_that_are_not_utf_8(tmp_path):
  name = os.fsdecode(b"cat/caf\xe9.jpg")
  write(tmp_path / "all", name)
  (tmp_path / "few").mkdir()
  (tmp_path / "few" / "cat").symlink_to(tmp_path / "all" / "cat")
  (example,) = open_folder(f"{tmp_path}/few?allow=outside")
  assert example["image"] == b"cat/caf\xe9.jpg"


def test_links_stay_below_the_folder_unless_the_location_allows_more(tmp_path):
  write(tmp_path / "other", "secret.jpg", "more/x.jpg", **{"secret": "secret"})
  path = write(tmp_path / "set", "1.jpg", "2.jpg", **{"1": "one", "2": "two"})
  for name, target in {
    "3.jpg": "../other/secret.jpg",
    "3.txt": "1.txt",
    "4.jpg": "1.jpg",
    "4.txt": "../other/secret.txt",
  }.items():
    (tmp_path / "set" / name).symlink_to(target)
  (tmp_path / "set" / "more").symlink_to(tmp_path / "other" / "more")
  source = open_folder(path)
  assert [source[number]["captions"] for number in range(2)] == [("one",), ("two",)]
  assert source.skipped == {"not allowed": 1}
  for number in (2, 3):
    with pytest.raises(BadSample, match=r"leads outside .*/set; .*allow=outside") as error:
      source[number]
    assert error.value.kind == "not allowed"
  allowed = open_folder(f"{path}?allow=outside")
  assert [example["captions"] for example in allowed] == [("one",), ("two",), ("one",), ("secret",), ()]
  assert allowed.skipped == {}


@pytest.mark.parametrize("inside", ["dog/1.jpg", ""])
def test_a_class_that_is_a_link_outside_is_an_error_with_the_remedy(tmp_path, inside):
  write(tmp_path / "all", "cat/1.jpg")
  path = write(tmp_path / "few", *[inside] * bool(inside))
  (tmp_path / "few").mkdir(exist_ok=True)
  (tmp_path / "few" / "cat").symlink_to(tmp_path / "all" / "cat")
  with pytest.raises((ValueError, FileNotFoundError), match=r"few.*cat is a link that leads outside .*allow=outside"):
    open_folder(path)
  assert open_folder(f"{path}?allow=outside").classnames == ("cat", "dog")[: 1 + bool(inside)]


def test_no_folder_and_no_image(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: no such folder"):
    open_folder(f"{tmp_path}/none")
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no image"):
    open_folder(str(tmp_path))
  with pytest.raises(ValueError, match="bad location"):
    open_folder(f"{tmp_path}?label=x")


@pytest.mark.parametrize("folder", ["memory://pets", "memory:///pets/"])
def test_at_urls(tmp_path, monkeypatch, folder):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  memory = fsspec.filesystem("memory")
  memory.pipe({"/pets/dog/a.jpg": b"a", "/pets/cat/pets/b.jpg": b"b", "/pets/classnames.txt": b"Cat\nDog\n"})
  source = open_folder(folder)
  assert [(example["image"], example["label"], example["id"]) for example in source] == [
    (b"b", 0, "cat/pets/b.jpg"),
    (b"a", 1, "dog/a.jpg"),
  ]
  assert source.classnames == ("Cat", "Dog")


def test_hidden_folders_at_urls_are_skipped(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  names = ["dog/a.jpg", "dog/.git/x.jpg", ".ipynb_checkpoints/c.jpg", ".x/deep/d.jpg", "cat/b.jpg", "cat/.hidden.jpg"]
  fsspec.filesystem("memory").pipe({f"/hidden/{name}": name.encode() for name in names})
  local, remote = open_folder(write(tmp_path / "hidden", *names)), open_folder("memory://hidden")
  assert remote.classnames == local.classnames == ("cat", "dog")
  assert list(remote) == list(local)
  assert len(remote) == 2
