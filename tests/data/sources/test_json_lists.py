"""JSON files with lists joined by ids, such as COCO's."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.data.sources.open import open_source
from fmjax.errors import UserError

COCO = {
    "info": {"year": 2017, "tags": [{"not": "a record"}]},
    "categories": [{"id": 1, "name": 'a "cat"'}, {"id": 5, "name": "dog"}],
    "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 7, "file_name": "}7].jpg"}, {"id": 3, "file_name": "ü.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2], [3, 4]]},
        {"id": 2, "image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"id": 3, "image_id": 7, "category_id": 1, "segmentation": {"counts": [1, 2], "size": [3, 4]}},
    ],
}


def opened(tmp_path, content):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1))
    return open_source("json", str(path), "train")


def records(source) -> list:
    return [source[index] for index in range(len(source))]


def test_annotations_of_images(tmp_path):
    source = opened(tmp_path, COCO)
    assert source.columns == ("id", "file_name", "annotations") and len(source) == 3
    first, second, third = records(source)
    assert first["file_name"] == "9.jpg" and [one["id"] for one in first["annotations"]] == [2]
    assert second["file_name"] == "}7].jpg" and [one["id"] for one in second["annotations"]] == [1, 3]
    assert second["annotations"][0] == COCO["annotations"][0] | {"category": {"id": 5, "name": "dog"}}
    assert third == COCO["images"][2] | {"annotations": []} and source.where(2) == "a.json: images[2]"
    assert records(pickle.loads(pickle.dumps(source))) == [first, second, third]
    assert source.fingerprint()["source"] == "json"


def test_one_list(tmp_path):
    items = [{"text": "x", "n": [{"deep": 1}]}, {"text": "y", "m": None}]
    wanted = [{"text": "x", "n": [{"deep": 1}], "m": None}, {"text": "y", "n": None, "m": None}]
    assert records(opened(tmp_path, items)) == wanted
    assert records(opened(tmp_path, {"version": "1", "data": items})) == wanted


VALUES = st.recursive(st.integers() | st.text(), st.lists, max_leaves=5)


@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, min_size=1)))
def test_objects_are_found_in_any_json(tmp_path_factory, items):
    source_of = {"a": "[{", "rows": items, "b": {"c": [{"d": 1}]}}
    if not items:
        return
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(source_of), encoding="utf-8")
    source = open_source("json", str(path), "train")
    assert [{key: record[key] for key in item} for record, item in zip(records(source), items, strict=True)] == items


def change(**lists) -> dict:
    return COCO | lists


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a.json: no records for train"),
        ("hello", "a.json: is not a complete JSON file; fetch it again"),
        (json.dumps(COCO)[:-40], "a.json: is not a complete JSON file; fetch it again"),
        ('{"a": [{"b": 1]}', r"a.json: is not JSON \(unexpected \] at byte 14\)"),
        ('[{"a": 1}, {"a" 1}]', r"a.json: \[1\] is not JSON \("),
        ({"a": [{"x": 1}], "b": [{"y": 1}]}, "a.json: has the lists a, b, but no ids that join them"),
        (change(images=[{"id": 9}, {"id": 7}, {"id": 9}]), r"images\[0\] and images\[2\] have the same id; correct one"),
        (change(images=[*COCO["images"][:1], {"id": 1}, {"id": 2}]), r"annotations\[0\] has the image_id of none of images"),
        (change(categories=COCO["categories"][:1]), r"annotations\[0\] has the category_id of none of categories"),
        (change(categories=[{"id": 5}, {"id": 1}, {"id": 5}]), r"categories\[2\] has the id of an earlier one"),
        ('{"text": "a"}\n{"text": "b"}\n', "no list of objects; .*data.source=jsonl"),
    ],
)
def test_what_is_malformed(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_parsed_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(2000)]
    boxes = [{"id": n, "image_id": n // 2, "category_id": 1, "bbox": list(range(200))} for n in range(4000)]
    content = change(images=images, annotations=boxes)
    size = len(json.dumps(content))
    opened(tmp_path, COCO)
    (tmp_path / "b.json").write_text(json.dumps(content))
    tracemalloc.start()
    try:
        source = open_source("json", str(tmp_path / "b.json"), "train")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 4 and len(source) == 2000
    assert [one["id"] for one in source[1999]["annotations"]] == [3998, 3999]


def test_a_subset_with_more_categories_than_images(tmp_path, capsys):
    subset = COCO | {"categories": [*COCO["categories"], *({"id": number} for number in range(20, 30))]}
    source = opened(tmp_path, subset)
    assert len(source) == 3 and source.where(0) == "a.json: images[0]"
    assert "a.json: each of images is a record; data.record=categories would make one of each" in capsys.readouterr().err
    other = open_source("json", str(tmp_path / "a.json"), "train", record="categories")
    assert len(other) == 12 and other.fingerprint()["record"] == "categories"
    assert [one["id"] for one in other[1]["annotations"]] == [1]
    assert other[1]["annotations"][0]["image"]["id"] == 7 and not capsys.readouterr().err
    assert source.fingerprint()["record"] == "images"  # earlier versions took the largest list
    assert "record" not in opened(tmp_path / "b", COCO).fingerprint()
    with pytest.raises(UserError, match='data.record="image"'):
        open_source("json", str(tmp_path / "a.json"), "train", record="image")


def test_the_list_that_is_named(tmp_path):
    opened(tmp_path, [{"x": 1}])
    loose = {"a": [{"x": 1}], "b": [{"y": 1}, {"y": 2}], "none": []}
    for content, record, message in [
        ([{"x": 1}], "images", "a.json: is one list, which has no name; unset data.record"),
        ({"x": 1}, "images", "a.json: no records for train: has no list of objects"),
        (loose, "none", r"data.record=none: this list has no objects; name another one \(a, b\)"),
        (loose, "c", 'data.record="c".* a, b'),
    ]:
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            open_source("json", str(tmp_path / "a.json"), "train", record=record)
    (tmp_path / "a.json").write_text(json.dumps(loose))
    assert records(open_source("json", str(tmp_path / "a.json"), "train", record="b")) == [{"y": 1}, {"y": 2}]
