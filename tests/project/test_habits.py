"""Workflows, issue forms, documentation and pins name things that exist."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import llava_fast
from tests import conftest
from tests.support.rooms import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_whole(path):
    content = read_yaml(path)
    assert content["name"] == path.stem
    assert content[True]
    for job in content["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            for target in re.findall(r"(?:^|&& )make ([a-z-]+)", step.get("run", "")):
                assert target in targets(), f"{path.name}: there is no `make {target}`"
            for file in re.findall(r"\b(?:tests|tools|benchmarks)/[\w/]+\.\w+", step.get("run", "")):
                assert (ROOT / file).is_file(), f"{path.name}: there is no {file}"


def test_there_is_a_workflow_of_each_kind():
    assert {path.stem for path in WORKFLOWS} >= {"lint", "fast", "all", "kernels", "wheels", "docs"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_whole(path):
    content = read_yaml(path)
    if path.stem == "config":
        return
    assert content["name"]
    assert content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in content["body"])


def test_a_bug_report_asks_for_doctor():
    (field,) = [
        field for field in read_yaml(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"] if field["id"] == "doctor"
    ]
    assert "llava-fast doctor" in field["attributes"]["label"]
    assert field["validations"]["required"]


def test_targets_that_are_no_files_say_so():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets() == set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())


def test_every_public_name_is_on_a_page_of_the_api():
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    errors = {name for name in llava_fast.__all__ if name.endswith("Error")}  # all of them, with their module
    assert set(llava_fast.__all__) - errors - {"ops", "__version__"} <= shown
    assert "errors" in shown
    assert set(llava_fast.ops.__all__) <= shown


def test_every_name_on_a_page_of_the_api_is_there():
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            found = importlib.import_module(module)
            assert hasattr(found, attribute) or importlib.util.find_spec(name), f"{page.name}: there is no {name}"


def test_the_documentation_is_pinned():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = yaml.safe_load(re.search(r"^docs = (\[.*\])", project, re.MULTILINE)[1])
    lines = (ROOT / "constraints-docs.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if line and line[0] != "#"}
    assert wanted
    assert {re.match(r"[\w-]+", name)[0] for name in wanted} <= pinned
    assert all("==" in line for line in lines if line and line[0] != "#")


def test_commit_hooks_are_the_lint_of_make():
    hooks = [hook["entry"] for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    for command in re.findall(r"\$\(BIN\)/(\w+(?: check| format)?)", lint):
        assert any(hook.startswith(f".venv/bin/{command}") for hook in hooks), f"no hook runs {command}"


def test_what_is_listed_as_slow_is_there():
    lines = [line for line in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert lines == sorted(set(lines))
    for line in lines:
        file, _, test = line.partition("::")
        assert (ROOT / file).is_file(), f"{line}: no such file"
        assert not test or re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{line}: no such test"
        )


def test_what_is_listed_as_slow_is_marked(tmp_path):
    marked = []

    def item(nodeid):
        return SimpleNamespace(nodeid=nodeid, add_marker=lambda mark: marked.append((nodeid, mark)))

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "slow.txt").write_text("# words\ntests/a.py\ntests/b.py::test_one\n")
    names = ["tests/a.py::test_x", "tests/b.py::test_one[1-2]", "tests/b.py::test_one_more", "tests/c.py::test_one"]
    conftest.pytest_collection_modifyitems(SimpleNamespace(rootpath=tmp_path), [item(name) for name in names])
    assert marked == [("tests/a.py::test_x", "slow"), ("tests/b.py::test_one[1-2]", "slow")]


def test_test_files_have_names_of_their_own():
    """Without __init__.py beside them pytest imports files by their names alone: it cannot collect two of one name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
