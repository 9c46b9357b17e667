"""Collator and its plan: labels as the engine's own processor makes them, and answers that do not change."""

import contextlib
import inspect
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer

import llava_fast
from llava_fast.accelerated import shipped_plan, transfer
from llava_fast.accelerated.patch import NEW_NAMES
from llava_fast.accelerated.shipped_plan import NAMES, PlanError
from llava_fast.errors import ImageError, RequestError
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.inputs.labels import offsets_before_expansion
from llava_fast.integrations.collator import Collator
from llava_fast.integrations.processor import FastProcessor
from tests.support import against_stock, tiny
from tests.support.against_stock import (
    assert_same_gradients,
    assert_same_outputs,
    assert_same_visual_outputs,
    both,
    fresh,
    gradients,
    shallow,
)
from tests.support.parity import assert_close

FAMILIES = ["llava15", "next", "next_qwen", "video"]
TEMPLATE = "vicuna_v1"


def talk(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]


def samples() -> list[dict]:
    """Two images in one turn with text of several bytes a letter, two turns, text alone, and a verbatim prompt."""
    return [
        {
            "messages": talk("<image> oder <image>, äöü?", "the 2nd, ñ", "why?", "<im"),
            "images": [tiny.picture(60, 90), tiny.picture(30, 30)],
        },
        {"messages": talk("hello", "and hello to you, of whom no picture is here")},
        {"prompt": "USER: <image><image>\nhm? ", "answer": "no", "images": [tiny.picture(200, 20)] * 2},
    ]


MADE_ELSEWHERE = [("video", "both film none"), ("video_max_odd", "film"), ("onevision", "both two large none film")]
"""Batches whose features the processor made (a Collator takes no video as a file), all with pooled or shrunk rows."""


def features(name: str, which: str) -> list[dict]:
    """Features of against_stock.SAMPLES, one sample each."""
    made = []
    for key in which.split():
        each = against_stock.batch(name, key, labels=True)
        made.append({field: value[0] if field in ("input_ids", "labels") else value for field, value in each.items()})
        del made[-1]["attention_mask"]
    return made


def collator(name: str = "next", **options) -> Collator:
    case = tiny.CASES[name]
    return Collator(tiny.hf_processor(case), tiny.hf_config(case), **{"chat_template": TEMPLATE} | options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_and_labels_are_those_of_our_own_processor(side):
    made = collator(padding_side=side)(samples()[:2])
    ours = builtin_template(TEMPLATE)
    processor = replace(tiny.pair("next").ours.processor, template=ours)
    for number, sample in enumerate(samples()[:2]):
        columns = processor.prepare([sample], labels=True).plan.columns
        real = made["attention_mask"][number].bool()
        assert real.sum() == len(columns["label"])
        assert real[-1 if side == "left" else 0]
        assert made["labels"][number][real].tolist() == columns["label"].tolist()
        text = columns["source"] == 0
        assert made["input_ids"][number][real][text].tolist() == columns["row"][text].tolist()
        assert (made["labels"][number][~real] == -100).all()


def test_what_is_supervised_reads_as_the_answers():
    made = collator(end="</s>")(samples())
    words = tiny.tokenizer()
    said = [words.decode(labels[labels >= 0]) for labels in made["labels"]]
    assert said == [" the 2nd, ñ</s> <im</s>", " and hello to you, of whom no picture is here</s>", "no</s>"]
    labels = collator(end="")(samples())["labels"][2]
    assert words.decode(labels[labels >= 0]) == "no"


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_and_sizes_are_the_processors(name):
    made, case = collator(name)(samples()), tiny.CASES[name]
    pictures = [image for sample in samples() for image in sample.get("images", [])]
    expected = tiny.hf_processor(case).image_processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
    assert torch.equal(made["pixel_values"], expected["pixel_values"])
    assert ("image_sizes" in made) == ("image_sizes" in expected)
    if "image_sizes" in made:
        assert torch.equal(made["image_sizes"], expected["image_sizes"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "which"), [*((name, None) for name in FAMILIES), *MADE_ELSEWHERE])
def test_outputs_and_gradients_with_a_plan_are_stocks(name, which, side, no_fallback):
    stock, model = both(name)
    batch = collator(name, padding_side=side)(features(name, which) if which else samples())
    plain = shipped_plan.without(batch)
    assert set(batch) - set(plain) == set(NAMES)
    with torch.no_grad():
        found, expected = model(**batch), stock(**plain)
    assert_close("logits with a plan", found.logits, expected.logits, 1e-5)
    assert_same_visual_outputs("with a plan,", found, expected, together=True)
    (out, found), (expected_out, expected) = gradients(model, batch), gradients(stock, plain)
    assert_close("loss with a plan", out.loss, expected_out.loss, 1e-5)
    assert_same_gradients("gradients with a plan", found, expected)


def test_the_mixes_of_plans_are_those_of_the_models():
    """Rows pooled before and after the projector, with and without tables for gradients."""
    for name, which in MADE_ELSEWHERE:
        for labels in (False, True):
            batch = collator(name, labels=labels)(features(name, which))
            pooled, taps = batch["llava_plan_pool_index"].shape
            assert pooled
            assert taps == 4
            assert len(batch["llava_plan_pool_order"]) == (pooled * taps if labels else 0)


def test_videos_of_different_lengths_are_refused():
    short, long = features("video", "film both")
    short["pixel_values_videos"] = short["pixel_values_videos"][:, :2]
    with pytest.raises(RequestError, match=r"equal numbers of frames, got \[2, 3\]"):
        collator("video")([short, long])


def test_no_plan_is_made_of_videos_that_the_stock_path_serves():
    made = collator("video")
    made.config.spatial_pool_mode = "conv"
    assert not set(NAMES) & set(made(features("video", "film none")))


@pytest.mark.parametrize("where", ["embedding", "projector", "head"])
def test_a_plan_with_hooked_modules(where):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for each in (stock, model):
        parts = {"embedding": each.get_input_embeddings(), "projector": each.model.multi_modal_projector}
        parts["head"] = each.lm_head
        parts[where].register_forward_hook(lambda module, args, output: output * 1.1)
    batch = collator()(samples())
    expected = gradients(stock, shipped_plan.without(batch))[1]
    assert_same_gradients("gradients with a plan and a hook", gradients(model, batch)[1], expected)


def test_text_alone_and_no_labels():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    batch = collator()(samples()[1:2])
    assert "pixel_values" not in batch
    assert_same_gradients(
        "gradients with a plan of text", gradients(model, batch)[1], gradients(stock, shipped_plan.without(batch))[1]
    )
    batch = collator(labels=False)(samples())
    assert "labels" not in batch
    assert batch["llava_plan_supervised_row"].numel() == 0
    assert_same_outputs(model, stock, shipped_plan.without(batch))
    with torch.no_grad():
        found, expected = model(**batch), stock(**shipped_plan.without(batch))
    assert_close("logits with a plan", found.logits, expected.logits, 1e-5)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("name", "which"), [*((name, None) for name in FAMILIES), *MADE_ELSEWHERE])
def test_nothing_on_the_device_is_read(name, which, labels, monkeypatch):
    """A meta tensor has no values: whatever would wait for a GPU to tell them raises. (An attention mask is left out:
    transformers itself reads it, to see whether it masks anything.)"""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # autocast knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    given = features(name, which) if which else samples()
    model = llava_fast.accelerate(fresh(name)).to("meta")
    batch = {key: value.to("meta") for key, value in collator(name, labels=labels)(given).items()}
    del batch["attention_mask"]
    out = model(**batch)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert (out.loss is not None) == labels
    if labels:
        out.loss.backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(**shipped_plan.without(batch))


def test_without_a_plan_a_device_is_read_once(monkeypatch):
    model = llava_fast.accelerate(fresh("next"))
    batch = shipped_plan.without(collator()(samples()))
    reads = []
    monkeypatch.setattr(
        "llava_fast.accelerated.patch.read_integers",
        lambda *given: reads.append(1) or transfer.read_integers(*given),
    )
    model(**batch)
    model(**{name: value for name, value in batch.items() if name != "labels"})
    assert len(reads) == 2


def changed(batch: dict, how: str) -> dict:
    batch = dict(batch)
    if how == "shorter":
        return batch | {name: batch[name][:, 1:] for name in ("input_ids", "attention_mask", "labels")}
    if how == "another text":
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][1, -1] += 1
    if how == "other labels":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][batch["labels"] > 0] = -100
    if how == "a name missing":
        del batch["llava_plan_kept"]
    if how == "fewer tiles":
        batch["pixel_values"] = batch["pixel_values"][:1]
    if how == "no video":
        del batch["pixel_values_videos"]
    if how == "fewer frames":
        batch["pixel_values_videos"] = batch["pixel_values_videos"][:, :2]
    if how == "another place of the video":
        batch["input_ids"] = batch["input_ids"].roll(1, 1)
        del batch["labels"]
    if how == "another selection":
        batch["vision_feature_select_strategy"] = "full"
    if how == "no ids":
        batch["inputs_embeds"] = torch.zeros(*batch.pop("input_ids").shape, 64)
    return batch


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shorter", "the plan has .* rows, but input_ids"),
        ("another text", "input_ids were changed"),
        ("other labels", "labels were changed"),
        ("a name missing", "the plan lacks llava_plan_kept"),
        ("fewer tiles", "the plan has .* tiles, but pixel_values"),
        ("no video", "the plan has 6 frames, but pixel_values_videos is not given"),
        ("fewer frames", "the plan has 6 frames, but pixel_values_videos has"),
        ("another place of the video", "input_ids were changed"),
        ("another selection", "vision_feature_select_strategy='full'"),
        ("no ids", "without input_ids"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(how, says):
    name = "video" if "video" in how or "frames" in how else "next"
    model = llava_fast.accelerate(fresh(name))
    with pytest.raises(PlanError, match=says):
        model(**changed(collator(name)(features(name, "both film") if name == "video" else samples()), how))


@pytest.mark.parametrize("replicas", [2, 3])
def test_data_parallel_is_refused(replicas):
    """nn.DataParallel cuts every tensor of a batch along its first dimension."""
    model = llava_fast.accelerate(fresh("next"))
    batch = collator(padding_side="right")([samples()[2]] * replicas)
    parts = [dict(zip(batch, part, strict=False)) for part in zip(*(v.chunk(replicas) for v in batch.values()))]  # noqa: B905
    with pytest.raises(PlanError, match=r"nn.DataParallel"):
        model(**parts[0])


def test_labels_outside_the_vocabulary_are_refused():
    made = collator()
    features = made.features(samples()[1])
    features["labels"][-1] = tiny.VOCABULARY
    with pytest.raises(PlanError, match="the vocabulary has"):
        made([features])


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"do_sample": True}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generate_takes_a_collated_batch(how):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    batch = collator(labels=False)(samples())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how
    answers = []
    for each, given in ((model, batch), (stock, shipped_plan.without(batch))):
        torch.manual_seed(0)
        answers.append(each.generate(**given, **options).tolist())
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="llava_plan_source"):
        stock.generate(**batch, **options)
    with pytest.raises(ValueError, match="llava_plan_source"):
        llava_fast.restore(model).generate(**batch, **options)


def test_a_stock_models_forward_is_not_changed_by_the_names():
    stock = fresh("next")
    batch = collator()(samples())
    assert torch.equal(stock(**batch).logits, stock(**shipped_plan.without(batch)).logits)


def test_forwards_signature_is_stocks_and_the_plans():
    model, stock = llava_fast.accelerate(fresh("next")), fresh("next")
    found, expected = (inspect.signature(each.forward).parameters for each in (model, stock))
    assert set(NAMES) < set(NEW_NAMES) < set(found)
    assert [name for name in found if name not in NEW_NAMES] == list(expected)
    llava_fast.restore(model)
    assert list(inspect.signature(model.forward).parameters) == list(expected)


def test_stock_paths_leave_the_plan_out(caplog):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    batch = collator()(samples())
    for asked in ({"output_hidden_states": True}, {"logits_to_keep": 3, "labels": None}, {"return_dict": False}):
        found, expected = model(**batch | asked), stock(**shipped_plan.without(batch) | asked)
        for part in range(1 if "labels" in asked else 2):
            assert_close("with a plan, stock", found[part], expected[part], 1e-5)


def test_ddp_in_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
        for each in (stock, model):
            each.model.vision_tower.requires_grad_(False)
        batch = collator()(samples())
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(**batch).loss.backward()
        found = {name: None if p.grad is None else p.grad for name, p in model.named_parameters()}
        assert_same_gradients("gradients, DDP", found, gradients(stock, shipped_plan.without(batch))[1])
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_leaves_the_plan_out():
    stock, model = shallow("next"), llava_fast.accelerate(shallow("next"))
    batch = collator()(samples())
    found = torch.compile(model, backend="eager")(**batch)
    assert_close("compiled, with a plan", found.logits, stock(**shipped_plan.without(batch)).logits, 1e-5)


def test_trainers_column_removal_keeps_the_names():
    """What Trainer asks the model before it takes columns away (the rest of it needs `accelerate`)."""
    kept = []
    for model in (llava_fast.accelerate(fresh("next")), fresh("next")):
        trainer = Trainer.__new__(Trainer)
        trainer.model, trainer.label_names, trainer._signature_columns = model, [], None
        trainer._set_signature_columns_if_needed()
        kept.append(set(trainer._signature_columns))
    assert kept[0] >= {*NAMES, "input_ids", "pixel_values", "image_sizes", "labels"}
    assert not kept[1] & set(NAMES)


@pytest.mark.parametrize("output", ["float32", "uint8"])
@pytest.mark.parametrize("name", ["llava15", "next"])
def test_with_a_fast_processor(name, output, tmp_path):
    tiny.save(tiny.CASES[name], fresh(name), tmp_path)
    tiny.hf_processor(tiny.CASES[name]).save_pretrained(tmp_path)
    fast = FastProcessor.from_pretrained(tmp_path, output=output, threads=1)
    found, expected = Collator(fast, fresh(name), chat_template=TEMPLATE)(samples()), collator(name)(samples())
    if output == "uint8":
        pixels = found.pop("pixel_values_uint8")
        assert pixels.dtype == torch.uint8
        assert pixels.shape == expected.pop("pixel_values").shape
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_features_and_workers():
    made = collator()
    batch = made(samples())
    features = [{name: value.tolist() for name, value in made.features(s).items()} for s in samples()]
    again = pickle.loads(pickle.dumps(made))(features)
    assert all(torch.allclose(again[name], batch[name]) for name in batch)
    with_batch_axis = [{name: f[name] if "pix" in name or "siz" in name else [f[name]] for name in f} for f in features]
    assert torch.equal(made(with_batch_axis)["input_ids"], batch["input_ids"])
    loaded = next(iter(DataLoader(samples(), 3, collate_fn=made, num_workers=1)))
    assert list(loaded) == list(batch)
    assert all(torch.equal(loaded[name], batch[name]) for name in batch)


def test_workers_end_with_their_loader():
    made = collator()

    def collate(given):
        made(given)
        return [thread.name for thread in threading.enumerate()]

    assert "end_with_parent" in next(iter(DataLoader(samples(), 3, collate_fn=collate, num_workers=1)))
    assert "end_with_parent" not in collate(samples())


def test_without_a_plan():
    assert not set(NAMES) & set(collator(plan=False)(samples()))


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"messages": talk("hello")}, "labels need an assistant message"),
        ({"prompt": "hello"}, '"answer"'),
        ({"prompt": "hello", "answer": "<image>"}, "images belong to the prompt"),
        ({"prompt": "<image> hello", "answer": "x"}, "1 <image> placeholders, but 0 images"),
        ({"prompt": "hello", "answer": "x", "images": ["gone.png"]}, "0 <image> placeholders, but 1 images"),
        ({"prompt": "<image>", "answer": "x", "images": ["gone.png"]}, "no image or video file 'gone.png'"),
        ({"prompt": "<video>", "answer": "x", "video": "a.mp4"}, '"video" is not collated'),
        ({"input_ids": [1, 2]}, "no labels"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has the shape"),
        ({"input_ids": [1, 2], "labels": [1, 2], "pixels": 0}, "unknown features \\['pixels'\\]"),
        ({}, "remove_unused_columns=False"),
    ],
)
def test_what_cannot_be_collated_is_refused_by_name(sample, says):
    for name, given in (("1", sample), ("a17", {"id": "a17", **sample})):
        with pytest.raises((RequestError, ImageError), match=f"sample {name}: .*{says}"):
            collator()([samples()[1], given])


def test_a_template_that_hides_its_answers_is_refused():
    unstable = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    processor = tiny.hf_processor(tiny.CASES["next"])
    processor.chat_template = unstable
    made = Collator(processor, tiny.hf_config(tiny.CASES["next"]))
    with pytest.raises(RequestError, match=r"sample 0: .*not prefix-stable"):
        made([{"messages": talk("a", "b", "c", "d")}])


def test_a_template_that_writes_the_first_token_gets_no_second():
    processor = tiny.hf_processor(tiny.CASES["next"])
    turn = "{{ m['role'] }}: {% for item in m['content'] %}{{ item['text'] }}{% endfor %}\n"
    processor.chat_template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    processor.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    made = Collator(processor, tiny.hf_config(tiny.CASES["next"]))([{"messages": talk("a", "b")}])
    assert made["input_ids"][0].tolist().count(1) == 1
    labels = made["labels"][0]
    assert tiny.tokenizer().decode(labels[labels >= 0]).strip() == "b"


def test_settings_that_cannot_work_say_so():
    processor = tiny.hf_processor(tiny.CASES["next"])
    config = tiny.hf_config(tiny.CASES["next"])
    with pytest.raises(ValueError, match="padding_side"):
        Collator(processor, config, padding_side="middle")
    with pytest.raises(RequestError, match=r"sample 0: .*name a chat_template"):
        Collator(processor, config)([{"messages": talk("a", "b")}])
    words, processor.tokenizer = processor.tokenizer, None
    processor.tokenizer = type(words)(tokenizer_object=words.backend_tokenizer)
    with pytest.raises(ValueError, match="no padding token"):
        Collator(processor, config)


def test_more_tiles_than_pixels_hold_are_refused():
    batch = collator()(samples())
    config = tiny.hf_config(tiny.CASES["next"])
    with pytest.raises(ImageError, match="tiles, but pixel_values hold"):
        shipped_plan.make(config, batch["input_ids"], None, batch["pixel_values"][:, :1], batch["image_sizes"])


def test_offsets_before_expansion():
    text, token = "a<i><i>b<i>", "<i>"
    starts = np.array(
        [0, *range(1, 16, 3), 16, *range(17, 26, 3)]
    )  # two placeholders became five tokens, one became three
    offsets = np.stack([starts, np.append(starts[1:], 26)], 1)
    is_image = np.array([False, *[True] * 5, False, *[True] * 3])
    found = offsets_before_expansion(offsets, is_image, text, token)
    assert found[~is_image].tolist() == [[0, 1], [7, 8]]
    assert not found[is_image].any()
    with pytest.raises(RequestError, match="2 runs of image tokens from 1"):
        offsets_before_expansion(offsets, is_image, "a<i>", token)
