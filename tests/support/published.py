"""The smallest files that have the layout of each benchmark's published ones, with pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(seed))


def picture_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def put_lines(path: Path, values: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def vqav2(data: Path) -> None:
    folder = data / "vqav2"
    questions = [
        {"image_id": 42, "question": "What is it?", "question_id": 420},
        {"image_id": 42, "question": "Is it red?", "question_id": 421},
    ]
    humans = [["dog"] * 3 + ["cat"] * 7, ["yes"] * 10]
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": 42,
            "question_type": kind,
            "answer_type": answer_type,
            "answers": [
                {"answer": each, "answer_confidence": "yes", "answer_id": n} for n, each in enumerate(answers, 1)
            ],
        }
        for question, answers, kind, answer_type in zip(
            questions, humans, ("what is", "is it"), ("other", "yes/no"), strict=True
        )
    ]
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    put(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    put(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")
    picture(folder / "test2015" / "COCO_test2015_000000000042.jpg")


def gqa(data: Path) -> None:
    folder = data / "gqa" / "data"
    kinds = [("query", "attr", "blue"), ("verify", "rel", "yes"), ("logical", "obj", "no")]
    questions = {
        f"10{n}": {
            "imageId": "n1",
            "question": f"Question {n}?",
            "answer": answer,
            "isBalanced": True,
            "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
        }
        for n, (structural, semantic, answer) in enumerate(kinds)
    }
    put(folder / "testdev_balanced_questions.json", questions)
    picture(folder / "images" / "n1.jpg")


def vizwiz(data: Path) -> None:
    rows = [
        {
            "image": "VizWiz_val_00000000.jpg",
            "question": "What is this?",
            "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10,
            "answer_type": "unanswerable",
            "answerable": 0,
        },
        {
            "image": "VizWiz_val_00000001.jpg",
            "question": "Which colour?",
            "answers": [{"answer": each, "answer_confidence": "yes"} for each in ["blue"] * 2 + ["navy"] * 8],
            "answer_type": "other",
            "answerable": 1,
        },
    ]
    put(data / "vizwiz" / "val.json", rows)
    for number in range(2):
        picture(data / "vizwiz" / "val" / f"VizWiz_val_0000000{number}.jpg", number)


def textvqa(data: Path) -> None:
    row = {"question": "what brand?", "image_id": "0a", "question_id": 7, "answers": ["nokia"] * 10}
    put(data / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [row]})
    tokens = {"data": [{"image_id": "0a", "ocr_tokens": ["NOKIA", "5"]}]}
    put(data / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json", tokens)
    picture(data / "textvqa" / "train_images" / "0a.jpg")


def scienceqa(data: Path) -> None:
    folder = data / "scienceqa"
    problem = {"question": "Which?", "choices": ["one", "two", "three"], "hint": "Look.", "subject": "natural science"}
    problems = {
        "1": {**problem, "answer": 1, "image": "image.png", "split": "test", "grade": "grade2"},
        "2": {**problem, "answer": 0, "image": None, "split": "test"},
        "3": {**problem, "answer": 2, "image": "image.png", "split": "test", "hint": "", "subject": "social science"},
    }
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"test": ["1", "2", "3"]})
    for number in ("1", "3"):
        picture(folder / "images" / "test" / number / "image.png", int(number))


def pope(data: Path) -> None:
    for kind, labels in (("random", "yynn"), ("popular", "yynn"), ("adversarial", "yynn")):
        rows = [
            {"question_id": n + 1, "image": "COCO_val2014_000000000001.jpg", "text": f"Is there a {n}?", "label": label}
            for n, label in enumerate("yes" if each == "y" else "no" for each in labels)
        ]
        put_lines(data / "pope" / f"coco_pope_{kind}.json", rows)
    picture(data / "pope" / "val2014" / "COCO_val2014_000000000001.jpg")


def mme(data: Path) -> None:
    from llava_fast.evaluate.tasks.yes_no import COGNITION, PERCEPTION

    folder = data / "MME" / "MME_Benchmark_release_version"
    for number, category in enumerate(PERCEPTION + COGNITION):
        split = category in ("artwork", "celebrity", "landmark", "posters", "scene")
        texts = folder / category / ("questions_answers_YN" if split else "")
        pictures = folder / category / ("images" if split else "")
        for name in ("01", "02"):
            picture(pictures / f"{name}.png", number)
            texts.mkdir(parents=True, exist_ok=True)
            lines = ["Is it a? Please answer yes or no.\tYes", "Is it b? Please answer yes or no.\tNo"]
            (texts / f"{name}.txt").write_text("\n".join(lines) + "\n")


def mmbench(data: Path) -> None:
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
    image = base64.b64encode(picture_bytes()).decode()
    rows = [
        ["241", "Which animal?", "", "cat", "dog", "", "", "B", "kinds", image, "perception", "dev"],
        ["252", "Which sum?", 'A "hint"', "1", "2", "3", "", "A", "sums", image, "reasoning", "dev"],
    ]
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    quoted = ['"' + field.replace('"', '""') + '"' if '"' in field else field for row in rows for field in row]
    lines = ["\t".join(quoted[at : at + len(names)]) for at in range(0, len(quoted), len(names))]
    path.write_text("\n".join(["\t".join(names), *lines]) + "\n")


def seed(data: Path) -> None:
    folder = data / "seed_bench"
    question = {"choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z", "question": "Where?"}
    questions = [
        {**question, "answer": "C", "data_id": "1_2", "data_type": "image", "question_id": "5", "question_type_id": 1},
        {**question, "answer": "A", "data_id": "v", "data_type": "video", "question_id": "6", "question_type_id": 10},
    ]
    kinds = {"Scene Understanding": 1, "Action Recognition": 10}
    put(folder / "SEED-Bench.json", {"questions": questions, "question_type": kinds})
    picture(folder / "SEED-Bench-image" / "1_2")


def ai2d(data: Path) -> None:
    folder = data / "ai2d"
    value = {"abcLabel": False, "answerTexts": ["p", "q", "r", "s"], "correctAnswer": 3, "questionId": "0.png-0"}
    put(folder / "questions" / "0.png.json", {"imageName": "0.png", "questions": {"What is R?": value}})
    put(folder / "questions" / "1.png.json", {"imageName": "1.png", "questions": {"Not tested": value}})
    (folder / "ai2d_test_ids.csv").write_text("0\n")
    picture(folder / "images" / "0.png")


def chartqa(data: Path) -> None:
    folder = data / "ChartQA Dataset" / "test"
    put(folder / "test_human.json", [{"imgname": "a.png", "query": "How many?", "label": "100"}])
    put(folder / "test_augmented.json", [{"imgname": "a.png", "query": "Who?", "label": "Ann"}])
    picture(folder / "png" / "a.png")


def docvqa(data: Path) -> None:
    row = {
        "questionId": 9,
        "question": "What date?",
        "question_types": ["layout"],
        "image": "documents/d_1.png",
        "answers": ["May 5", "5 May"],
    }
    put(data / "docvqa" / "val_v1.0_withQT.json", {"dataset_name": "docvqa", "data": [row]})
    picture(data / "docvqa" / "documents" / "d_1.png")


def llava_bench(data: Path) -> None:
    folder = data / "llava-bench-in-the-wild"
    kinds = ("conv", "detail", "complex")
    rows = [
        {"question_id": n, "image": "001.jpg", "text": f"Question {n}?", "category": kind}
        for n, kind in enumerate(kinds)
    ]
    put_lines(folder / "questions.jsonl", rows)
    put_lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A cat on a mat."}])
    put_lines(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Reference {n}."} for n in range(3)])
    picture(folder / "images" / "001.jpg")


def llava_bench_coco(data: Path) -> None:
    folder = data / "coco2014_val_qa_eval"
    rows = [{"question_id": 0, "image": "000000000001.jpg", "text": "What colour?", "category": "conv"}]
    boxes = [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]
    context = {"id": "000000000001", "image": "000000000001.jpg", "captions": ["A cat.", "A mat."], "instances": boxes}
    put_lines(folder / "qa90_questions.jsonl", rows)
    put_lines(folder / "caps_boxes_coco2014_val_80.jsonl", [context])
    put_lines(folder / "qa90_gpt4_answer.jsonl", [{"question_id": 0, "text": "Grey.", "category": "conv"}])
    picture(folder / "val2014" / "COCO_val2014_000000000001.jpg")


def llava_bench_wilder(data: Path) -> None:
    folder = data / "llava-bench-wilder"
    rows = [{"question_id": "w1", "image": "w1.png", "Question": "Why?", "Answer": "So.", "Category": "Reasoning"}]
    put_lines(folder / "questions.jsonl", rows)
    picture(folder / "images" / "w1.png")


def mm_vet(data: Path) -> None:
    folder = data / "mm-vet"
    rows = {
        "v1_0": {"imagename": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "v1_0.png", "question": "y?", "answer": "a<OR>b", "capability": ["rec"]},
    }
    put(folder / "mm-vet.json", rows)
    picture(folder / "images" / "v1_0.png")


ALL = {
    "vqav2": vqav2,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "textvqa": textvqa,
    "textvqa-ocr": textvqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "seed": seed,
    "ai2d": ai2d,
    "chartqa": chartqa,
    "docvqa": docvqa,
    "llava-bench": llava_bench,
    "llava-bench-coco": llava_bench_coco,
    "llava-bench-wilder": llava_bench_wilder,
    "mm-vet": mm_vet,
}
"""Task -> what writes its files below a data folder."""
