"""What a release asks of the tree; the wheel itself is built by tests/test_build.py and by CI."""

import importlib.util
import subprocess

import pytest

from tests.support.rooms import ROOT

SPEC = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)

GOOD = """# Changelog

## Unreleased

## 1.2.0 - 2030-01-31

### Added

- This.

## 1.1.0 - 2029-01-01

- That.
"""


def git(folder, *words):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


@pytest.fixture
def tree(tmp_path):
    """A clean repository whose version is 1.2.0; call it with the text of its CHANGELOG."""

    def make(changelog):
        (tmp_path / "llava_fast").mkdir()
        (tmp_path / "llava_fast" / "version.py").write_text('"""It."""\n\n__version__ = "1.2.0"\n')
        (tmp_path / "CHANGELOG.md").write_text(changelog)
        git(tmp_path, "init", "-q")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", "all")
        return tmp_path

    return make


def test_a_tree_that_is_ready(tree):
    assert release.faults(tree(GOOD)) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("## Unreleased\n", "## Unreleased\n\n- More.\n", 'has entries under "Unreleased"'),
        ("## 1.2.0 - 2030-01-31", "## 1.2.1 - 2030-01-31", "begins with 1.2.1, llava_fast/version.py says 1.2.0"),
        ("1.2.0 - 2030-01-31", "1.2.0", "gives no date for 1.2.0"),
        ("2030-01-31", "soon", "gives soon for 1.2.0"),
    ],
)
def test_a_changelog_that_does_not_agree(tree, old, new, expected):
    assert old in GOOD
    (wrong,) = release.faults(tree(GOOD.replace(old, new)))
    assert expected in wrong


def test_a_tree_that_is_not_clean_or_tagged_already(tree):
    folder = tree(GOOD)
    git(folder, "tag", "v1.2.0")
    (folder / "left over").write_text("")
    wrong = release.faults(folder)
    assert "not clean" in wrong[0]
    assert "left over" in wrong[0]
    assert "the tag v1.2.0 exists" in wrong[1]


def test_the_changelog_of_this_project_is_in_its_form():
    found = release.sections((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert found[0][0] == "Unreleased"
    assert release.version(ROOT) in [name for name, *_ in found]
    for name, _, text in found:
        titles = [line for line in text.splitlines() if line.startswith("#")]
        known = ["### Added", "### Changed", "### Deprecated", "### Removed", "### Fixed", "### Security"]
        assert titles == [title for title in known if title in titles], f"{name}: {titles}, each once and in this order"
