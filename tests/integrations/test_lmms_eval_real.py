"""The lmms-eval model classes in lmms-eval itself: its evaluator on tasks of local files, nothing downloaded."""

import json

import numpy as np
import pytest
from PIL import Image

import llava_fast
from tests.support import tiny

pytest.importorskip(
    "lmms_eval.evaluator", reason="needs lmms-eval (pip install lmms-eval==0.7.3)", exc_type=ImportError
)

QUESTIONS = ["what is this?", "and what is that, would you say?", "the last one"]
CHOICES = ["hello", "a longer answer", "no"]
FUNCTIONS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def video(doc):
    return [doc["video"]]

def question(doc, kwargs=None):
    return doc["question"]

def losses(doc, results):
    (loss, greedy), = results
    return {"loss": loss, "greedy": float(greedy)}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_visual: !function functions.{visual}
doc_to_text: !function functions.question
doc_to_target: answer
"""
GENERATES = """
generation_kwargs: {max_new_tokens: 6, until: ["q"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSES = """
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SCORES = """
process_results: !function functions.losses
metric_list: [{metric: loss, aggregation: mean, higher_is_better: false}, {metric: greedy, aggregation: mean}]
"""
KINDS = {
    "tiny_generate": ("generate_until", "pictures", GENERATES),
    "tiny_video": ("generate_until", "video", GENERATES),
    "tiny_choice": ("multiple_choice", "pictures", CHOOSES),
    "tiny_loss": ("loglikelihood", "pictures", SCORES),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, pictures, videos, and the tasks on them."""
    folder = tmp_path_factory.mktemp("lmms")
    tiny.save(tiny.CASES["video"], tiny.pair("video").hf, folder / "model")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "functions.py").write_text(FUNCTIONS)
    docs = []
    for number, question in enumerate(QUESTIONS):
        image, video = folder / f"{number}.png", folder / f"{number}.mp4"
        Image.fromarray(tiny.picture(60, 90, number)).save(image)
        write_video(video, number)
        doc = {"question": question, "image": str(image), "video": str(video), "choices": CHOICES, "answer": number}
        docs.append(doc | {"answer": CHOICES[number]})
    data = folder / "docs.json"
    data.write_text("\n".join(json.dumps(doc) for doc in docs))
    for name, (output_type, visual, more) in KINDS.items():
        text = TASK.format(name=name, data=data, output_type=output_type, visual=visual) + more
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder, docs


def write_video(path, seed):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(7):
            frame = av.VideoFrame.from_ndarray(tiny.picture(48, 64, seed * 10 + number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def evaluate(files, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def run(task, **options):
        return simple_evaluate(
            model="llava_fast",
            model_args=f"pretrained={files[0] / 'model'},chat_template=vicuna_v1,device=cpu,video_frames=4",
            tasks=[task],
            task_manager=TaskManager(include_path=str(files[0] / "tasks"), include_defaults=False),
            batch_size=2,
            bootstrap_iters=0,
            **options,
        )

    return run


def model(files):
    return llava_fast.load(
        files[0] / "model",
        device="cpu",
        chat_template="vicuna_v1",
        processor=llava_fast.ProcessorOptions(video_frames=4),
    )


def request(doc, kind="image"):
    shown = {"images": [Image.open(doc["image"])]} if kind == "image" else {"video": doc["video"]}
    items = [{"type": kind}, {"type": "text", "text": doc["question"]}]
    return {"messages": [{"role": "user", "content": items}], **shown}


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_answers_and_their_tokens(kind, simple, evaluate, files):
    task = "tiny_generate" if kind == "image" else "tiny_video"
    samples = evaluate(task, force_simple=simple)["samples"][task]
    expected = model(files).generate([request(doc, kind) for doc in files[1]], max_new_tokens=6, stop=["q"])
    assert [sample["resps"] for sample in samples] == [[[made.text]] for made in expected]
    counts = [{"input_tokens": e.usage.prompt_tokens, "output_tokens": e.usage.completion_tokens} for e in expected]
    assert [sample["token_counts"] for sample in samples] == [[count] for count in counts]


def expected_losses(model, doc, choices):
    """The mean loss of each choice, its end of turn included, and how many tokens that is."""
    losses, counts = [], []
    for choice in choices:
        asked = request(doc)
        asked["messages"].append({"role": "assistant", "content": choice})
        batch = model.prepare([asked], labels=True)
        losses.append(model(batch).loss.item())
        targets = len(batch.plan.column("supervised_row"))
        counts.append({"input_tokens": sum(batch.plan.lengths) - targets, "output_tokens": targets})
    return losses, counts


def test_multiple_choice(evaluate, files):
    out = evaluate("tiny_choice", force_simple=True)
    engine, right = model(files), []
    for sample, doc in zip(out["samples"]["tiny_choice"], files[1], strict=True):
        losses, counts = expected_losses(engine, doc, CHOICES)
        np.testing.assert_allclose([loss for ((loss, _),) in sample["resps"]], losses, rtol=1e-5)
        assert sample["token_counts"] == counts
        right.append(CHOICES[int(np.argmin(losses))] == doc["answer"])
    assert out["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_loglikelihood(evaluate, files):
    out = evaluate("tiny_loss", force_simple=True)
    engine = model(files)
    losses = [expected_losses(engine, doc, [doc["answer"]])[0][0] for doc in files[1]]
    found = out["results"]["tiny_loss"]
    assert found["loss,none"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["greedy,none"] == 0
