import json
from pathlib import Path
import pickle

import fsspec
import pytest

from declip_jax.data.sources.coco import open_coco
from declip_jax.data.storage import files

ANNOTATIONS = {
  "images": [{"id": number, "file_name": f"{number:012d}.jpg", "width": 1} for number in (30, 10, 20, 40)],
  "annotations": [
    {"image_id": 10, "id": 1, "caption": " a dog\n"},
    {"image_id": 30, "id": 2, "caption": "a cat"},
    {"image_id": 10, "id": 3, "caption": "a hound"},
    {"image_id": 99, "id": 4, "caption": "nobody knows"},
    {"image_id": 40, "id": 5, "caption": "  "},
  ],
}
SPLITS = {
  "images": [
    {
      "filepath": folder,
      "filename": f"{number}.jpg",
      "imgid": number,
      "split": split,
      "sentences": [{"raw": f"text {number}.{j}", "tokens": []} for j in range(number)],
    }
    for number, (folder, split) in enumerate(
      [("a", "test"), ("a", "test"), ("b", "train"), ("b", "test"), ("b", "val")]
    )
  ],
  "dataset": "coco",
}


def write(path: Path, content: object) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))
  return str(path)


def write_images(folder: Path, *names: str) -> None:
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize(
  "folder", [".", "images", "..", "../images", "../train2017", "train2017", "../images/train2017"]
)
def test_captions_by_image_and_their_folder(tmp_path, folder):
  path = write(tmp_path / "annotations" / "captions_train2017.json", ANNOTATIONS)
  write_images(tmp_path / "annotations" / folder, f"{10:012d}.jpg", f"{30:012d}.jpg")
  source = open_coco(path)
  assert list(source) == [
    {"image": b"000000000030.jpg", "captions": ("a cat",), "label": -1, "id": "captions_train2017.json:30"},
    {"image": b"000000000010.jpg", "captions": ("a dog", "a hound"), "label": -1, "id": "captions_train2017.json:10"},
  ]
  assert source.skipped == {"damaged record": 1, "no caption": 2}
  assert len(pickle.dumps(source)) < 500 + 4 * len(str(tmp_path))
  assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_captions_without_text_are_no_captions(tmp_path):
  images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(2)]
  captions = [{"image_id": number, "caption": text} for number, text in enumerate(["\u200b", "a dog"])]
  write_images(tmp_path, "1.jpg")
  source = open_coco(write(tmp_path / "captions.json", {"images": images, "annotations": captions}))
  assert [example["captions"] for example in source] == [("a dog",)]
  assert source.skipped == {"no caption": 1}


def test_images_that_are_not_found(tmp_path):
  path = write(tmp_path / "captions_val2014.json", ANNOTATIONS)
  with pytest.raises(FileNotFoundError, match=rf"none of .*000030\.jpg.* in {tmp_path}, .*/val2014.*\?root=FOLDER"):
    open_coco(path)
  write_images(tmp_path / "far away", f"{30:012d}.jpg")
  assert open_coco(f"{path}?root={tmp_path}/far away/")[0]["image"] == b"000000000030.jpg"
  with pytest.raises(FileNotFoundError, match="no readable image among 2 tried"):
    open_coco(f"{path}?root={tmp_path}")


def test_ids_may_be_texts_in_one_list_and_numbers_in_the_other(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
  images = [{"id": known, "file_name": f"{name}.jpg"} for known, name in ((7, "a"), ("8", "b"), (9.0, "c"), ("x", "d"))]
  notes = [{"image_id": known, "caption": f"of {known}"} for known in ("7", 8, "9", "x", 10**30, True)]
  source = open_coco(write(tmp_path / "captions.json", {"images": images, "annotations": notes}))
  assert [example["captions"] for example in source] == [("of 7",), ("of 8",), ("of 9",), ("of x",)]
  assert source[3]["id"] == "d.jpg"
  assert source.skipped == {"damaged record": 2}


def test_advice_for_names_that_no_root_changes(tmp_path):
  for name, advice in [("/far/a.jpg", "the path is absolute"), ("https://a.example/a.jpg", "allow=https")]:
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    with pytest.raises(FileNotFoundError, match=advice) as error:
      open_coco(write(tmp_path / "captions.json", content))
    assert "root=FOLDER" not in str(error.value)


def test_karpathy_splits(tmp_path):
  path = write(tmp_path / "dataset_coco.json", SPLITS)
  write_images(tmp_path / "images", *(f"{image['filepath']}/{image['filename']}" for image in SPLITS["images"]))
  source = open_coco(f"{path}?split=test")
  assert [example["image"] for example in source] == [b"a/1.jpg", b"b/3.jpg"]
  assert [example["captions"] for example in source] == [("text 1.0",), ("text 3.0", "text 3.1", "text 3.2")]
  assert source.skipped == {"no caption": 1}
  assert [example["id"] for example in open_coco(f"{path}?split=val+train")] == [
    "dataset_coco.json:2",
    "dataset_coco.json:4",
  ]


def test_a_split_is_needed_where_there_are_splits_and_only_there(tmp_path):
  path = write(tmp_path / "dataset_coco.json", SPLITS)
  for location in (path, f"{path}?split=restval"):
    with pytest.raises(ValueError, match=r"\?split=NAME.*'test': 3, 'train': 1, 'val': 1"):
      open_coco(location)
  with pytest.raises(ValueError, match="captions.json: split=test"):
    open_coco(write(tmp_path / "captions.json", ANNOTATIONS) + "?split=test")


def test_flickr30k_has_no_folder_in_its_names(tmp_path):
  images = [{key: value for key, value in image.items() if key != "filepath"} for image in SPLITS["images"]]
  path = write(tmp_path / "dataset_flickr30k.json", {"images": images})
  write_images(tmp_path / "flickr30k-images", "1.jpg", "3.jpg")
  assert [example["image"] for example in open_coco(f"{path}?split=test")] == [b"1.jpg", b"3.jpg"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({**ANNOTATIONS, "annotations": [{"image_id": 10, "bbox": []}]}, r"annotations with captions.*\['images', 'annot"),
    ([{"image": "a.jpg", "caption": "x"}], "its fields: none"),
    ({"images": []}, "expected images and annotations"),
  ],
)
def test_other_json_is_an_error(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    open_coco(write(tmp_path / "instances.json", content))


@pytest.mark.parametrize(
  ("content", "bad"),
  [
    ({**ANNOTATIONS, "images": [1, None, *ANNOTATIONS["images"]]}, 2),
    ({**ANNOTATIONS, "annotations": [*ANNOTATIONS["annotations"], None]}, 1),
    ({**ANNOTATIONS, "images": [*ANNOTATIONS["images"], {"id": 10, "file_name": "other.jpg"}]}, 1),
  ],
)
def test_elements_that_are_not_objects_and_second_ids_are_damaged_records(tmp_path, content, bad):
  write_images(tmp_path, f"{10:012d}.jpg", f"{30:012d}.jpg")
  whole = open_coco(write(tmp_path / "captions.json", ANNOTATIONS))
  source = open_coco(write(tmp_path / "more.json", content))
  captions = [[example["captions"] for example in each] for each in (whole, source)]
  assert captions[0] == captions[1]
  assert source.skipped == {**whole.skipped, "damaged record": whole.skipped["damaged record"] + bad}


def test_sentences_that_are_not_objects_are_skipped(tmp_path):
  images = [{"filename": "a.jpg", "split": "test", "sentences": [None, "x", {"raw": "a dog"}]}, None]
  write_images(tmp_path, "a.jpg")
  source = open_coco(f"{write(tmp_path / 'dataset.json', {'images': images})}?split=test")
  assert [example["captions"] for example in source] == [("a dog",)]
  assert source.skipped == {"damaged record": 1}


@pytest.mark.parametrize("content", [{**ANNOTATIONS, "images": {"id": 1}}, {**ANNOTATIONS, "images": [1, 2]}])
def test_a_file_without_usable_images_is_named(tmp_path, content):
  with pytest.raises(ValueError, match=r"captions\.json.*no usable sample") as error:
    open_coco(write(tmp_path / "captions.json", content))
  assert "\n" not in str(error.value)


def test_invalid_ids_are_damaged_records(tmp_path, caplog):
  images = [*ANNOTATIONS["images"], {"file_name": "a.jpg"}, {"id": [1], "file_name": "b.jpg"}]
  annotations = [*ANNOTATIONS["annotations"], {"image_id": [1], "caption": "x"}, {"caption": "x"}]
  path = write(tmp_path / "captions_train2017.json", {"images": images, "annotations": annotations})
  write_images(tmp_path, f"{10:012d}.jpg", f"{30:012d}.jpg")
  source = open_coco(path)
  assert [example["captions"] for example in source] == [("a cat",), ("a dog", "a hound")]
  assert source.skipped == {"damaged record": 5, "no caption": 2}
  assert f"{path}: annotation of an unknown image: {{'image_id': [1]" in caplog.text


def test_odd_karpathy_fields_are_damaged_records(tmp_path):
  images = [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "one"}]}]
  images += [{"filename": name, "split": "test", "sentences": [{"raw": "x"}]} for name in (None, "")]
  images += [{"filename": "2.jpg", "split": ["test"], "sentences": None}, {"filename": "3.jpg", "split": "test"}]
  write_images(tmp_path, "1.jpg")
  source = open_coco(write(tmp_path / "dataset.json", {"images": images}) + "?split=test")
  assert [example["captions"] for example in source] == [("one",)]
  assert source.skipped == {"damaged record": 2, "no caption": 1}


def test_no_json_and_several_files_are_errors(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.json").write_text("{")
  with pytest.raises(ValueError, match=r"a\.json: not JSON"):
    open_coco(f"{tmp_path}/a.json")
  with pytest.raises(ValueError, match="one file, got 2"):
    open_coco(f"{tmp_path}/*.json")


def test_the_file_is_parsed_once(tmp_path, monkeypatch):
  path = write(tmp_path / "captions_train2017.json", ANNOTATIONS)
  write_images(tmp_path / "train2017", f"{30:012d}.jpg")
  open_coco(path)
  read = []
  monkeypatch.setattr(files, "read", lambda path, *_: read.append(path) or b"")
  open_coco(path)
  assert [Path(path).suffix for path in read] == [".jpg"]


def test_at_urls(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  memory = fsspec.filesystem("memory")
  memory.pipe("/coco/annotations/captions_train2017.json", json.dumps(ANNOTATIONS).encode())
  memory.pipe("/coco/train2017/000000000030.jpg", b"x")
  assert open_coco("memory://coco/annotations/captions_train2017.json")[0]["image"] == b"x"
