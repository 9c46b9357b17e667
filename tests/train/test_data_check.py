"""`llava-fast data check`: bad data of every kind ends in a report, a table and exit code 1, never in a stack trace."""

from __future__ import annotations

import builtins
import json

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from llava_fast.cli.main import app
from llava_fast.errors import CheckpointError, DataError, RecipeError
from llava_fast.train.data.check import check, plan_for
from tests.support import tiny

RUNNER = CliRunner(env={"COLUMNS": "200"})


def run(*arguments):
    return RUNNER.invoke(app, ["data", "check", *map(str, arguments)])


def sample(image="a.jpg", question="What?", answer="A cat.", **others):
    placeholders = "<image>\n" * (len(image) if isinstance(image, list) else image is not None)
    turns = [{"from": "human", "value": placeholders + question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **others}


GOOD = [sample(), sample(["a.jpg", "a.jpg"]), sample(None), sample(None, answer="word " * 300)]
BAD = {
    "missing": (sample("no.jpg", id="000007"), "missing file"),
    "truncated": (sample("cut.jpg"), "unreadable file"),
    "no image": (sample("page.jpg"), "unreadable file"),
    "zero bytes": (sample("empty.jpg"), "unreadable file"),
    "no video": (sample(None, "<image>\nWhat?", video="no.mp4"), "missing file"),
    "two sizes": (sample(None, "<image>\nWhat?", video="two.mjpeg"), "unreadable file"),
    "order": ({"conversations": [{"from": "human", "value": "A"}] * 2}, "roles and turns"),
    "empty answer": (sample(answer=""), "cannot be masked"),
    "two images, one placeholder": (sample("a.jpg") | {"image": ["a.jpg", "a.jpg"]}, "placeholders"),
    "placeholder in an answer": (sample(None, answer="<image>"), "placeholders"),
    "null turns": ({"conversations": None, "id": None}, "malformed"),
    "null": (None, "malformed"),
    "half a surrogate": (sample(None, "\ud800", id="\ud800"), "cannot be masked"),
    "strange path": (sample("\ud800.jpg\0"), "missing file"),
}


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(tiny.picture(80, 120)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(tiny.picture(80, 60)).save(tmp_path / "narrow.jpg")
    (tmp_path / "two.mjpeg").write_bytes(whole + (tmp_path / "narrow.jpg").read_bytes())
    return tmp_path


def write(folder, values, name="data.json"):
    (folder / name).write_text(json.dumps(values))
    return f"{folder}/{name}"


def recipe(folder, model, sources, **data):
    given = {
        "model": str(model),
        "output": f"{folder}/run",
        "batch_size": 1,
        "optimizer": {"learning_rate": 1e-3},
        "data": {"sources": sources, "template": "vicuna_v1", **data},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
    return f"{folder}/recipe.yaml"


def test_good_data(folder, tiny_next):
    path = write(folder, GOOD)
    result = run(path, "-m", tiny_next, "--template", "vicuna_v1", "--json", folder / "report.json", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "4 samples, no problem found." in result.output
    assert "supervised" in result.output
    report = json.loads((folder / "report.json").read_text())
    assert not report["stops_a_training"]
    assert not report["problems"]
    assert report["samples"] == 4
    processor = tiny.pair("next").ours.processor
    visual = sum(processor.prepare([{"prompt": "<image>", "images": [f"{folder}/a.jpg"]}]).plan.column("modality") != 0)
    assert report["tokens"]["visual"]["max"] >= 2 * 49
    assert report["tokens"]["visual"]["sum"] > visual
    tokens = report["tokens"]
    assert tokens["all"]["sum"] == tokens["text"]["sum"] + tokens["visual"]["sum"] == report["sources"][0]["tokens"]
    assert tokens["supervised"]["max"] > 300
    assert tokens["supervised"]["p50"] < 20
    assert tokens["text"]["mean"] == pytest.approx(tokens["text"]["sum"] / 4, abs=0.05)
    assert tokens["visual"]["p50"] <= tokens["visual"]["p95"] <= tokens["visual"]["max"]


def test_bad_data_of_every_kind_is_listed(folder, tiny_next):
    values = [*GOOD, *(value for value, _ in BAD.values())]
    path = write(folder, values)
    result = run(path, "-m", tiny_next, "--template", "vicuna_v1", "--json", folder / "report.json", "--workers", 2)
    assert result.exit_code == 1, result.output
    assert result.exception.args == (1,), result.output
    report = json.loads((folder / "report.json").read_text())
    assert report["stops_a_training"]
    assert sum(report["problem_kinds"].values()) == len(BAD)
    for number, (each, (name, (_, kind))) in enumerate(zip(report["problems"], BAD.items(), strict=True), len(GOOD)):
        assert each["sample"].startswith(f"data.json[{number}]"), name
        assert each["kind"] == kind, name
        assert each["problem"].startswith(each["sample"]), name
    assert f"{len(BAD)} problems" in result.output
    assert "data.json[4] (id 000007)" in result.output
    assert report["tokens"]["text"]["sum"] > 300  # of the others


def test_only_the_first_problems_are_shown(folder):
    result = run(write(folder, [sample("no.jpg")] * 25), "--workers", 0, "--json", folder / "report.json")
    assert "data.json[19]:" in result.output
    assert "data.json[20]" not in result.output
    assert "... and 5 more; --json FILE lists every one" in result.output
    assert len(json.loads((folder / "report.json").read_text())["problems"]) == 25


def test_without_a_model_files_and_turns_are_checked(folder):
    assert run(write(folder, GOOD), "--workers", 0).exit_code == 0
    result = run(write(folder, [*GOOD, sample("cut.jpg")]), "--workers", 0)
    assert result.exit_code == 1
    assert "cannot be decoded" in result.output
    assert "p95" not in result.output


def test_headers_only_still_finds_what_is_no_image(folder, tiny_next):
    path = write(folder, [sample("page.jpg"), sample("no.jpg"), sample("empty.jpg")])
    result = run(path, "-m", tiny_next, "--template", "vicuna_v1", "--headers-only", "--workers", 0)
    assert result.exit_code == 1
    assert "3 problems: 2 unreadable file, 1 missing file" in result.output
    path = write(folder, [sample("cut.jpg")])
    assert run(path, "-m", tiny_next, "--template", "vicuna_v1", "--headers-only", "--workers", 0).exit_code == 0


def test_too_long_is_said_and_stops_only_if_all_are(folder, tiny_next):
    path = write(folder, GOOD)
    options = ["-m", tiny_next, "--template", "vicuna_v1", "--workers", 0, "--json", folder / "report.json"]
    result = run(path, *options, "--max-length", 300)
    report = json.loads((folder / "report.json").read_text())
    assert result.exit_code == 0
    assert "of 4 samples are longer than 300 tokens" in result.output
    assert {"sample": "data.json[3]", "tokens": report["tokens"]["all"]["max"]} in report["too_long"]
    assert report["sources"][0]["too_long"] == len(report["too_long"]) < 4
    result = run(path, *options, "--max-length", 5)
    assert result.exit_code == 1
    assert "No sample is left to train on. Raise the length" in result.output


def test_a_recipe_is_checked_with_its_own_settings_and_its_training_needs_no_second_look(folder, tiny_next):
    sources = [
        {"path": write(folder, GOOD, "one.json"), "weight": 2},
        {"path": write(folder, [*GOOD, sample("no.jpg", bbox=1)], "two.json"), "cap": 3},
    ]
    path = recipe(folder, tiny_next, sources, max_length=300)
    result = run(path, "--json", folder / "report.json", "--workers", 0)
    report = json.loads((folder / "report.json").read_text())
    assert result.exit_code == 1
    assert "two.json[4]" in result.output
    assert "bbox (1)" in result.output
    assert [each["samples_per_epoch"] for each in report["sources"]] == [8, 3]
    assert [each["problems"] for each in report["sources"]] == [0, 1]
    assert report["max_length"] == 300
    assert len(list((folder / "run" / "lengths").glob("*.npz"))) == 1


def test_a_recipe_may_skip_problems_but_not_everything(folder, tiny_next):
    bad = sample("no.jpg")
    sources = [{"path": write(folder, [*GOOD, bad])}]
    result = run(recipe(folder, tiny_next, sources), "--workers", 0)
    assert result.exit_code == 1
    assert "Training would stop" in result.output
    result = run(recipe(folder, tiny_next, sources, on_problem="skip"), "--workers", 0)
    assert result.exit_code == 0
    assert "Training skips these samples" in result.output
    sources.append({"path": f"{folder}/none.json"})
    assert run(recipe(folder, tiny_next, sources, on_problem="skip"), "--workers", 0).exit_code == 1
    only_bad = [{"path": write(folder, [bad], "bad.json")}]
    result = run(recipe(folder, tiny_next, only_bad, on_problem="skip"), "--workers", 0)
    assert result.exit_code == 1
    assert "No sample is left to train on." in result.output


def test_samples_that_are_cut_are_left_to_train_on(folder, tiny_next):
    sources = [{"path": write(folder, GOOD)}]
    left = {
        policy: check(plan_for(recipe(folder, tiny_next, sources, max_length=5, too_long=policy)), 0, progress=False)
        for policy in ("drop", "cut")
    }
    assert (left["drop"].left, left["cut"].left) == (0, 4)
    assert left["drop"].stops
    assert not left["cut"].stops


def test_what_looks_like_a_mistake_is_said(folder):
    turns = GOOD[2]["conversations"]
    values = [{"conversations": turns[::-1]}, {"conversations": turns[1:] + turns}, *GOOD]
    result = run(write(folder, values), "--workers", 0)
    assert result.exit_code == 0
    assert "2 samples begin with an answer, which is left out" in result.output
    assert "1 samples end with a question without an answer" in result.output


def test_a_mixture_is_data(folder):
    write(folder, GOOD)
    (folder / "mixture.yaml").write_text("datasets:\n- json_path: data.json\n  sampling_strategy: first:3\n")
    result = run(folder / "mixture.yaml", "--workers", 0)
    assert result.exit_code == 0
    assert "3 samples, no problem found." in result.output


@pytest.mark.parametrize("content", [b'[{"id": 1}, {"id"', b'["\xe4"]', b"[]", None])
def test_a_data_file_that_is_none_is_a_problem_and_hides_no_other(folder, tiny_next, content):
    if content is not None:
        (folder / "bad.json").write_bytes(content)
    good = write(folder, [*GOOD, sample("no.jpg")])
    result = run(f"{folder}/bad.json", "--workers", 0)
    assert result.exit_code == 1
    assert "[data file]" in result.output
    assert "bad.json" in result.output
    path = recipe(folder, tiny_next, [{"path": f"{folder}/bad.json"}, {"path": good}])
    result = run(path, "--workers", 0, "--json", folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    assert result.exit_code == 1
    assert [each["kind"] for each in report["problems"]] == ["data file", "missing file"]
    assert [each["samples"] for each in report["sources"]] == [0, 5]
    assert report["sources"][1]["problems"] == 1


def test_a_histogram(folder, tiny_next):
    path = write(folder, GOOD)
    result = run(path, "-m", tiny_next, "--template", "vicuna_v1", "--histogram", folder / "h.png", "--workers", 0)
    assert result.exit_code == 0, result.output
    pixels = Image.open(folder / "h.png").convert("RGB")
    assert min(pixels.size) > 300
    assert len(pixels.getcolors(1 << 20)) > 10


def test_a_histogram_that_cannot_be_is_refused_at_once(folder, tiny_next, monkeypatch):
    path = write(folder, GOOD)
    for option, target, says in (
        ("--histogram", "h.txt", "is a .png, .pdf, .svg file"),
        ("--histogram", "no/h.png", "there is no folder"),
        ("--json", "no/r.json", "there is no folder"),
    ):
        result = run(path, "-m", tiny_next, option, folder / target)
        assert isinstance(result.exception, DataError)
        assert says in str(result.exception)
    assert "needs a model" in str(run(path, "--histogram", folder / "h.png").exception)
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    result = run(path, "-m", tiny_next, "--histogram", folder / "h.png")
    assert "pip install 'llava_fast[plot]'" in str(result.exception)


def test_a_wrong_recipe_or_model_is_an_error(folder):
    (folder / "recipe.yaml").write_text("modle: x")
    with pytest.raises(RecipeError, match="modle"):
        plan_for(f"{folder}/recipe.yaml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        plan_for(f"{folder}/no.yaml")
    with pytest.raises(DataError, match="data file, not a recipe: leave out --set a=1"):
        plan_for(write(folder, GOOD), changes=["a=1"])
    with pytest.raises(CheckpointError):
        check(plan_for(write(folder, GOOD), model=f"{folder}/no-model"), workers=0)


def test_help_teaches():
    result = run("--help")
    assert result.exit_code == 0
    for word in ("--histogram", "--json", "--max-length", '"conversations"', "recipe.yaml"):
        assert word in result.output


def test_a_recipe_is_found_by_its_name_and_changed(folder, tiny_next):
    data = write(folder, [sample("no.jpg", id="000007")])
    made = plan_for("llava-1.5-stage1", changes=[f"model={tiny_next}", f"data.sources.0.path={data}"])
    assert (made.template, made.model, made.sources[0].path) == ("plain", str(tiny_next), str(data))
    found = run("llava-1.5-stage1", "-s", f"model={tiny_next}", "-s", f"data.sources.0.path={data}", "--workers", 0)
    assert found.exit_code == 1
    assert "missing file" in found.stdout
    assert "000007" in found.stdout
