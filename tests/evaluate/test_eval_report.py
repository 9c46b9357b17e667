"""The report holds what was asked and answered as text, and asks nothing of elsewhere."""

import json
import re

import numpy as np
from PIL import Image

from llava_fast.evaluate import report
from llava_fast.evaluate.pictures import SIDE, thumbnails
from llava_fast.evaluate.report import write
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer
from tests.support import published

ATTACK = "</script><script>alert(1)</script><img src=https://example.org/x.png>"


def made(tmp_path):
    published.pope(tmp_path)
    published.mmbench(tmp_path)
    plan = Plan(("pope", "mmbench"), tmp_path, tmp_path / "out", {"path": "<model>"}, pictures=True)
    results = run(plan, lambda questions, options: ((question, Answer(ATTACK)) for question in questions))
    return results, write(results, tmp_path / "out")


def data_of(path) -> dict:
    page = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_the_data_is_whole_and_harmless(tmp_path):
    results, path = made(tmp_path)
    page = path.read_text(encoding="utf-8")
    held = data_of(path)
    assert held["model"] == {"path": "<model>"}
    assert [row["answer"] for row in held["tasks"]["pope"]["rows"]] == [ATTACK] * 12
    assert held["tasks"]["mmbench"]["rows"][0]["options"] == ["cat", "dog"]
    assert held["tasks"]["pope"]["metrics"] == results["tasks"]["pope"]["metrics"]
    assert page.count("<script") == 2
    assert "<title>&lt;model&gt;: evaluation</title>" in page


def test_it_needs_nothing_else(tmp_path):
    _, path = made(tmp_path)
    page = re.sub(r'<script type="application/json".*?</script>', "", path.read_text(), flags=re.DOTALL)
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://|@import|<link|url\(", page)
    assert "innerHTML" not in page


def test_a_page_holds_a_bounded_number_of_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST", 5)
    results, path = made(tmp_path)
    held = data_of(path)["tasks"]["pope"]
    assert [row["id"] for row in held["rows"]] == [
        results["tasks"]["pope"]["answers"][n]["id"] for n in (0, 2, 4, 7, 9)
    ]
    assert held["questions"] == 12
    assert ["pictures" in row for row in results["tasks"]["pope"]["answers"]].count(True) == 5


def test_every_picture_has_one_small_copy(tmp_path):
    results, path = made(tmp_path)
    names = {name for task in results["tasks"].values() for row in task["answers"] for name in row["pictures"]}
    assert names == {copy.name for copy in (path.parent / "pictures").iterdir()}
    assert len(names) == 2  # POPE's one, and MMBench's, whose rows hold the same bytes
    large = np.zeros((SIDE * 2, 30, 3), np.uint8)
    (name,) = thumbnails([large], tmp_path)
    assert Image.open(tmp_path / "report" / "pictures" / name).size == (15, SIDE)
    assert thumbnails([b"no picture"], tmp_path) == [""]
