"""The processor: placeholder expansion and tiles as transformers makes them, labels from spans, clear errors."""

import dataclasses
import io
from itertools import chain

import numpy as np
import pytest
from PIL import Image
from transformers import image_transforms

from llava_fast.errors import ImageError, LlavaFastError, MissingFileError, RequestError
from llava_fast.inputs.chat.rendering import builtin_template, checkpoint_template
from llava_fast.inputs.encoding import ORIGINAL_IMAGE_TOKEN
from llava_fast.inputs.options import ProcessorOptions
from llava_fast.inputs.plan.columns import MODALITY_IMAGE, MODALITY_VIDEO, TEXT
from llava_fast.inputs.processor import Processor
from llava_fast.inputs.tiling.anyres import VisualGeometry
from tests.support import tiny
from tests.support.real_tokenizers import TOKENIZERS

PICTURES = [tiny.picture(60, 90), tiny.picture(200, 31), tiny.picture(5, 300)]


def expanded_ids(plan) -> list[int]:
    """The plan of one sequence as transformers writes it: a placeholder id per visual row."""
    ids = plan.column("row").copy()
    ids[plan.column("modality") == MODALITY_IMAGE] = tiny.IMAGE_ID
    ids[plan.column("modality") == MODALITY_VIDEO] = tiny.VIDEO_ID
    return ids.tolist()


# ---------------------------------------------------------------- token expansion

PROMPTS = [
    ("<image>", 1),
    ("<image>hello", 1),
    ("the hello <image>", 1),
    ("USER: <image>\nWhat is this? ASSISTANT:", 1),
    ("a<image><image>b", 2),
    ("  <image> one\n<image>\n two <image> ", 3),
    ("nothing to see", 0),
]


@pytest.mark.parametrize(("prompt", "count"), PROMPTS)
@pytest.mark.parametrize("name", ["llava15", "llava15_full", "next", "next_mistral_window", "onevision"])
def test_expansion_is_transformers(name, prompt, count):
    pair, images = tiny.pair(name), PICTURES[:count]
    plan = pair.ours.processor.prepare([{"prompt": prompt, "images": images}]).plan
    if name == "onevision":  # its processor cannot be called without torchvision
        expected = pair.reference_inputs(prompt, images)["input_ids"][0]
    else:
        pil = [Image.fromarray(image) for image in images] or None
        expected = pair.processor(images=pil, text=prompt, return_tensors="pt")["input_ids"][0]
    assert expanded_ids(plan) == expected.tolist()


@pytest.mark.parametrize("name", ["video", "onevision"])
def test_video_expansion_is_transformers(name):
    pair = tiny.pair(name)
    frames = np.stack([tiny.picture(50, 80, seed) for seed in range(3)])
    prompt = "see <video> and <image> there"
    plan = pair.ours.processor.prepare([{"prompt": prompt, "images": PICTURES[:1], "video": frames}]).plan
    assert expanded_ids(plan) == pair.reference_inputs(prompt, PICTURES[:1], frames)["input_ids"][0].tolist()


def test_a_chat_templates_own_bos_is_not_doubled():
    processor = tiny.pair("next").ours.processor
    own = dataclasses.replace(processor, template=checkpoint_template("{{ bos_token }}Hi", {"bos_token": "<s>"}))
    messages = [{"role": "user", "content": "x"}]
    ids = expanded_ids(own.prepare([{"messages": messages}]).plan)
    assert ids[0] == 1
    assert ids.count(1) == 1
    # A verbatim prompt is the caller's: what transformers' processor does with it happens here too.
    verbatim = expanded_ids(processor.prepare([{"prompt": "<s>Hi"}]).plan)
    assert verbatim == processor.tokenizer("<s>Hi")["input_ids"]


def test_original_checkpoints_tokenise_the_text_between_marks_in_chunks():
    """haotian-liu/LLaVA mm_utils.tokenizer_image_token: the first chunk's BOS stays, the other chunks' go."""
    words = tiny.tokenizer()
    processor = dataclasses.replace(tiny.pair("next").ours.processor, image_token_id=ORIGINAL_IMAGE_TOKEN)
    for prompt, count in PROMPTS:
        plan = processor.prepare([{"prompt": prompt, "images": PICTURES[:count]}]).plan
        chunks = [words(chunk)["input_ids"][1:] for chunk in prompt.split("<image>")]
        assert plan.column("row")[plan.column("source") == TEXT].tolist() == [1, *chain(*chunks)]


# ---------------------------------------------------------------- tiles

SIZES = [(336, 336), (1, 1), (2, 500), (500, 2), (1, 4000), (4000, 1), (60, 90), (333, 500), (500, 333), (720, 1280)]
SIZES += [tuple(int(side) for side in size) for size in np.random.default_rng(0).integers(1, 900, (14, 2))]


def reference_tiles(case: tiny.Case, images: list[np.ndarray]) -> list[np.ndarray]:
    """What transformers' own PIL processor cuts, before it rescales."""
    pil = [Image.fromarray(image) for image in images]
    pil = [pil] if case.kind == "llava_onevision" else pil
    made = tiny.image_processor(case)(pil, do_rescale=False, do_normalize=False)["pixel_values"]
    tiles = [np.asarray(one) for one in made]
    return [one[None] if one.ndim == 3 else one for one in tiles]


@pytest.mark.parametrize(
    ("name", "tile", "patch"),
    [("llava15", 48, 8), ("next", 336, 14), ("next", 56, 8), ("onevision", 96, 14)],
)
def test_tiles_are_transformers_to_the_bit(name, tile, patch):
    case = dataclasses.replace(tiny.CASES[name], tile=tile, patch=patch)
    if case.kind != "llava":
        case = dataclasses.replace(case, pinpoints=tiny._grid(tile, 2 if tile == 336 else 4))
    processor = tiny.pair(name).ours.processor
    geometry = dataclasses.replace(
        processor.geometry, tile_size=tile, patch_size=patch, pinpoints=() if case.kind == "llava" else case.pinpoints
    )
    processor = dataclasses.replace(processor, geometry=geometry)
    for height, width in SIZES:
        image = tiny.picture(height, width)
        ours, theirs = processor.tiles(image), reference_tiles(case, [image])[0]
        assert ours.dtype == np.uint8, (height, width)
        assert ours.shape == theirs.shape, (height, width)
        assert (ours == theirs).all(), (height, width)


def test_several_onevision_images_are_padded_squares_to_the_bit():
    processor = tiny.pair("onevision").ours.processor
    images = [tiny.picture(*size) for size in SIZES[:8]]
    tiles = processor.prepare([{"prompt": "<image>" * len(images), "images": images}]).tiles
    expected = reference_tiles(tiny.CASES["onevision"], images)
    assert [len(tile) for tile in expected] == [1] * len(images)
    assert (tiles == np.concatenate(expected)).all()


@pytest.mark.parametrize("name", ["video", "onevision"])
def test_frames_are_transformers_to_the_bit(name):
    frames = np.stack([tiny.picture(50, 83, seed) for seed in range(3)])
    tiles = tiny.pair(name).ours.processor.prepare([{"prompt": "<video>", "video": frames}]).tiles
    reference = tiny.frame_processor(tiny.CASES[name])
    expected = reference([Image.fromarray(f) for f in frames], do_rescale=False, do_normalize=False)["pixel_values"]
    assert (tiles == np.stack(expected)).all()


def test_an_image_is_the_same_however_it_is_given(tmp_path):
    processor, image = tiny.pair("next").ours.processor, tiny.picture(70, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    tiles = processor.tiles(image)
    for source in (Image.fromarray(image), tmp_path / "a.png", str(tmp_path / "a.png"), data):
        assert (processor.tiles(source) == tiles).all()
    assert len(tiles) > 1
    assert tiles.shape[1:] == (3, 56, 56)


def test_tiles_of_a_batch_come_in_request_order():
    processor = tiny.pair("next").ours.processor
    requests = [{"prompt": "<image>" * len(p), "images": p} for p in (PICTURES[:1], [], PICTURES[1:])]
    tiles = processor.prepare(requests).tiles
    assert (tiles == np.concatenate([processor.tiles(image) for image in PICTURES])).all()


# ---------------------------------------------------------------- labels

CONVERSATION = [
    {"role": "user", "content": "What is <image> the hello?"},
    {"role": "assistant", "content": "the hello café"},
    {"role": "user", "content": "And? No."},
    {"role": "assistant", "content": "No."},
]
ANSWERS = {
    "plain": "the hello café\n",
    "vicuna_v1": " the hello café</s> No.</s>",
    "llava_v1": " the hello café</s> No.</s>",
    "llama_2": " the hello café </s> No. </s>",
    "llava_llama_2": " the hello café </s> No. </s>",
    "mistral": " the hello café </s> No. </s>",
    "chatml_direct": "the hello café<|im_end|>No.<|im_end|>",
    "llava_llama_3": "the hello café<|eot_id|>No.<|eot_id|>",
    "slime_llama_3": "the hello café<|eot_id|>No.<|eot_id|>",
    "qwen": "the hello café<|im_end|>No.<|im_end|>",
}


def labelled(processor, messages, images=(PICTURES[0],)):
    return processor.prepare([{"messages": messages, "images": list(images)}], labels=True).plan


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("image_token", [tiny.IMAGE_ID, ORIGINAL_IMAGE_TOKEN])
@pytest.mark.parametrize("template", ANSWERS)
def test_labels_are_exactly_the_answers_and_their_ends(template, image_token, tokenizer):
    words = TOKENIZERS[tokenizer]()
    processor = dataclasses.replace(
        tiny.pair("next").ours.processor,
        template=builtin_template(template),
        image_token_id=image_token,
        tokenizer=words,
        vocabulary=None,
    )
    messages = CONVERSATION[:2] if template == "plain" else CONVERSATION
    plan = labelled(processor, messages)
    answers = words.decode(plan.column("supervised_target"))
    if template == "plain":  # the answer follows the placeholder at once, where SentencePiece puts a space of its own
        answers = answers.removeprefix(" ")
    assert answers == ANSWERS[template]
    # The shift: each supervised row is followed, in the sequence, by its target.
    assert (plan.column("label")[plan.column("supervised_row") + 1] == plan.column("supervised_target")).all()
    # Labels do not change what is tokenised.
    text = processor.template.render(messages, add_generation_prompt=False)
    if not (words.bos_token and text.startswith(words.bos_token)):
        same = processor.prepare([{"prompt": text, "images": PICTURES[:1]}]).plan
        assert (same.column("row") == plan.column("row")).all()


ITEMS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% for item in message.content %}"
    "{% if item.type == 'image' %}<image>{% else %}{{ item.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEXTS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [(ITEMS, "the hello café<|im_end|>No.<|im_end|>"), (PLAIN_TEXTS, " the hello café</s> No.</s>")],
)
def test_labels_of_a_checkpoints_own_template(source, expected):
    template = checkpoint_template(source, {"eos_token": "</s>"})
    processor = dataclasses.replace(tiny.pair("next").ours.processor, template=template)
    plan = labelled(processor, CONVERSATION)
    assert processor.tokenizer.decode(plan.column("supervised_target")) == expected


def test_without_labels_nothing_is_supervised():
    processor = tiny.pair("next").ours.processor
    plan = processor.prepare([{"messages": CONVERSATION[:1], "images": PICTURES[:1]}]).plan
    assert not plan.has_labels
    assert (plan.column("label") == -100).all()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "no"}, 'labels need "messages"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn from"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "nothing to learn"),
    ],
)
def test_a_sample_without_an_answer_is_refused(request_, message):
    good = {"messages": CONVERSATION[2:]}
    with pytest.raises(RequestError, match=f"^request 1: .*{message}"):
        tiny.pair("next").ours.processor.prepare([good, request_], labels=True)


# ---------------------------------------------------------------- errors


def png(cut: int | None = None, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(file, kind)
    return file.getvalue()[:cut]


ONE = [PICTURES[0]]
WRONG = {
    "more placeholders than images": (
        {"prompt": "<image> <image>", "images": ONE},
        RequestError,
        "2 <image> placeholders and 1",
    ),
    "more images than placeholders": (
        {"prompt": "<image>", "images": ONE * 2},
        RequestError,
        "1 <image> placeholders and 2",
    ),
    "no placeholders": ({"prompt": "x", "images": ONE}, RequestError, "0 <image> placeholders and 1"),
    "no images": ({"prompt": "<image>"}, RequestError, "1 <image> placeholders and 0"),
    "no video placeholder": ({"prompt": "x", "video": ONE}, RequestError, "0 <video> placeholders and 1"),
    "unknown key": ({"prompt": "x", "image": PICTURES[0]}, RequestError, r"unknown keys \['image'\]"),
    "both": ({"prompt": "x", "messages": []}, RequestError, "exactly one of"),
    "neither": ({"images": []}, RequestError, "exactly one of"),
    "images as str": ({"prompt": "<image>", "images": "a.png"}, RequestError, '"images" must be a list'),
    "images as bytes": ({"prompt": "<image>", "images": png()}, RequestError, '"images" must be a list'),
    "images as array": ({"prompt": "<image>", "images": PICTURES[0]}, RequestError, '"images" must be a list'),
    "images as PIL": ({"prompt": "<image>", "images": Image.new("RGB", (3, 3))}, RequestError, "must be a list"),
    "images as dict": ({"prompt": "<image>", "images": {"a": 1}}, RequestError, '"images" must be a list'),
    "image of a wrong type": ({"prompt": "<image>", "images": [3]}, RequestError, "not int"),
    "image None": ({"prompt": "<image>", "images": [None]}, RequestError, "not NoneType"),
    "float image": ({"prompt": "<image>", "images": [np.zeros((9, 9, 3))]}, ImageError, "uint8"),
    "no pixels": ({"prompt": "<image>", "images": [np.zeros((0, 9, 3), np.uint8)]}, ImageError, "no pixels"),
    "truncated png": ({"prompt": "<image>", "images": [png(400)]}, ImageError, "truncated"),
    "truncated jpeg": ({"prompt": "<image>", "images": [png(400, "JPEG")]}, ImageError, "cannot be|truncated"),
    "no image at all": ({"prompt": "<image>", "images": [b"hello"]}, ImageError, "not an image"),
    "empty file": ({"prompt": "<image>", "images": [b""]}, ImageError, "empty"),
    "missing file": ({"prompt": "<image>", "images": ["/no/such.png"]}, MissingFileError, "no image or video file"),
    "web address": ({"prompt": "<image>", "images": ["https://a/b.png"]}, ImageError, "not fetched"),
    "web address in a message": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]},
            ]
        },
        RequestError,
        "not fetched",
    ),
    "prompt of a wrong type": ({"prompt": b"x"}, RequestError, "must be a string"),
    "half a surrogate": ({"prompt": "ab\ud800"}, RequestError, "surrogate pair at character 2"),
    "too long": ({"prompt": "x" * 5000}, RequestError, "takes 5001 tokens .* holds 4096"),
    "video of a wrong type": ({"prompt": "<video>", "video": 3}, RequestError, "not int"),
    "no frames": ({"prompt": "<video>", "video": []}, ImageError, "no frames"),
    "frames of two sizes": ({"prompt": "<video>", "video": PICTURES[:2]}, ImageError, "one size"),
    "no messages": ({"messages": []}, RequestError, "non-empty list"),
    "unknown role": ({"messages": [{"role": "bob", "content": "x"}]}, RequestError, "'bob'"),
    "message placeholders": (
        {"messages": [{"role": "user", "content": "<image>"}]},
        RequestError,
        "1 image placeholders",
    ),
    "message images": (
        {"messages": [{"role": "user", "content": "x"}], "images": ONE},
        RequestError,
        "0 image placeholders",
    ),
    "seed text": ({"prompt": "x", "seed": "1"}, RequestError, '"seed" must be a whole number'),
    "seed fraction": ({"prompt": "x", "seed": 1.5}, RequestError, '"seed" must be a whole number'),
    "seed too large": ({"prompt": "x", "seed": 2**63}, RequestError, '"seed" must be a whole number'),
    "no dict": ("hello", RequestError, "a request is a dict"),
    "None": (None, RequestError, "a request is a dict"),
}


@pytest.mark.parametrize("what", WRONG)
def test_every_wrong_request_is_named(what):
    wrong, kind, message = WRONG[what]
    processor = tiny.pair("next").ours.processor
    with pytest.raises(kind, match=f"(?s)^request 1: .*{message}") as caught:
        processor.prepare([{"prompt": "fine"}, wrong])
    assert isinstance(caught.value, LlavaFastError)
    assert "\n" not in str(caught.value)
    if isinstance(wrong, dict):
        with pytest.raises(kind, match=r"^request mine: "):
            processor.prepare([{**wrong, "id": "mine"}])


def test_a_prompt_without_a_single_token_is_refused():
    processor = tiny.pair("onevision").ours.processor  # its tokenizer adds no BOS
    with pytest.raises(RequestError, match=r"^request 0: the prompt is empty"):
        processor.prepare([{"prompt": ""}])
    assert processor.prepare([{"prompt": "<image>", "images": ONE}]).plan.rows > 0


def test_a_prompt_of_exactly_the_context_is_taken():
    processor = dataclasses.replace(tiny.pair("next").ours.processor, max_rows=10)
    assert processor.prepare([{"prompt": "x" * 9}]).plan.rows == 10
    with pytest.raises(RequestError, match="takes 11 tokens"):
        processor.prepare([{"prompt": "x" * 10}])


def test_extreme_shapes_work():
    processor = tiny.pair("next").ours.processor
    for height, width in ((1, 4000), (4000, 1)):
        request = {"prompt": "<image>", "images": [tiny.picture(height, width)]}
        plan = processor.prepare([request]).plan
        assert (plan.column("modality") == MODALITY_IMAGE).sum() >= 49


def test_a_processor_needs_no_model():
    """Tiles and geometry alone, at the real sizes."""
    geometry = VisualGeometry(384, 14, "pad", pad_color=(122, 116, 104))
    processor = Processor(geometry, tokenizer=None, image_token_id=0, template=None)
    assert processor.tiles(PICTURES[0]).shape == (1, 3, 384, 384)


def test_a_video_mark_is_text_where_no_video_is_given():
    processor = tiny.pair("next").ours.processor
    assert processor.video_token_id is None
    plan = processor.prepare([{"prompt": "How do I use the <video> tag?"}]).plan
    assert plan.tiles == 0
    assert plan.lengths[0] > 5


def test_the_time_instruction_is_llava_nexts(tmp_path):
    """Word for word: with its missing space, and with the newline after a placeholder left in front of the question."""
    for number in range(5):
        Image.fromarray(tiny.picture(6, 8)).save(tmp_path / f"{number}.png")
    ours = tiny.pair("video").ours.processor
    processor = dataclasses.replace(ours, template=builtin_template("qwen"), video_frames=3, time_instruction=True)
    said = (
        "<video>\nThe video lasts for 2.50 seconds, and 3 frames are uniformly sampled from it. These frames are "
        "located at 0.00s,1.00s,2.00s.Please answer the following questions related to this video.\n\nWhat?"
    )
    items = [{"type": "video"}, {"type": "text", "text": "What?"}]
    for content in ("<video>\nWhat?", items):
        answer = {"role": "assistant", "content": "A cat."}
        messages = [{"role": "user", "content": content}, answer, {"role": "user", "content": "Why?"}, answer]
        request = {"messages": messages, "video": str(tmp_path)}
        for labels in (False, True):
            text = "".join(segment.text for segment in processor.render(request, labels)[0])
            assert said in text
            assert text.count("The video lasts") == 1
        without = dataclasses.replace(processor, time_instruction=False).render(request)[0][0].text
        assert without == processor.render(request)[0][0].text.replace(said, "<video>\nWhat?")
    picture = {"messages": [{"role": "user", "content": "<image>\nWhat?"}], "images": [tiny.picture(6, 8)]}
    assert "The video lasts" not in processor.render(picture)[0][0].text
    with pytest.raises(ImageError, match="request 0: frames given as images have no times"):
        processor.prepare([request | {"video": np.zeros((3, 4, 4, 3), np.uint8)}])


def test_transparency_is_laid_on_white_or_dropped_as_transformers_does(tmp_path):
    pair = tiny.pair("next")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA")
    picture.save(tmp_path / "a.png")
    theirs = pair.processor.image_processor
    given = theirs(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    opened = theirs(Image.open(tmp_path / "a.png").convert("RGB"), do_rescale=False, do_normalize=False)
    if "white" in (image_transforms.convert_to_rgb.__doc__ or ""):  # since transformers 5.21; before, it is dropped
        assert np.array_equal(pair.ours.processor.tiles(picture), given)
    assert np.array_equal(pair.ours.processor.tiles(tmp_path / "a.png"), np.asarray(opened["pixel_values"][0]))


@pytest.mark.parametrize("request_of", [lambda text: {"prompt": text}, lambda text: {"prompt": "<image>" + text}])
def test_a_token_that_the_model_has_no_embedding_of_is_refused(request_of):
    processor = tiny.pair("next").ours.processor
    assert processor.vocabulary == tiny.pair("next").ours.config.decoder.vocab_size
    grown = dataclasses.replace(processor, vocabulary=processor.tokenizer.convert_tokens_to_ids("hello"))
    request = request_of("hello") | {"images": [tiny.picture(20, 20)] * ("<image>" in request_of("hello")["prompt"])}
    processor.prepare([request])
    with pytest.raises(RequestError, match=f"^request 0: the token '.*hello' has the id {grown.vocabulary}, and"):
        grown.prepare([request])


# ---------------------------------------------------------------- options


def test_options_are_the_processors_fields_and_a_checkpoint_keeps_its_exif():
    processor = tiny.pair("next").ours.processor
    options = ProcessorOptions(video_frames=3, threads=2, tiles_on="device", pillow="12")
    changed = processor.with_options(options)
    assert (changed.video_frames, changed.threads, changed.tiles_on, changed.pillow) == (3, 2, "device", "12")
    assert changed.geometry is processor.geometry
    assert changed.exif is processor.exif is True
    upright = dataclasses.replace(processor, exif=False)
    assert upright.with_options(options).exif is False
    assert upright.with_options(ProcessorOptions(exif=True)).exif is True


@pytest.mark.parametrize(
    "option",
    [
        {"resample": "bicubic"},
        {"pillow": 13},
        {"tiles_on": "gpu"},
        {"video_frames": 0},
        {"video_frames": 2.5},
        {"threads": -1},
    ],
)
def test_an_option_out_of_range_is_named(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} must be"):
        ProcessorOptions(**option)
