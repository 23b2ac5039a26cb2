import os

import pytest

from declip_jax.data.storage import files, patterns, remote


def names(folder: str, pattern: str) -> list[str]:
  return [
    path.rpartition("/")[2] for path in patterns.expand("::".join(f"{folder}/{one}" for one in pattern.split("::")))
  ]


def test_patterns_find_files(folder):
  assert names(folder, "*.bin") == ["a-08.bin", "a-09.bin", "a-10.bin"]
  assert names(folder, "a-{08..09}.bin") == ["a-08.bin", "a-09.bin"]
  assert names(folder, "a-{09..09}.bin::a-1?.bin::a-08.bin") == ["a-09.bin", "a-10.bin", "a-08.bin"]
  assert names(folder.rpartition("/")[0], f"{folder.rpartition('/')[2]}/**/a-0[89].bin") == ["a-08.bin", "a-09.bin"]
  assert all(files.exists(path) for path in patterns.expand(f"{folder}/*.bin"))


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [  # as bash expands them
    ("{b,a}-0", ["b-0", "a-0"]),
    ("{a-{08..10},val}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "val.tar"]),
    ("{a,{b,{c,d}}}{1..2}", ["a1", "a2", "b1", "b2", "c1", "c2", "d1", "d2"]),
    ("x{,-y}", ["x", "x-y"]),
    ("{x}-{a,b}", ["{x}-a", "{x}-b"]),
    ("{x{a,b}}", ["{xa}", "{xb}"]),
    ("{a-{1..2}", ["{a-1", "{a-2"]),
    ("a}b", ["a}b"]),
  ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
  assert patterns._braces(pattern) == expected


def test_alternatives_find_files(folder):
  assert names(folder, "a-{10,08}.bin") == ["a-10.bin", "a-08.bin"]
  assert names(folder, "{a-0*,a-10}.bin") == ["a-08.bin", "a-09.bin", "a-10.bin"]
  with pytest.raises(FileNotFoundError, match="no file matches .*a-11.bin"):
    names(folder, "a-{10,11}.bin")


def test_a_local_path_that_exists_is_found_whatever_characters_it_has(tmp_path):
  inside = tmp_path / "[x] {a,b}"
  inside.mkdir()
  for name in ("v-0.tar", "v-1.tar", "w[1]*?{0..1}.tar"):
    (inside / name).write_bytes(b"")
  assert names(str(inside), "v-0.tar") == ["v-0.tar"]
  assert names(str(inside), "w[1]*?{0..1}.tar") == ["w[1]*?{0..1}.tar"]
  plain = tmp_path / "[x]"
  plain.mkdir()
  for number in range(2):
    (plain / f"v-{number}.tar").write_bytes(b"")
  assert names(str(plain), "v-{0..1}.tar") == ["v-0.tar", "v-1.tar"]
  assert names(str(plain), "v-*.tar") == ["v-0.tar", "v-1.tar"]


def test_a_range_lists_its_folder_once(tmp_path, monkeypatch):
  for number in range(50):
    (tmp_path / f"a-{number:02d}.bin").write_bytes(b"")
  asked = []
  isfile, globbed = os.path.isfile, patterns.glob.glob
  monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))
  monkeypatch.setattr(patterns.glob, "glob", lambda *given, **more: asked.append(given) or globbed(*given, **more))
  assert len(patterns.expand(f"{tmp_path}/a-{{00..49}}.bin")) == 50
  assert asked == [f"{tmp_path}/a-{{00..49}}.bin"]


def test_the_names_in_a_folder(folder):
  assert patterns.names(folder) == patterns.names(f"{folder}/") == ["a-08.bin", "a-09.bin", "a-10.bin"]
  assert patterns.names(f"{folder}/nowhere") == []


@pytest.mark.parametrize("pattern", ["a-{08..11}.bin", "a-11.bin", "b-*.bin", "", "*/*.bin"])
def test_a_pattern_without_a_file_is_an_error_that_lists_what_is_there(folder, pattern):
  with pytest.raises(FileNotFoundError, match=r"no file matches .*; in .*: a-08.bin, a-09.bin, a-10.bin"):
    patterns.expand(f"{folder}/{pattern}")


def test_an_empty_range_and_an_empty_folder_are_errors(folder):
  with pytest.raises(ValueError, match=r"range \{3\.\.1\} is empty"):
    patterns.expand(f"{folder}/{{3..1}}.bin")
  with pytest.raises(FileNotFoundError, match=r"no file matches .*/nowhere/\*; in .*/nowhere: nothing"):
    patterns.expand(f"{folder}/nowhere/*")


def test_an_unknown_url_scheme_or_a_missing_package_is_a_user_error():
  with pytest.raises(ValueError, match="foo"):
    patterns.expand("foo://bucket/a.tar")
  assert not remote.is_url("/a/b")
  assert not remote.is_url("file:///a/b")
  assert remote.is_url("gs://a/b")


def test_commands_are_not_run(tmp_path):
  with pytest.raises(ValueError, match="pipe: is a command"):
    patterns.expand(f"pipe:touch {tmp_path}/ran")
  assert not list(tmp_path.iterdir())


def test_colons_and_slashes_within_a_path_make_no_url(tmp_path):
  (tmp_path / "x:").mkdir()
  (tmp_path / "x:" / "y.tar").touch()
  assert patterns.expand(f"{tmp_path}/x://y.tar") == [f"{tmp_path}/x:/y.tar"]
