"""docs/architecture.md's picture of the house against the imports: no arrow up, no circle, no room left out."""

import pytest

from tests.support.rooms import ROOT, imports, room_of, rooms

TO_GO: set[tuple[str, str]] = set()  # upward imports that are still there: this set only shrinks


def picture(page: str) -> list[list[str]]:
    """Rows of rooms, from the top, of the first text block after the heading "The house". A row's words after "#" are
    for the reader."""
    block = page.split("## The house\n", 1)[1].split("```text\n", 1)[1].split("```", 1)[0]
    return [line.split("#")[0].split() for line in block.splitlines() if line.split("#")[0].strip()]


def faults(rows: list[list[str]], found: dict[tuple[str, str], str], there: set[str], to_go: set) -> list[str]:
    """What the picture gets wrong, a line each. An import must go to a lower row, so there is no circle either."""
    row_of = {room: number for number, row in enumerate(rows) for room in row}
    said = [room for row in rows for room in row]
    wrong = [f"{room}: not in the picture" for room in sorted(there - set(said))]
    wrong += [f"{room}: in the picture, and no source is there" for room in sorted(set(said) - there)]
    wrong += [f"{room}: twice in the picture" for room in sorted({room for room in said if said.count(room) > 1})]
    for (user, used), where in sorted(found.items()):
        upward = user in row_of and used in row_of and row_of[used] <= row_of[user]
        if upward and (user, used) not in to_go:
            wrong.append(f"{where}: {user} imports {used}, which is not below it")
    wrong += [f"{user} -> {used}: gone, so take it out of TO_GO" for user, used in sorted(to_go - set(found))]
    return wrong


def test_the_picture_is_true():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    wrong = faults(picture(page), imports(), rooms(), TO_GO)
    assert not wrong, "docs/architecture.md, The house:\n" + "\n".join(wrong)


def test_the_picture_is_read():
    page = "# A\n## The house\n\n```text\ncli api   # the top\n\nmodels/vlm\n```\n"
    assert picture(page) == [["cli", "api"], ["models/vlm"]]


@pytest.mark.parametrize(
    ("found", "there", "to_go", "expected"),
    [
        ({("top", "low"): "a.py:1"}, {"top", "low"}, set(), []),
        ({("low", "top"): "a.py:1"}, {"top", "low"}, set(), ["a.py:1: low imports top, which is not below it"]),
        ({("low", "top"): "a.py:1"}, {"top", "low"}, {("low", "top")}, []),
        ({}, {"top", "low"}, {("low", "top")}, ["low -> top: gone, so take it out of TO_GO"]),
        ({}, {"top", "low", "new"}, set(), ["new: not in the picture"]),
        ({}, {"top"}, set(), ["low: in the picture, and no source is there"]),
    ],
)
def test_faults_are_found(found, there, to_go, expected):
    assert faults([["top"], ["low"]], found, there, to_go) == expected


def test_rooms_side_by_side_know_nothing_of_each_other():
    wrong = faults([["left", "right"]], {("left", "right"): "a.py:1"}, {"left", "right"}, set())
    assert wrong == ["a.py:1: left imports right, which is not below it"]


def test_imports_are_read_wherever_they_stand(tmp_path):
    source = {
        "api.py": "def f():\n    from llava_fast.models import vlm\n",
        "models/vlm.py": "from llava_fast.ops import rope\nimport llava_fast.inputs.plan.text\n",
        "ops/rope.py": "from llava_fast import _C\nimport torch\n",
        "inputs/plan/text.py": "",
    }
    for name, text in source.items():
        path = tmp_path / "llava_fast" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert imports(tmp_path) == {
        ("api", "models/vlm"): "llava_fast/api.py:2",
        ("models/vlm", "ops"): "llava_fast/models/vlm.py:1",
        ("models/vlm", "inputs/plan"): "llava_fast/models/vlm.py:2",
    }
    assert rooms(tmp_path) == {"api", "models/vlm", "ops"}
    assert room_of("llava_fast") == "__init__"
