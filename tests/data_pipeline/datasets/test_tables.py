"""Label files as people write them: each form is understood, and said, or refused with its line and the remedy.
The rows of the tables in docs/data.md."""

import json
from pathlib import Path

import pytest

from cosa_fast.data_pipeline.datasets.labels import ImageNames, read_labels
from cosa_fast.errors import UserError

IDS = ("a", "b", "c.1")
CAT, DOG, BOTH = ("cat",), ("dog",), ("cat", "dog")
WANTED = {"a": BOTH, "b": DOG, "c.1": ()}

UNDERSTOOD = {
    "commas": "a.jpg,cat,dog\nb.jpg,dog\nc.1.jpg,none\n",
    "names_in_a_cell": 'a.jpg,"cat, dog"\nb.jpg,dog\nc.1.jpg,none\n',
    "semicolons_in_a_cell": "a.jpg,cat;dog\nb.jpg,dog\nc.1.jpg,[]\n",
    "bars_in_a_cell": "a.jpg,cat|dog\nb.jpg,dog\nc.1.jpg,background\n",
    "semicolon_separated": "a.jpg;cat,dog\nb.jpg;dog\nc.1.jpg;none\n",
    "bar_separated": "a.jpg|cat;dog\nb.jpg|dog\nc.1.jpg|none\n",
    "tab_separated": "a.jpg\tcat, dog\nb.jpg\tdog\nc.1.jpg\tnone\n",
    "python_lists": "id,label\na,\"['cat', 'dog']\"\nb,['dog']\nc.1,[]\n",
    "heading_of_any_name": "Foto,Was drauf ist\na.jpg,cat;dog\nb.jpg,dog\nc.1.jpg,none\n",
    "spreadsheet": "\ufeffFoto;Art\r\na.jpg;cat,dog\r\nb.jpg;dog\r\nc.1.jpg;none\r\n",
    "blanks": "a.jpg , cat ; dog \n\n b.jpg, dog\nc.1.jpg, none\n",
    "case_of_names": "A.JPG,Cat;DOG\nb.jpg,dog\nc.1.jpg,none\na,cat\n",
    "folders": "photos/a.jpg,cat;dog\n.\\photos\\b.jpg,dog\n./c.1.jpg,none\n",
    "several_rows": "a.jpg,cat\nb.jpg,dog\na.jpg,dog\nc.1.jpg,none\n",
    "one_column_per_class": "name,cat,dog\na.jpg,1,1\nb.jpg,0,1\nc.1.jpg,0,0\n",
    "true_and_false": "name,cat,dog\na.jpg,True,True\nb.jpg,False,True\nc.1.jpg,False,False\n",
    "yes_and_no": "name,cat,dog\na.jpg,yes,Yes\nb.jpg,no,yes\nc.1.jpg,no,NO\n",
    "pandas_index": ",file,label\n0,a.jpg,cat;dog\n1,b.jpg,dog\n2,c.1.jpg,none\n",
    "other_columns": "file,width,label,height\na,6,cat;dog,4\nb,6,dog,4\nc.1,6,none,4\n",
    "labels_first": 'label,file\n"cat;dog",a.jpg\ndog,b.jpg\nnone,c.1.jpg\n',
    "last_name_empty": "a.jpg,cat,dog,\nb.jpg,dog,,\nc.1.jpg,none,,\n",
}


def read(path: Path, text: str, classes: tuple[str, ...] | None = None) -> tuple[dict, list[str]]:
    path.write_bytes(text.encode())
    said: list[str] = []
    return read_labels(path, classes, ImageNames(IDS, complete=True), said.append), said


def refusal(path: Path, text: str, classes: tuple[str, ...] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(path, text, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", UNDERSTOOD)
def test_forms_that_are_understood(form: str, tmp_path: Path) -> None:
    for classes in (None, BOTH):
        labels, said = read(tmp_path / "labels.csv", UNDERSTOOD[form], classes)
        assert {id: tuple(sorted(name.lower() for name in names)) for id, names in labels.items()} == WANTED
        assert "image names in column" in said[0], "what was understood is said"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; write one row per image"),
        ("file,label\n", "a heading and no rows"),
        ("a.jpg,7\nb.jpg,3\n", "line 1: '7' is a number, not a class"),
        ("file,label\na.jpg,0\nb.jpg,1\n", "line 2: '0' is a number, not a class"),
        ("a.jpg,cat\nb.jpg;dog\n", "line 2: semicolon follows the first cell, elsewhere comma"),
        ("a.jpg,cat\nb.jpg,dog\nc.1.jpg,cat dog\n", "line 3: is 'cat dog' one class or 2?"),
        ("file,kind,colour\na.jpg,cat,red\nb.jpg,dog,blue\n", "columns kind, colour; name the right one 'label'"),
        ("file,kind,checked\na.jpg,cat,1\nb.jpg,dog,0\n", "column kind or checked may be one"),
        ("file,cat,dog\na.jpg,1,\nb.jpg,0,1\n", "line 2: column dog is empty; write 0 or 1"),
        ("file,label,w\na.jpg,cat,6,7\nb.jpg,dog,6\n", "line 2: 4 cells, but the heading has 3"),
        ("a.jpg,cat\n,dog\n", "line 2: no image name"),
        ("a.jpg,none\nb.jpg,dog\na.jpg,cat\n", "line 3: image a.jpg has classes in one row and none of them"),
        ("x.jpg,cat\ny.jpg,dog\n", "none of its images is there, first 'x.jpg'"),
    ],
)
def test_forms_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path / "labels.csv", text)


def test_crosses_mark_classes_and_an_empty_row_is_no_label(tmp_path: Path) -> None:
    labels, said = read(tmp_path / "labels.csv", "name,cat,dog\na.jpg,x,X\nb.jpg,,x\nc.1.jpg,,\n")
    assert labels == {"a": BOTH, "b": DOG}
    assert any("1 row without a class" in text for text in said)


@pytest.mark.parametrize("name", ["labels.xlsx", "labels.txt", "labels"])
def test_other_kinds_of_files_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"ends in \.json, \.csv, .tsv or .npy, not .*; rename it, or save it as CSV"):
        read_labels(tmp_path / name, None)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("a.jpg,Bär\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"labels\.csv: not UTF-8 text; save it as UTF-8"):
        read_labels(tmp_path / "labels.csv", None)


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "N/A", "null"])
def test_an_empty_cell_is_no_label(cell: str, tmp_path: Path) -> None:
    labels, said = read(tmp_path / "labels.csv", f"file,label\na.jpg,cat\nb.jpg,{cell}\n")
    assert labels == {"a": CAT}
    assert any("1 row without a class" in text for text in said)


def test_numbers_are_classes_where_they_are_named_so(tmp_path: Path) -> None:
    assert read(tmp_path / "labels.csv", "a.jpg,7\nb.jpg,3\n", ("3", "7"))[0] == {"a": ("7",), "b": ("3",)}


def test_two_spellings_are_one_class_and_said(tmp_path: Path) -> None:
    text = "a.jpg,traffic light\nb.jpg,Traffic_Light\nc.1.jpg,traffic light\n"
    labels, said = read(tmp_path / "labels.csv", text)
    assert set(labels.values()) == {("traffic light",)}
    assert "'Traffic_Light' (1) is taken for 'traffic light'" in said[1]


def test_a_rare_name_like_a_frequent_one_is_pointed_at(tmp_path: Path) -> None:
    ids = [f"i{k}" for k in range(9)]
    path = tmp_path / "labels.csv"
    path.write_text("".join(f"{id},{'horsse' if id == 'i4' else 'horse'}\n" for id in ids))
    said: list[str] = []
    read_labels(path, None, ImageNames(ids, complete=True), said.append)
    assert any("'horsse' (1 image) looks like 'horse'" in text for text in said)


def test_labels_of_images_that_are_not_there_are_said(tmp_path: Path) -> None:
    _, said = read(tmp_path / "labels.csv", "a.jpg,cat\nb.jpg,dog\nzebra.jpg,dog\n")
    assert any("1 of 3 rows are of images that are not there, first 'zebra.jpg'" in text for text in said)


def test_a_name_in_two_folders_needs_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("x.jpg,cat\n")
    images = ImageNames(("one/x", "two/x"), complete=True)
    with pytest.raises(UserError, match=r"line 1: 'x\.jpg' may be one/x or two/x; write the folder too"):
        read_labels(path, None, images)
    path.write_text("two/x.jpg,cat\n")
    assert read_labels(path, None, images) == {"two/x": CAT}


@pytest.mark.parametrize(
    "content",
    [
        {"a": ["cat", "dog"], "b": "dog", "c.1": []},
        {"a.jpg": "cat;dog", "photos/b.jpg": ["dog"], "c.1.jpg": "none"},
        {"a": {"cat": 1, "dog": 1}, "b": {"cat": 0, "dog": 1}, "c.1": {"cat": 0, "dog": 0}},
        [
            {"file": "a.jpg", "labels": ["cat", "dog"]},
            {"file": "b.jpg", "labels": "dog"},
            {"file": "c.1", "labels": []},
        ],
    ],
)
def test_json_forms(content: object, tmp_path: Path) -> None:
    assert read(tmp_path / "labels.json", json.dumps(content))[0] == WANTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["cat"], "a": ["dog"]}', "'a' is there twice"),
        ('{"a": ["cat"], "a.jpg": ["dog"]}', "'a' and 'a.jpg' are one image"),
        ('{"a": ["nan"]}', "holds an empty name"),
        ('{"a": [3]}', "not a list of class names"),
        ('{"a": ["3"]}', "'3' is a number"),
        ("[]", "wanted"),
    ],
)
def test_json_refusals(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path / "labels.json", text)
