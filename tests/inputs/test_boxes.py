"""Boxes in prompts and answers, as Qwen-VL writes them."""

import time

import pytest

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.boxes import Region, read_boxes, write_boxes


def test_an_answers_boxes_in_order():
    answer = "There is<ref> a dog</ref><box>(112,0),(560,999)</box> <box>(0,0),(999,333)</box> beside "
    answer += "<box>( 5, 6),(4,3)</box>."
    assert read_boxes(answer) == [
        Region("a dog", ((112 / 999, 0.0, 560 / 999, 1.0), (0.0, 0.0, 1.0, 333 / 999))),
        Region("", ((4 / 999, 3 / 999, 5 / 999, 6 / 999),)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(1,2),(3,4)",
        "<box>(1,2),(3)</box>",
        "<box>(1,2),(3,1000)</box>",
        "<box>(1,2),(3,4)",
        "<box>(-1,2),(3,4)</box>",
    ],
)
def test_what_is_no_box_is_left_out(text):
    assert read_boxes(text) == []
    assert read_boxes(f"{text}<ref>it</ref><box>(1,2),(3,4)</box>")[-1].label == "it"


def test_what_is_written_is_read_again():
    boxes = ((0.0, 0.0, 1.0, 1.0), (0.1234, 0.5, 0.5678, 0.9999))
    assert write_boxes("it", boxes[:1]) == "<ref>it</ref><box>(0,0),(999,999)</box>"
    assert write_boxes("", boxes[:1]) == "<box>(0,0),(999,999)</box>"
    (found,) = read_boxes(write_boxes("the dog", boxes))
    assert found.label == "the dog"
    for box, again in zip(boxes, found.boxes, strict=True):
        assert again == pytest.approx(box, abs=0.501 / 999)
    with pytest.raises(RequestError, match="as fractions of the image"):
        write_boxes("it", [(0.5, 0.0, 0.1, 1.0)])
    with pytest.raises(RequestError, match="as fractions of the image"):
        write_boxes("it", [(1, 2, 30, 40)])


def test_a_label_is_that_of_its_own_box():
    boxes = "<box>(1,2),(3,4)</box>"
    assert [each.label for each in read_boxes(f"<ref>a man</ref> beside <ref>a dog</ref>{boxes}")] == ["a dog"]
    assert [each.label for each in read_boxes(f"<ref>a{boxes} <ref>b</ref> {boxes}")] == ["", "b"]
    assert [each.label for each in read_boxes(f"<ref>x < y</ref>{boxes}")] == ["x < y"]
    for tag in ("<ref>", "</ref>", "<box>"):
        with pytest.raises(RequestError, match="leave the tag out"):
            write_boxes(f"a{tag}", [])


@pytest.mark.parametrize("text", ["<ref></ref>", "<ref>", "<box>", " "])
def test_long_texts_take_time_in_proportion(text):
    begin = time.process_time()
    assert read_boxes(text * 200_000) == []
    assert time.process_time() - begin < 5
