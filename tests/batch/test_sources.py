"""Every kind of input: which rows it gives, from which row on, and what is wrong with it."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle

import pytest

from llava_fast.batch import shards
from llava_fast.batch.prompts import PromptTemplate, choose_template
from llava_fast.batch.source import open_source
from llava_fast.errors import BatchError, RequestError
from tests.batch.conftest import write_csv, write_tar

NAMES = ["0.png", "2.png", "3.png", "4.png", "6.png", "7.png", "8.png", "below/1.png", "below/5.png"]


def rows(source, first=0):
    return list(source.items(first))


def check_parts(source):
    """From every row on, and on another machine, the rows are those of the whole."""
    whole = rows(source)
    assert [item.number for item in whole] == list(range(len(whole)))
    assert source.total in (None, len(whole))
    for first in range(len(whole) + 1):
        assert rows(pickle.loads(pickle.dumps(source)), first) == whole[first:]
    return whole


def test_a_folder(pictures):
    (pictures / "notes.txt").write_text("no picture")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / ".below").mkdir()
    (pictures / ".below" / "1.png").write_bytes(b"")
    (pictures / "film.MP4").write_bytes(b"")
    source = open_source(str(pictures))
    items = check_parts(source)
    assert [item.id for item in items] == sorted([*NAMES, "film.MP4"])
    assert items[0].images == (str(pictures / "0.png"),)
    assert items[-1].video == str(pictures / "film.MP4")
    assert items[-2].columns == {"id": "below/5.png", "name": "5.png"}
    assert source.remark == "left out as neither pictures nor videos: 1 .txt"
    assert open_source(str(pictures)).digest == source.digest
    (pictures / "9.png").write_bytes(b"")
    assert open_source(str(pictures)).digest != source.digest


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(BatchError, match="holds no files"):
        open_source(str(tmp_path))
    (tmp_path / "a.csv").touch()
    with pytest.raises(BatchError, match=r"only other files \(1 \.csv\).*name tables"):
        open_source(str(tmp_path))
    with pytest.raises(BatchError, match="there is no input"):
        open_source(str(tmp_path / "missing"))
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(BatchError, match="of no kind that a batch reads"):
        open_source(str(tmp_path / "a.xlsx"))


def test_json_lines(pictures, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"id": "a", "image": "pictures/0.png", "question": "one"}\r',
        b"",
        b'{"id": 7, "images": ["pictures/2.png", "pictures/3.png"]}',
        b'{"id": "torn", "image": ',
        b'["no object"]',
        b'{"id": "\xe9", "image": "x"}',
        b'{"id": "none"}',
        b'{"id": "empty", "image": ""}',
        b'{"id": null, "image": "pictures/0.png"}',
        b'{"id": "kind", "image": 5}',
        b'{"id": "uri", "image": "data:image/png;base64,AA=="}',
    ]
    path.write_bytes(b"\n".join(lines))
    items = check_parts(open_source(str(path)))
    assert [item.id for item in items] == ["a", 7, 2, 3, 4, "none", "empty", 7, "kind", "uri"]
    assert items[0].images == (str(pictures / "0.png"),)
    assert items[0].columns["question"] == "one"
    assert items[-1].images == ("data:image/png;base64,AA==",)
    problems = [item.error for item in items]
    assert problems[0] is problems[-1] is None
    assert problems[2].startswith("line 4 is no JSON: ")
    assert problems[3] == "line 5 is no JSON object"
    assert problems[5] == "the row has no 'image'"
    assert "is a path, a data URI or bytes, not '5'" in problems[8]


def test_pictures_of_a_list_column(pictures, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"images": ["0.png", "2.png"], "n": 1}, {"images": [], "n": 2}]))
    first, second = check_parts(open_source(str(path), image_folder=str(pictures)))
    assert first.images == (str(pictures / "0.png"), str(pictures / "2.png"))
    assert (first.id, second.id, second.error) == (0, 1, "the row has no 'images'")


def test_csv(tmp_path):
    """As Excel writes it: a byte order mark, carriage returns, quotes; and a column with another name."""
    listed = [
        {"id": "a", "photo": "x.png", "question": 'say "hi",\nplease'},
        {"id": "b", "photo": "é.png", "question": ""},
    ]
    path = write_csv(tmp_path / "rows.csv", listed, encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbfid,")
    assert b"\r\n" in path.read_bytes()
    source = open_source(str(path), image_column="photo")
    first, second = check_parts(source)
    assert first.columns == listed[0]
    assert second.images == (str(tmp_path / "é.png"),)
    with pytest.raises(BatchError, match=r"no column holds pictures.*\(the columns are id, photo, question\)"):
        open_source(str(path))
    with pytest.raises(BatchError, match="no column 'foto': its columns are id, photo, question"):
        open_source(str(path), image_column="foto")
    path.write_bytes(path.read_bytes() + b"c,d.png\r\n")
    *_, last = check_parts(open_source(str(path), image_column="photo"))
    assert last.error == "line 5 has 2 fields and the header 3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"id,image\n", "has no rows"),
        ("a.csv", b"id,id\n1,2\n", "two columns 'id'"),
        ("a.csv", b'id,image\n1,"a"b"\n', "line 2"),
        ("a.csv", b"id,image\n1,\xe9.png\n", "is not UTF-8 .*0xe9"),
        ("a.json", b"{}", "holds no list of rows"),
        ("a.json", b"[", "is no JSON"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.tar", b"no tar", "no tar archive"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "no tar archive"),
        ("a.tsv", b"image\tid\na.png\t1\nb.png\t1\n", "rows 0 and 1 of .*a.tsv have one id, '1'.*--id-column"),
    ],
)
def test_inputs_that_cannot_be_read(name, content, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BatchError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_ids(tmp_path):
    listed = [{"id": "a", "image": "x.png", "key": "k"}, {"id": "a", "image": "x.png", "key": "l"}]
    path = str(write_csv(tmp_path / "rows.csv", listed))
    assert [item.id for item in check_parts(open_source(path, id_column="key"))] == ["k", "l"]
    assert [item.id for item in check_parts(open_source(path, id_column="#"))] == [0, 1]
    with pytest.raises(BatchError, match="no column 'no'"):
        open_source(path, id_column="no")


def test_pictures_that_come_again_are_noticed(tmp_path):
    listed = [{"id": "a", "image": "x.png"}, {"id": "b", "image": "y.png"}]
    assert not open_source(str(write_csv(tmp_path / "a.csv", listed))).repeats
    listed[1]["image"] = "x.png"
    assert open_source(str(write_csv(tmp_path / "b.csv", listed))).repeats


def test_several_tables(tmp_path):
    for number in (2, 1):
        write_csv(tmp_path / f"{number}.csv", [{"id": f"{number}{each}", "image": "x.png"} for each in "abc"])
    source = open_source(str(tmp_path / "*.csv"))
    assert [item.id for item in check_parts(source)] == ["1a", "1b", "1c", "2a", "2b", "2c"]
    write_tar(tmp_path / "3.tar", {"a.png": b"x"})
    with pytest.raises(BatchError, match=r"several kinds \(\.csv \.tar\)"):
        open_source(str(tmp_path / "*"))


def test_a_file_whose_name_is_a_pattern(tmp_path):
    write_csv(tmp_path / "rows[1].csv", [{"id": "a", "image": "x.png"}])
    assert open_source(str(tmp_path / "rows[1].csv")).total == 1


def test_parquet(tmp_path):
    """Of Hugging Face's form, in row groups that no batch of rows fits."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    listed = [{"id": n, "image": {"bytes": bytes([n]), "path": None}, "question": f"q{n}"} for n in range(7)]
    listed[5]["image"] = {"bytes": None, "path": "a.png"}
    parquet.write_table(pyarrow.Table.from_pylist(listed), tmp_path / "rows.parquet", row_group_size=3)
    items = check_parts(open_source(str(tmp_path / "rows.parquet")))
    assert [item.id for item in items] == list(range(7))
    assert items[6].images == (b"\x06",)
    assert items[5].images == (str(tmp_path / "a.png"),)
    assert items[4].columns["question"] == "q4"
    table = pyarrow.table({"image": pyarrow.array([b"x", None], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "plain.parquet")
    first, second = check_parts(open_source(str(tmp_path / "plain.parquet")))
    assert (first.id, first.images, second.error) == (0, (b"x",), "the row has no 'image'")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_shards(suffix, tmp_path):
    mode = "w" if suffix == ".tar" else "w:gz"
    first = {
        "a/0.jpg": b"one",
        "a/0.json": b'{"question": "what", "id": 9}',
        "a/0.txt": b" words\n",
        "b/0.seg.png": b"two",
        "b/._0.png": b"junk of a Mac",
        "README": b"no suffix",
        "c.MP4": b"film",
        "d.json": b"[1]",
        "e.png": b"three",
        "e.npy": b"\xff" * 3,
    }
    write_tar(tmp_path / f"1{suffix}", first, mode)
    write_tar(tmp_path / f"2{suffix}", {"a/0.png": b"four"}, mode)
    items = check_parts(open_source(str(tmp_path / f"*{suffix}")))
    assert [item.id for item in items] == ["1/a/0", "1/b/0", "1/c", "1/d", "1/e", "2/a/0"]
    assert [item.images for item in items] == [(b"one",), (b"two",), (), (), (b"three",), (b"four",)]
    assert items[0].columns == {"question": "what", "id": 9, "txt": "words"}
    assert items[2].video == b"film"
    assert items[3].error == "the sample holds no picture and no video (json)"
    named = open_source(str(tmp_path / f"1{suffix}"), id_column="id")
    assert [item.id for item in check_parts(named)][:1] == [9]
    assert rows(named)[1].error == "the sample has no 'id'"


def test_a_shard_that_breaks_off_is_one_error_and_the_next_is_read(tmp_path):
    pictures = {f"{number}.png": bytes([number]) * 900 for number in range(4)}
    whole = write_tar(tmp_path / "1.tar", pictures).read_bytes()
    write_tar(tmp_path / "2.tar", {"x.png": b"x"})
    damaged = whole[: 3 * 1536] + b"?" * 512 + whole[3 * 1536 + 512 :]  # the fourth header
    for content, left in ((whole[: 2 * 1536 + 600], ["1/0", "1/1"]), (damaged, ["1/0", "1/1", "1/2"])):
        (tmp_path / "1.tar").write_bytes(content)
        items = check_parts(open_source(str(tmp_path / "*.tar")))
        assert [item.id for item in items] == [*left, "1", "2/x"]
        assert "1.tar cannot be read on" in items[-2].error
    (tmp_path / "3.tar.gz").write_bytes(gzip.compress(whole)[:-40])
    *_, last = check_parts(open_source(str(tmp_path / "3.tar.gz")))
    assert "cannot be read on" in last.error


def test_a_folder_of_shards(tmp_path):
    (tmp_path / "below").mkdir()
    write_tar(tmp_path / "b.tar", {"0.png": b"two"})
    write_tar(tmp_path / "below" / "c.tar.gz", {"0.png": b"three"}, "w:gz")
    write_tar(tmp_path / "a.tar", {"0.png": b"one"})
    (tmp_path / "a_stats.json").touch()
    source = open_source(str(tmp_path))
    assert [(item.id, item.images) for item in check_parts(source)] == [
        ("a/0", (b"one",)),
        ("b/0", (b"two",)),
        ("c/0", (b"three",)),
    ]
    assert source.remark == "left out as no shards: 1 .json"
    with pytest.raises(BatchError, match="are for tables"):
        open_source(str(tmp_path), image_column="x")
    (tmp_path / "0.png").touch()
    assert [item.id for item in rows(open_source(str(tmp_path)))] == ["0.png"]


@pytest.mark.parametrize("where", ["opening", "reading"])
def test_a_shard_that_the_disk_fails_to_give_ends_the_run(where, tmp_path, monkeypatch):
    """It may be there again at the next run, so none of its samples becomes an error, nor is half of one answered."""
    for name in ("1", "2"):
        write_tar(tmp_path / f"{name}.tar", {"x.png": b"x", "y.txt": b"t", "y.png": b"y"})
    source = open_source(str(tmp_path / "*.tar"))
    if where == "opening":
        (tmp_path / "2.tar").rename(tmp_path / "elsewhere")
    else:
        read = shards._bytes

        def fails(tar, member, wanted):
            if tar.name.endswith("2.tar") and member.name == "y.png":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(tar, member, wanted)

        monkeypatch.setattr(shards, "_bytes", fails)
    items = source.items()
    left = ["1/x", "1/y"] if where == "opening" else ["1/x", "1/y", "2/x"]
    assert [next(items).id for _ in left] == left
    with pytest.raises(BatchError, match=r"2\.tar cannot be read \(.*without --overwrite, to go on"):
        next(items)


def test_members_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_SAMPLE", 1000)
    members = {"a.png": b"x" * 1001, "b.png": b"x" * 600, "b.mp4": b"x" * 600, "c.png": b"x" * 1000, "d.png": b"d"}
    write_tar(tmp_path / "0.tar", members)
    a, b, c, d = check_parts(open_source(str(tmp_path / "0.tar")))
    assert "the sample's png is too large" in a.error
    assert "the sample's mp4 is too large" in b.error
    assert (c.error, d.error, d.images) == (None, None, (b"d",))


def test_shards_of_one_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", {"x.png": b"x"})
    with pytest.raises(BatchError, match="have one name"):
        open_source(str(tmp_path / "*" / "*.tar"))


def test_prompts():
    columns = frozenset({"question", "kind of thing", "n"})
    filled = choose_template("{{{question}}} of {kind of thing}: {n}", columns).fill(
        {"question": "{what}", "kind of thing": "a", "n": 3}
    )
    assert filled == "{{what}} of a: 3"
    assert choose_template(None, columns).text == "{question}"
    assert choose_template("{anything}", None).columns == ["anything"]
    assert PromptTemplate("{n}").fill({"n": {"a": [1]}}) == '{"a": [1]}'
    with pytest.raises(RequestError, match="the row has no 'n'"):
        PromptTemplate("{n}").fill({"n": None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"give --prompt, or a column called prompt or question \(the columns are a, b\)"),
        (" ", "the prompt is empty"),
        ("{c}", "names the column 'c' and the columns are a, b"),
        ('Answer as {"name": 1}', "has a format after it.*for braces"),
        ("{a!r}", "has a format"),
        ("{a", "cannot be read"),
        ("{}", "braces with nothing"),
        ("{a.b}", "the column 'a.b'"),
    ],
)
def test_prompts_that_cannot_be_used(text, message):
    with pytest.raises(BatchError, match=message):
        choose_template(text, frozenset("ab"))
