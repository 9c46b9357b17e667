"""Samples that turn out bad at their step, and samples that are taken out while a run is stopped."""

import json
import logging
import signal

import numpy as np
import pytest
import torch

import llava_fast
from llava_fast.errors import TrainingError
from llava_fast.train import trainer
from llava_fast.train.data.run_samples import FILE as FILE_OF_SAMPLES
from llava_fast.train.metrics import FILE, LEFT_OUT, read_metrics
from llava_fast.train.run import train
from llava_fast.train.trainer import Trainer
from tests.support.made_data import write_data
from tests.support.training_runs import break_off, losses

BAD = {4: "4_0.png", 7: "7_1.png", 9: "9_0.png"}  # of twelve; of sample 7 the second image


@pytest.fixture
def folder(tmp_path):
    """Data with three images whose headers are sound and whose pixels are not."""
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", 12)
    for name in BAD.values():
        spoil(tmp_path / "data" / name)
    return tmp_path / "data"


def spoil(path) -> None:
    """Cut a PNG off in its pixels."""
    path.write_bytes(path.read_bytes()[:-400])


@pytest.fixture
def over(recipe_in, tmp_path):
    """Recipes over the data in a folder."""

    def make(name, folder, **changes):
        data = {"sources": [{"path": str(folder / "data.json")}], "on_problem": "skip"} | changes.pop("data", {})
        settings = {"batch_size": 4, "epochs": 2, "micro_batch_rows": 700, "checkpoints": {"every": 2}}
        settings |= {"trainable": ["projector"], "recompute": "none"} | changes
        return recipe_in(tmp_path / name, data=data, **settings)

    return make


def without(folder, numbers) -> None:
    """Take samples out of a folder's data."""
    path = folder / "data.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([record for record in records if int(record["id"].split("-")[1]) not in numbers]))


def left_out(recipe) -> list[list[int]]:
    """The numbers of the samples that each step left out."""
    steps = read_metrics(recipe.output / FILE)
    assert all(step["left_out"] == len(step.get("left_out_samples", [])) for step in steps)
    return [
        [int(problem.split("]")[0].split("[")[1]) for problem in step.get("left_out_samples", [])] for step in steps
    ]


def weights(recipe):
    return list(llava_fast.load(recipe.output / "model").parameters())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_is_bad_at_its_step_is_left_out(over, folder, caplog, workers):
    recipe = over("run", folder, data={"workers": workers})
    with caplog.at_level(logging.WARNING, "llava_fast.train"):
        train(recipe)
    met = left_out(recipe)
    assert len(losses(recipe)) == 6
    assert None not in losses(recipe)
    for epoch in (met[:3], met[3:]):  # in each again
        assert sorted(number for step in epoch for number in step) == sorted(BAD)
    listed = (recipe.output / LEFT_OUT).read_text().splitlines()
    assert len(listed) == 3
    for number, name in BAD.items():
        assert sum(f"data.json[{number}] (id sample-{number})" in line and name in line for line in listed) == 1
    assert "3 samples were left out of their steps" in caplog.text
    assert LEFT_OUT in caplog.text


@pytest.mark.parametrize("batching", ["packed", "padded", "grouped"])
def test_a_step_is_as_if_the_sample_had_not_been_there(over, folder, monkeypatch, batching):
    """Losses are those of the same steps over the sound samples alone."""
    changes = {"data": {"batching": batching}, "micro_batch": 1, "steps": 3}
    if batching != "packed":
        changes["loss_average"] = "micro_batch"
    recipe, gone = over("run", folder, **changes), over("gone", folder, **changes)
    train(recipe)
    break_off(gone, 0)  # it numbers the samples
    (gone.output / "checkpoints" / "step-000000").mkdir(parents=True)
    without(folder, BAD)
    monkeypatch.setattr(Trainer, "resume", lambda self: 0)
    train(gone)
    np.testing.assert_allclose(losses(recipe), losses(gone), rtol=1e-5)
    assert sum(map(len, left_out(recipe))) == 3
    assert not any(left_out(gone))


@pytest.mark.parametrize("shape", [{"kind": "ddp"}, {"kind": "fsdp2", "tensor": 2}])
def test_every_process_leaves_it_out(over, folder, run, shape):
    """Also where it was all that a process had, and where two processes share it."""
    alone = over("alone", folder, micro_batch_rows=1, steps=3)
    train(alone)
    shared = over("shared", folder, micro_batch_rows=1, steps=3, parallel=shape)
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)
    assert left_out(shared) == left_out(alone)
    assert sum(map(len, left_out(alone))) == 3


def test_a_step_without_a_sound_sample_changes_nothing(over, folder, run):
    for path in folder.glob("*.png"):
        spoil(path)
    alone = over("alone", folder, batch_size=1, epochs=1)
    train(alone)
    spoilt = [step["loss"] is None for step in read_metrics(alone.output / FILE)]
    assert spoilt == [bool(numbers) for numbers in left_out(alone)]
    assert 0 < sum(spoilt) < 12
    shared = over("shared", folder, batch_size=1, epochs=1, parallel={"kind": "fsdp2"})
    run(shared, processes=2)
    assert [loss is None for loss in losses(shared)] == spoilt
    kept = [number for number, bad in enumerate(spoilt) if not bad]
    np.testing.assert_allclose(*(np.array(losses(each))[kept].astype(float) for each in (shared, alone)), rtol=1e-4)


def test_a_run_whose_data_is_gone_stops(over, folder, monkeypatch):
    monkeypatch.setattr(trainer, "MOST_EMPTY_STEPS", 2)
    for path in folder.glob("*.png"):
        spoil(path)
    recipe = over("gone", folder, batch_size=1, epochs=8)
    with pytest.raises(TrainingError, match="no sample of the last 2 steps could be read"):
        train(recipe)
    assert [loss is None for loss in losses(recipe)][-2:] == [True, True]
    assert not (recipe.output / "model").exists()


def test_a_killed_run_leaves_out_the_same(over, folder, tmp_path):
    whole = over("whole", folder, data={"workers": 2})
    train(whole)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 5)
    train(killed)
    assert losses(killed) == losses(whole)
    assert left_out(killed) == left_out(whole)
    assert (killed.output / LEFT_OUT).read_text() == (whole.output / LEFT_OUT).read_text()
    assert all(torch.equal(a, b) for a, b in zip(weights(killed), weights(whole), strict=True))


def test_two_killed_processes_leave_out_the_same(over, folder, run):
    settings = {"parallel": {"kind": "fsdp2"}, "steps": 4, "checkpoints": {"every": 1}, "data": {"workers": 1}}
    whole, killed = (over(name, folder, **settings) for name in ("whole", "killed"))
    run(whole, processes=2)
    assert run(killed, processes=2, kill="step:3") == [-signal.SIGKILL] * 2
    run(killed, processes=2)
    assert losses(killed) == losses(whole)
    assert left_out(killed) == left_out(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_to_stop_names_the_file_and_goes_on_once_it_is_taken_out(over, folder, caplog, workers):
    recipe = over("run", folder, data={"on_problem": "stop", "workers": workers}, checkpoints={"every": 1})
    taken: set[int] = set()
    said = r"step \d+: data\.json\[\d+\] \(id sample-(\d+)\): '.*/\d+_\d\.png' cannot be decoded: .*on_problem: skip"
    for starts in (2, 1, 1):  # the first again as it is
        for _ in range(starts):
            with pytest.raises(TrainingError, match=said) as caught:
                train(recipe)
            assert "\n" not in str(caught.value)
        number = int(str(caught.value).split("sample-")[1].split(")")[0])
        taken.add(number)
        without(folder, taken)
    assert taken == set(BAD)
    with caplog.at_level(logging.WARNING, "llava_fast.train"):
        train(recipe)
    assert len(losses(recipe)) == 6
    assert not (recipe.output / LEFT_OUT).exists()
    assert "samples of this run were removed from the data; the others keep their order" in caplog.text


def test_two_processes_stop_with_one_line(over, folder, run):
    recipe = over("run", folder, data={"on_problem": "stop"}, parallel={"kind": "ddp"})
    assert run(recipe, processes=2, after=300) == [1, 1]
    said = recipe.output.with_suffix(".log").read_text()
    assert said.count("TrainingError: step ") == 2
    assert "cannot be decoded" in said


def sampled(recipe) -> dict[int, list[int]]:
    """The samples of each step that a run takes."""
    steps, step = {}, Trainer.step

    def noting(self, batch):
        steps[batch.step] = sorted(int(name.split("sample-")[1].rstrip(")")) for name in batch.names)
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "step", noting)
        train(recipe)
    return steps


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_the_others_keep_their_order(over, tmp_path, caplog, batching):
    """A run that resumes without samples takes the steps that it would have taken, less those."""
    folders = [tmp_path / name for name in ("all", "fewer")]
    for folder in folders:
        folder.mkdir()
        write_data(folder, 12)
    whole, resumed = (over(f"run-{folder.name}", folder, data={"batching": batching}) for folder in folders)
    before = sampled(whole)
    train(resumed.model_copy(update={"steps": 2}))
    gone = {0, 5, 11, 8}
    without(folders[1], gone - {8})
    (folders[1] / "8_0.png").unlink()
    with caplog.at_level(logging.WARNING, "llava_fast.train"):
        after = sampled(resumed)
    assert after == {step: [number for number in before[step] if number not in gone] for step in range(2, 6)}
    assert "3 samples of this run were removed" in caplog.text
    assert "1 samples can no longer be used" in caplog.text
    assert "sample-8" in caplog.text
    assert sampled(resumed) == {}


def test_a_run_of_before_samples_were_numbered_goes_on(over, folder, tmp_path):
    recipe = over("run", folder)
    train(recipe.model_copy(update={"steps": 2}))
    (recipe.output / FILE_OF_SAMPLES).unlink()
    train(recipe)
    assert len(losses(recipe)) == 6
    assert (recipe.output / FILE_OF_SAMPLES).exists()


@pytest.mark.parametrize("change", ["added", "edited", "moved", "shorter"])
def test_other_changes_of_the_data_are_refused(over, folder, change):
    recipe = over("run", folder)
    train(recipe.model_copy(update={"steps": 1}))
    path = folder / "data.json"
    records = json.loads(path.read_text())
    if change == "added":
        records.append({**records[0], "id": "new"})
    elif change == "edited":
        records[3]["conversations"][-1]["value"] += " at all"
        del records[5]
    elif change == "moved":
        records[2], records[9] = records[9], records[2]
    else:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 450})})
    path.write_text(json.dumps(records))
    with pytest.raises(TrainingError, match=r"data, seed or batch size .* \(samples may be removed"):
        train(recipe)


# ---------------------------------------------------------------- pairs


@pytest.fixture
def pairs(folder):
    """The tiny data as preferences."""
    records = json.loads((folder / "data.json").read_text())
    for record in records:
        record["prompt"] = record.pop("conversations")[:1]
        record |= {"chosen": "a red cup", "rejected": "nothing at all"}
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("reference", ["precomputed", "base"])
def test_a_bad_pair_is_left_out(over, pairs, tmp_path, reference):
    settings = {"dpo": {"reference": reference}, "lora": {"rank": 2, "alpha": 4}, "trainable": []}
    whole = over("whole", pairs, **settings)
    train(whole)
    assert sum(step["left_out"] for step in read_metrics(whole.output / FILE)) == 2 * len(BAD)
    assert len((whole.output / LEFT_OUT).read_text().splitlines()) == len(BAD)
    assert None not in losses(whole)
    assert np.isfinite(losses(whole)).all()
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 3)
    train(killed)
    assert losses(killed) == losses(whole)
    assert left_out(killed) == left_out(whole)


def test_a_bad_pair_stops_while_the_reference_is_made(over, pairs):
    with pytest.raises(TrainingError, match=r"reference: data\.json\[4\] \(id sample-4\): .* \(2 more samples"):
        train(over("run", pairs, data={"on_problem": "stop"}, dpo={"reference": "precomputed"}))


def test_pairs_may_be_taken_out(over, pairs):
    recipe = over("run", pairs, dpo={"reference": "precomputed"}, epochs=1)
    train(recipe.model_copy(update={"steps": 1}))
    first = read_metrics(recipe.output / FILE)[0]["pairs"] + read_metrics(recipe.output / FILE)[0]["left_out"]
    gone = {0, 5, 10}
    without(pairs, gone)
    assert sorted(sampled(recipe)) == [1, 2]
    steps = read_metrics(recipe.output / FILE)
    assert first == 4
    assert np.isfinite(losses(recipe)).all()
    assert sum(step["pairs"] + step["left_out"] for step in steps[1:]) in range(5, 9)  # of 8, less those of the three
