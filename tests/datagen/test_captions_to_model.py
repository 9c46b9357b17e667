"""From COCO's files to a model that is trained, judged and preference-tuned: every command, against an endpoint that
fails, stalls, truncates and lies, with kills at random, and against `llava-fast serve`."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from llava_fast.cli.main import app
from llava_fast.demo import answer, compose, split_scans
from llava_fast.demo.run import model_path
from tests.serve.conftest import serving
from tests.support import published
from tests.support.scripted_endpoint import completion, scripted

CANVASES = 24
FAULTS = ("500", "429", "drop", "truncate", "stall", "not json", "no choices")
TRAINING = {
    "trainable": ["projector", "decoder"],
    "optimizer": {"learning_rate": 1e-5},
    "batch_size": 4,
    "micro_batch_rows": 3200,
    "precision": "float32",
    "recompute": "none",
    "spike": None,
    "tensorboard": False,
    "steps": 3,
}


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


@pytest.fixture
def coco(tmp_path):
    """COCO's two files about pictures of digits."""
    rng, (scans, _) = np.random.default_rng(5), split_scans()
    images, captions, boxes = [], [], []
    (tmp_path / "pictures").mkdir()
    for number in range(CANVASES):
        canvas = compose(rng, scans, int(rng.integers(2, 6)))
        name, (height, width, _) = f"{number:012}.png", canvas.image.shape
        Image.fromarray(canvas.image).save(tmp_path / "pictures" / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        captions.append({"image_id": number, "caption": f"The digits {answer('read', canvas.digits)} are written."})
        for digit, (left, top, right, bottom) in zip(canvas.digits, canvas.boxes, strict=True):
            boxes.append({"image_id": number, "category_id": digit, "bbox": [left, top, right - left, bottom - top]})
    categories = [{"id": digit, "name": f"digit {digit}"} for digit in range(10)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    return tmp_path / "captions.json", tmp_path / "instances.json"


def digits_in(text: str) -> list[int]:
    return [int(digit) for digit in re.search(r"The digits ([\d ]+) are", text)[1].split()]


def lie(text: str) -> dict | str | None:
    """For about one text of eight a reply that is no answer, always the same for the same text."""
    lies = [completion(""), completion(None, refusal="No."), completion("Cut", "length"), "The caption says 3.", "Eh."]
    number = hashlib.blake2b(text.encode(), digest_size=2).digest()[0]
    return lies[number % len(lies)] if number < 32 else None


def writes(body):
    """A language model that knows the digits of a caption."""
    system, text = body["messages"][0]["content"], body["messages"][-1]["content"]
    if (lying := lie(system + text)) is not None:
        return lying
    digits = digits_in(text)
    if "detailed descriptions" in system:
        return f"Here are {len(digits)} digits: {answer('read', digits)}"
    if "need reasoning" in system:
        return f"Question: Which is the largest digit?\nAnswer: {answer('largest', digits)}"
    return (
        f"Question: Read the digits.\nAnswer: {answer('read', digits)}\n"
        f"Question: How many digits are there?\nAnswer: {answer('count', digits)}"
    )


def scores(body):
    """A judge of answers: 5 for the digits of the caption, in order, else 1."""
    text = body["messages"][-1]["content"]
    if "A right answer" in text:
        return "I would rather not say."
    given = re.search(r"Answer: (.*)", text)[1]
    right = [answer(kind, digits_in(text)) for kind in ("read", "count", "largest")]
    return f"Reason: compared.\nScore: {5 if given in right else 1}"


def grades(body):
    """A judge that gives the reference 8 and the model 6, and one more to what comes first: over both orders, 8.5 and
    6.5."""
    first, second = re.findall(r"# Answer of assistant \d\n(.*?)\n\(end", body["messages"][-1]["content"], re.DOTALL)
    reference_first = first.startswith("Reference ")
    assert reference_first != second.startswith("Reference ")
    return "9 6\nFine." if reference_first else "7 8\nFine."


def some(rng, share):
    """A fault for this share of requests."""
    return lambda body, number: rng.choice(FAULTS) if rng.random() < share else None


def killed_until_done(server, rng, out, *command) -> int:
    """Run a command in a process that is killed after some requests, three times, and then to its end; returns how
    often it was killed before it had written its output."""
    kills = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "llava_fast", *map(str, command)],
            env={**os.environ, "OPENAI_API_KEY": "sk-of-tests"},
        )
        end = len(server.bodies) + rng.randint(2, 8)
        while process.poll() is None and (attempt == 3 or len(server.bodies) < end):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
    assert process.returncode == 0
    assert out.exists()
    return kills


def written_by_itself(captions, folder, url):
    """Instructions written by `llava-fast serve` with the demo model, whose context takes a short prompt."""
    (folder / "own").mkdir()
    (folder / "own" / "digits.yaml").write_text(
        "form: answer\nsystem: Name the digits.\nquestions: [Read.]\noptions: {max_tokens: 8}\nmay_repeat: true\n"
    )
    make = ("make-data", "instruct", "--coco-captions", captions, "--texts", folder / "own", "--mix", "digits=1")
    told = run(*make, "--endpoint", url, "--endpoint-model", "tiny", "-o", folder / "own.json")
    assert "failed" not in told
    assert "estimated" not in told  # the server tells tokens
    report = json.loads((folder / "own.report.json").read_text())
    assert report["made"]["digits"] + sum(report["left_out"].values()) == CANVASES


def recipe(path, **fields):
    path.write_text(yaml.safe_dump({**TRAINING, **fields}))
    return path


def test_from_captions_to_a_judged_and_tuned_model(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-tests")
    rng = random.Random(11)
    pictures, data = tmp_path / "pictures", tmp_path / "data.json"
    quick = ("--timeout", 1, "--attempts", 9, "--concurrency", 4, "--endpoint-model", "scripted")

    # captions -> data, killed and failing; an endpoint that only lies gives the same data to a run that is left alone
    make = ("make-data", "instruct", "--coco-captions", coco[0], "--coco-instances", coco[1])
    with scripted(writes, some(rng, 0.1), stall=2, delay=0.02) as server:
        asked = (*quick, "--endpoint", server.url, "-o", data)
        assert killed_until_done(server, rng, data, *make, *asked) >= 2
    with scripted(writes) as server:
        run(*make, *quick, "--endpoint", server.url, "-o", tmp_path / "alone.json")
    assert data.read_bytes() == (tmp_path / "alone.json").read_bytes()
    report = json.loads((tmp_path / "data.report.json").read_text())
    assert sum(report["made"].values()) + sum(report["left_out"].values()) >= CANVASES
    assert report["left_out"]
    assert set(report["made"]) == {"conversation", "detail", "reasoning"}

    # data check, training, eval
    start = str(model_path())
    assert "no problem found" in run("data", "check", data, "--images", pictures, "-m", start, "--workers", 0)
    sources = {"workers": 0, "sources": [{"path": str(data), "images": str(pictures)}]}
    run("train", recipe(tmp_path / "train.yaml", model=start, output=str(tmp_path / "trained"), data=sources))
    trained = tmp_path / "trained" / "model"
    published.ALL["llava-bench"](tmp_path / "bench")
    run("eval", trained, "demo:3", "llava-bench", "--data", tmp_path / "bench", "--out", tmp_path / "before")

    # judge
    with scripted(grades, some(rng, 0.2), stall=2) as server:
        run("judge", tmp_path / "before", "llava-bench", "--yes", *quick, "--endpoint", server.url)
    judged = json.loads((tmp_path / "before" / "results.json").read_text())["tasks"]["llava-bench"]
    assert judged["metrics"]["relative score"] == pytest.approx(100 * 6.5 / 8.5)

    # preferences: answers by `llava-fast serve`, scores by the endpoint that fails; then dpo, eval
    pairs = tmp_path / "pairs.jsonl"
    with serving(str(trained), "--device", "cpu") as served, scripted(scores, some(rng, 0.1), stall=2) as server:
        draws = ("--answer-endpoint", f"{served.url}/v1", "--answer-model", "tiny", "--answers", 4, "--temperature", 2)
        evidence = ("--images", pictures, "--coco-captions", coco[0], "--max-tokens", 12)
        # Answers come from a model on this CPU: a short limit on time would ask it again and again.
        patient = (*quick[2:], "--timeout", 60)
        run("make-data", "preferences", data, *draws, *evidence, *patient, "--endpoint", server.url, "-o", pairs)
        written_by_itself(coco[0], tmp_path, f"{served.url}/v1")
    found = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert found
    assert all(pair["chosen"] != pair["rejected"] for pair in found)
    sources["sources"][0]["path"] = str(pairs)
    dpo = {"dpo": {"beta": 0.1}, "batch_size": 2, "steps": 2}
    run("dpo", recipe(tmp_path / "dpo.yaml", model=str(trained), output=str(tmp_path / "tuned"), data=sources, **dpo))
    run("eval", tmp_path / "tuned" / "model", "demo:3", "--out", tmp_path / "after")
    assert "demo:3" in run("eval", "compare", tmp_path / "before", tmp_path / "after")
