"""The plan of a conversation's images is that of its prompt, for every way of reading them."""

import http.client
import json
from dataclasses import replace

import numpy as np
import pytest

from llava_fast.generation.prompt import prompt_of
from llava_fast.inputs.pictures.video import take_frames
from llava_fast.serve.plan import prompt_plan
from tests.serve.conftest import about, ask, data_uri, local, png
from tests.serve.test_safety import blank
from tests.support import made_videos, tiny


def planned(server, messages, model="tiny"):
    """(status, what is answered)."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    body = json.dumps({"model": model, "messages": messages})
    connection.request("POST", "/v1/llava_fast/plan", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_it_counts_what_an_answer_counts(server, client):
    messages = about("what is it?", data_uri(png()), data_uri(png(200, 50, 1)))
    _, plan = planned(server, messages)
    usage = ask(client, messages).usage
    details = usage.prompt_tokens_details
    assert plan["prompt_tokens"] == usage.prompt_tokens
    assert plan["prompt_tokens"] - plan["text_tokens"] == details.visual_tokens
    assert [(item["tokens"], item["tiles"]) for item in plan["items"]] == [
        (image["tokens"], image["tiles"]) for image in details.images
    ]
    assert [(item["width"], item["height"]) for item in plan["items"]] == [(90, 60), (50, 200)]
    for item in plan["items"]:
        regions = [region for view in item["views"] for region in view["regions"]]
        assert len(regions) == item["tiles"]
        assert sum(region["tokens"] for region in regions) == item["tokens"] - item["newline_tokens"]
        assert all(len(region["points"]) == 2 * region["tokens"] for region in regions)


@pytest.mark.parametrize(
    "name", ["llava15", "llava15_full", "next", "onevision", "internvl", "idefics3", "video", "video_llava"]
)
def test_every_kind_of_model(name):
    model = tiny.pair(name).ours
    processor = replace(model.processor, video_frames=3)
    images = [png(), png(300, 40, 1)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is it?"}]
    for number in (1, 2):  # OneVision reads several otherwise than one
        request = {"messages": [{"role": "user", "content": content[2 - number :]}], "images": images[:number]}
        plan, prompt = prompt_plan(processor, request, name, 100), prompt_of(processor, request)
        assert plan.prompt_tokens == prompt.rows
        assert [(item.tokens, item.tiles) for item in plan.items] == [
            (len(part), part.number_of_tiles) for part in prompt.parts if part.is_visual
        ]


def test_a_video_has_its_frames_and_their_times(tmp_path):
    data = made_videos.write(tmp_path / "a.mp4", [tiny.picture(48, 64, seed) for seed in range(7)]).read_bytes()
    processor = tiny.pair("video").ours.processor
    content = [{"type": "video"}, {"type": "text", "text": "what happens?"}]
    request = {"messages": [{"role": "user", "content": content}], "video": take_frames(data, 4)}
    (item,) = prompt_plan(processor, request, "video", 100).items
    assert [view.frame for view in item.views] == [0, 2, 4, 6]
    assert [view.seconds for view in item.views] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert item.pooled_tokens > 0
    assert item.tokens == prompt_of(processor, request).visual_rows


def test_a_prompt_that_is_too_long_has_a_plan(model):
    with local(model, max_prompt_tokens=5) as server:
        _, plan = planned(server, about("hello there", data_uri(png())))
        assert plan["prompt_tokens"] > plan["max_prompt_tokens"] == 5


def test_what_it_refuses(server):
    for status, messages, model in (
        (404, about("hello"), "other"),
        (400, about("hello", data_uri(b"no picture")), "tiny"),
        (400, about("hello", *[data_uri(png())] * 4), "tiny"),
        (400, about("hello", data_uri(blank(500, 500))), "tiny"),
        (400, [], "tiny"),
        (403, about("hello", "/etc/passwd"), "tiny"),
    ):
        found, answer = planned(server, messages, model)
        assert found == status, answer
        assert answer["error"]["message"]


def test_where_an_images_rows_came_from(model):
    """The tower; the feature cache, after another text; the prefix cache, after the same."""
    picture = {"type": "image_url", "image_url": {"url": data_uri(png(seed=7))}}
    with local(model) as server:
        sources = []
        for texts in (("one", ""), ("other", ""), ("one", "more")):
            content = [{"type": "text", "text": texts[0]}, picture, {"type": "text", "text": texts[1]}]
            answer = ask(server.client(), [{"role": "user", "content": content}])
            sources += [image["source"] for image in answer.usage.prompt_tokens_details.images]
    assert sources == ["encoded", "feature_cache", "prefix_cache"]


def test_points_are_in_order():
    """Reading order, line by line: as the tokens are in the prompt."""
    processor = tiny.pair("llava15").ours.processor
    content = [{"type": "image"}, {"type": "text", "text": "hello"}]
    request = {"messages": [{"role": "user", "content": content}], "images": [png()]}
    (item,) = prompt_plan(processor, request, "m", 9).items
    (region,) = item.views[0].regions
    points = np.reshape(region.points, (-1, 2))
    assert (np.lexsort((points[:, 0], points[:, 1])) == np.arange(len(points))).all()
