"""The demo model's answers by continuous batching, by processes and by Ray's actors are those of `generate`."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import llava_fast
from llava_fast.demo.run import model_path
from llava_fast.errors import EvaluationError
from llava_fast.evaluate import workers
from llava_fast.evaluate.model import ModelSpec, answers_of
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer, Question
from llava_fast.evaluate.tasks import task_of
from llava_fast.evaluate.tasks.demo import Demo
from tests.support import published

OPTIONS = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return llava_fast.load(model_path(), device="cpu")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return Demo("3").questions(Path())


@pytest.fixture(scope="module")
def expected(model, questions) -> dict[str, Answer]:
    made = model.generate([question.request() for question in questions], **OPTIONS)
    return {
        question.id: Answer(each.text, len(each.token_ids), each.usage.prompt_tokens, each.finish_reason)
        for question, each in zip(questions, made, strict=True)
    }


def by_id(answered) -> dict[str, Answer]:
    return {question.id: answer for question, answer in answered}


@pytest.mark.parametrize("running", [1, 5, 32])
def test_answers_are_those_of_generate(model, questions, expected, running):
    assert by_id(answers_of(model, questions, OPTIONS, running)) == expected


def test_drawn_answers_depend_on_seed_and_question_alone(model, questions):
    """So that a run that goes on, or one in other blocks, draws the same."""
    options = {**OPTIONS, "temperature": 2.0, "seed": 5}
    whole = by_id(answers_of(model, questions, options))
    assert by_id(answers_of(model, questions[3:], options)) == {q.id: whole[q.id] for q in questions[3:]}
    assert by_id(answers_of(model, questions, {**options, "seed": 6})) != whole


def test_what_cannot_be_asked_is_an_answer_with_an_error(model, questions, expected, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = Question("bad", "?", "?", (str(tmp_path / "bad.png"),))
    long = Question("long", "?", "word " * 5000, ())
    found = by_id(answers_of(model, [bad, *questions[:2], long], OPTIONS))
    assert "is not an image" in found["bad"].error
    assert "tokens" in found["long"].error
    assert {name: found[name] for name in (q.id for q in questions[:2])} == {
        name: expected[name] for name in (q.id for q in questions[:2])
    }


def test_text_is_text_and_placed_pictures_are_placed(model, tmp_path):
    """ "<image>" in a benchmark's text is no picture; in LLaVA-format text it is."""
    published.picture(tmp_path / "p.png")
    path = str(tmp_path / "p.png")
    plain = Question("plain", "?", "What is <image> and </s>?", (path,))
    placed = Question("placed", "?", "<image>\nRead the digits.", (path,), placed=True)
    front = Question("front", "?", "Read the digits.", (path,))
    found = by_id(answers_of(model, [plain, placed, front], OPTIONS))
    assert all(answer.error is None for answer in found.values())
    assert found["placed"] == found["front"]


def test_a_caller_that_stops_leaves_nothing_running(model, questions):
    answered = answers_of(model, iter(questions), OPTIONS, running=2)
    next(answered)
    answered.close()


def test_identity_is_of_the_contents_not_the_place(tmp_path):
    def made(name: str, weights: bytes) -> dict:
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        return ModelSpec(str(folder), device=name).identity()

    assert made("a", b"1" * 200000) == made("b", b"1" * 200000) != made("c", b"1" * 199999 + b"2")


def test_a_model_in_the_home_directory_is_known_by_its_contents(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelSpec("~/model").identity() == ModelSpec(str(tmp_path / "model")).identity()


def test_the_cache_is_in_8_bits_where_asked():
    spec = ModelSpec(str(model_path()), "cpu", kv_cache="int8")
    assert spec.load().decoder.cache_codes == "int8"
    assert spec.identity()["kv_cache"] == "int8"  # answers depend on it


def test_processes(questions, expected):
    spec = ModelSpec(str(model_path()), "cpu")
    assert by_id(workers.in_processes(spec, 2)(questions, OPTIONS)) == expected


def test_a_process_that_cannot_load(tmp_path):
    spec = ModelSpec(str(tmp_path), "cpu")
    with pytest.raises(EvaluationError, match=r"config\.json"):
        list(workers.in_processes(spec, 1)([Question("1", "?", "?", ())], OPTIONS))


class DeadQueue:
    def get(self, timeout):
        raise workers.queue.Empty


def test_a_process_that_dies_ends_the_run():
    with pytest.raises(EvaluationError, match="ended with code -9"):
        workers._next(DeadQueue(), [SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=-9)])


class FakeRay:
    """Enough of Ray to run actors in this process. `lost`: the block whose result is lost with its actor."""

    __spec__ = object()

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, lost: int | None = None) -> None:
        self.lost, self.done, self.killed, self.actors = lost, 0, 0, 0

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 2}

    def remote(self, num_gpus):
        assert num_gpus == 0
        return lambda kind: SimpleNamespace(remote=lambda *args: self.actor(kind(*args)))

    def actor(self, made):
        self.actors += 1
        return SimpleNamespace(answer=SimpleNamespace(remote=lambda *args: Task(lambda: made.answer(*args))))

    def wait(self, tasks):
        return tasks[:1], tasks[1:]

    def get(self, task):
        self.done += 1
        if self.lost == self.done:
            raise self.exceptions.RayError("a long story\nthe actor died")
        return task.run()

    def kill(self, actor):
        self.killed += 1


class Task:
    def __init__(self, run) -> None:
        self.run = run


@pytest.mark.parametrize("lost", [None, 2])
def test_ray(questions, expected, monkeypatch, lost):
    ray = FakeRay(lost)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(workers, "BLOCK", 5)
    answered = workers.on_ray(ModelSpec(str(model_path()), "cpu"), 2)(questions, OPTIONS)
    if lost is None:
        assert by_id(answered) == expected
    else:
        assert {question.id for question, _ in (next(answered) for _ in range(5))} < set(expected)
        with pytest.raises(EvaluationError, match=r"the actor died.*kept"):
            next(answered)
    assert ray.actors == ray.killed == 2


@pytest.mark.parametrize(("name", "choose"), [("seed", "likelihood"), ("scienceqa", "mean_likelihood")])
def test_options_are_chosen_by_their_likelihood(model, tmp_path, name, choose):
    getattr(published, name)(tmp_path)
    plan = Plan((name,), tmp_path, tmp_path / "out", {"path": "demo"}, choose=choose)
    results = run(plan, lambda questions, options: answers_of(model, questions, options, 2))
    assert results["settings"]["choose"] == choose
    (task,) = results["tasks"].values()
    assert task["errors"] == 0
    for row in task["answers"]:
        question = next(each for each in asked_of(name, tmp_path) if each.id == row["id"])
        ranked = model.rank(
            question.request(), [text for _, text in question.candidates], "mean" if choose.startswith("m") else "sum"
        )
        assert row["answer"] == row["read"] == "ABCDE"[ranked[0].index]
        assert question.prompt == (question.text if name == "seed" else row["prompt"])
    with pytest.raises(EvaluationError, match="holds answers with choose"):
        run(replace(plan, choose="answer"), lambda *_: iter(()))


def asked_of(name: str, data: Path) -> list[Question]:
    task = task_of(name)
    folder = data / task.folder if (data / task.folder).is_dir() else data
    return [task.with_candidates(question) for question in task.questions(folder)]


def test_a_question_that_cannot_be_ranked_is_an_error_of_its_own(model, questions, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = replace(questions[0], candidates=(("A", "7"), ("B", "3")))
    bad = replace(questions[1], images=(str(tmp_path / "broken.png"),), candidates=(("A", "7"),))
    found = by_id(answers_of(model, [good, bad], {"choose": "likelihood"}))
    assert found[good.id].text in ("A", "B")
    assert found[bad.id].error is not None


def test_tasks_without_options_cannot_be_ranked(tmp_path):
    published.pope(tmp_path)
    plan = Plan(("pope",), tmp_path, tmp_path / "out", {}, choose="likelihood")
    with pytest.raises(EvaluationError, match=r"pope has no options .* scienceqa, mmbench, seed, ai2d"):
        run(plan, lambda *_: iter(()))
