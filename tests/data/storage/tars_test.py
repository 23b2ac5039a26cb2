import io
import subprocess
import tarfile
import time

import pytest

from declip_jax.data.storage import tars
from declip_jax.data.storage.tars import AfterEnd, Member


def contents(name: str) -> bytes:
  return (name[:1].encode() * 700)[:700]


def packed(*names: str, format: int = tarfile.PAX_FORMAT, headers: dict[str, str] | None = None) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=format) as tar:
    for name in names:
      info = tarfile.TarInfo(name)
      info.size, info.pax_headers = 700, headers or {}
      tar.addfile(info, io.BytesIO(contents(name)))
  return file.getvalue()


def read(tar: bytes) -> list[Member]:
  return list(tars.members(io.BytesIO(tar), len(tar)))


def keys(tar: bytes) -> str:
  return "".join(member.key[0] for member in read(tar))


def test_joined_archives_are_read_one_after_the_other():
  first, second = packed("a.jpg", "b.jpg"), packed("ü" * 120 + ".jpg", "d.jpg")
  joined = first + second + first[:3072] + bytes(512) + first + bytes(2**20)
  assert keys(joined) == "abüdabab"
  for member in read(joined):
    assert joined[member.data : member.stop] == contents(member.key)
    assert next(tars.members(io.BytesIO(joined[member.start :]), member.stop - member.start)).key == member.key


@pytest.mark.parametrize(
  ("tail", "byte"),
  [(b"\n", 10240), (b"x" * 512, 10240), (bytes(2**17) + b"x" * 600, 10240 + 2**17), (bytes(2**24 + 10240), 3072)],
  ids=["newline", "block", "later", "zeros"],
)
def test_data_after_the_end_is_reported_and_members_before_it_are_kept(tail, byte):
  found = tars.members(io.BytesIO(packed("a.jpg", "b.jpg") + tail), 10240 + len(tail))
  assert [next(found).key, next(found).key] == ["a", "b"]
  with pytest.raises(AfterEnd, match=f"byte {byte}: "):
    next(found)


def test_a_gap_of_zeros_within_an_archive_is_damage():
  tar = bytearray(packed("a.jpg", "b.jpg", "c.jpg"))
  tar[1536:2560] = bytes(1024)  # the header of b and some of its contents
  with pytest.raises(AfterEnd, match="byte 2560"):
    read(bytes(tar))


def test_a_long_header_takes_linear_time():
  tar = packed("a.jpg", headers={"comment": "v" * 2**19})
  records = b"8 k=123\n" * 2**16
  tar = tar[:512] + records + tar[512 + len(records) :]
  start = time.perf_counter()
  assert keys(tar) == "a"
  assert time.perf_counter() - start < 1
  with pytest.raises(ValueError, match="byte 0: an extended header of 1.* bytes"):
    read(packed("a.jpg", headers={"comment": "v" * 2**20}))


@pytest.mark.parametrize("size", ["x", "-1", "9" * 5000, "²"])
def test_a_header_with_a_bad_size_is_damage(size):
  with pytest.raises(ValueError, match="byte 0: a member of .* bytes"):
    read(packed("a.jpg", headers={"size": size}))


@pytest.mark.parametrize("options", ["gnu", "posix", "posix --sparse-version=0.0", "posix --sparse-version=0.1"])
def test_sparse_files_are_recognised_and_files_after_them_are_found(tmp_path, options):
  with (tmp_path / "s.ppm").open("wb") as file:
    for number in range(40):  # more pieces than fit in a header
      file.seek(number * 2**16)
      file.write(b"x")
  (tmp_path / "t.txt").write_text("text")
  (tmp_path / "list").write_text("s.ppm\nt.txt\n")
  command = f"tar --format={options} --sparse -cf s.tar -T list".split()
  if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
    pytest.skip("needs GNU tar")
  tar = (tmp_path / "s.tar").read_bytes()
  image, text = read(tar)
  assert (image.key, image.suffix, image.sparse) == ("s", "ppm", True)
  assert (text.key, text.sparse, tar[text.data : text.stop]) == ("t", False, b"text")


def test_the_map_of_a_sparse_file_is_bounded():
  tar = bytearray(packed("a.jpg", format=tarfile.GNU_FORMAT))
  tar[156:157], tar[482] = b"S", 1
  with pytest.raises(ValueError, match="byte 512: the map of a sparse file"):
    read(bytes(tar[:600]))
  with pytest.raises(ValueError, match="byte 512: the map of a sparse file"):
    read(bytes(tar[:512]) + b"\xff" * 2**21)
