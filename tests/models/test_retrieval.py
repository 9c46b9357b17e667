"""BLIP-2's stage 1: scores equal transformers', losses those of a dense formulation, and negatives that are others'."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Blip2Config, Blip2ForImageTextRetrieval, BlipImageProcessor

import llava_fast
from llava_fast.errors import CheckpointError, RequestError
from llava_fast.families import family_of_config, read_config
from llava_fast.models import retrieval
from llava_fast.models.batch import Batch
from llava_fast.train.data.captions import CaptionProcessor
from tests.support import stage_one, tiny
from tests.support.parity import relative

TEXTS = ["a red cup", "hello", "two green cups near a table"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stage_one")


@pytest.fixture(scope="module")
def pair(folder):
    """(transformers' model, ours)."""
    reference = stage_one.save_reference(folder)
    return reference, llava_fast.load_retrieval(folder)


def stock_inputs(pictures, texts) -> dict:
    size = {"height": stage_one.TILE, "width": stage_one.TILE}
    images = BlipImageProcessor(size=size)([Image.fromarray(each) for each in pictures], return_tensors="pt")
    return {**images, **stage_one.words()(texts, return_tensors="pt", padding=True)}


@torch.no_grad()
def test_scores_are_those_of_transformers(pair):
    stock, ours = pair
    expected = stock(**stock_inputs(stage_one.PICTURES, TEXTS))
    found = ours.contrastive(stage_one.PICTURES, TEXTS)
    assert found.shape == (3, 3)
    assert relative(found, expected.logits_per_image) < 1e-5
    found = ours.matching(stage_one.PICTURES, TEXTS[:2])
    assert found.shape == (3, 2)
    for number, picture in enumerate(stage_one.PICTURES):
        inputs = stock_inputs([picture, picture], TEXTS[:2])
        expected = stock(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(1)[:, 1]
        assert relative(found[number], expected) < 1e-5
    assert found.std() > 1e-3


def test_a_sparse_config_of_published_size_has_transformers_tensors(tmp_path):
    source = {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "image_text_hidden_size": 256,
        "image_token_index": None,
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "qformer_config": {"model_type": "blip_2_qformer", "use_qformer_text_input": True, "vocab_size": 30523},
        "text_config": {"model_type": "opt"},
        "vision_config": {"dropout": 0.0, "model_type": "blip_2_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(source))
    config, _ = read_config(tmp_path)
    with torch.device("meta"):
        model = retrieval.RetrievalModel(config)
        expected = Blip2ForImageTextRetrieval(Blip2Config.from_pretrained(tmp_path)).state_dict()
    names = family_of_config(config).names
    found = {names.to_stored(name, "hf", config): value.shape for name, value in model.named_parameters()}
    own = {name for name in found if name.startswith("cls.") or name == "temp"}
    assert {name: shape for name, shape in found.items() if name not in own} == {
        name: value.shape for name, value in expected.items()
    }
    assert len(own) == 6
    assert (config.projected_per_tile, config.vision.rows_per_tile, model.projector.config.vocabulary) == (
        32,
        257,
        30523,
    )


def test_matching_in_parts(pair, monkeypatch):
    whole = pair[1].matching(stage_one.PICTURES, TEXTS)
    monkeypatch.setattr(retrieval, "_PAIRS", 2)
    torch.testing.assert_close(pair[1].matching(stage_one.PICTURES, TEXTS), whole)


def test_what_cannot_be_compared(pair, folder):
    for images, texts, problem in (
        ([], TEXTS, "images are a list of"),
        ("cat.jpg", TEXTS, "images are a list of"),
        (stage_one.PICTURES[0], TEXTS, "images are a list of"),
        (stage_one.PICTURES, "a cup", "texts are a list of"),
        (stage_one.PICTURES, [], "texts are a list of"),
        (stage_one.PICTURES, ["a cup", None], "texts are a list of"),
        (stage_one.PICTURES, ["a" * 63], "reads at most 64"),
    ):
        with pytest.raises(RequestError, match=problem):
            pair[1].contrastive(images, texts)
    with pytest.raises(CheckpointError, match="load_retrieval"):
        llava_fast.load(folder)
    with pytest.raises(ValueError, match="no decoder"):
        pair[1](None, logits="all")


def test_saved_and_read_by_both(pair, tmp_path):
    stock, ours = pair
    llava_fast.save(ours, tmp_path / "again")
    again, theirs = (
        llava_fast.load_retrieval(tmp_path / "again"),
        Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "again"),
    )
    own = dict(again.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in ours.named_parameters())
    assert "projector.temperature" in own
    other = theirs.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in stock.state_dict().items())


def test_a_config_without_a_source_is_written_whole(pair, tmp_path):
    ours = pair[1]
    held = ours.config
    ours.config = dataclasses.replace(held, source={})
    try:
        llava_fast.save(ours, tmp_path / "again")
    finally:
        ours.config = held
    again = llava_fast.load_retrieval(tmp_path / "again")
    assert again.config == held
    Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(
            again.contrastive(stage_one.PICTURES, TEXTS), ours.contrastive(stage_one.PICTURES, TEXTS)
        )


# ---------------------------------------------------------------- the losses


def batch_of(model, pairs) -> Batch:
    processor = CaptionProcessor.of(model.processor, 32)
    requests = []
    for picture, text in pairs:
        user = {"role": "user", "content": [{"type": "image", "image": picture}]}
        requests.append({"messages": [user, {"role": "assistant", "content": text}]})
    return Batch.from_prepared(processor.prepare(requests, labels=True), "cpu")


PAIRS = [(tiny.picture(40, 50, seed), text) for seed, text in enumerate(stage_one.CAPTIONS[:4])]


def dense_layer(layer, x, mask, features, queries):
    """A layer over queries and text with an explicit mask [B, R, R], with the modules' weights alone."""

    def attention(module, given, kept, allowed):
        inner = module.attention
        heads = inner.heads
        q, k, v = (
            each(rows).unflatten(-1, (heads, -1)).transpose(1, 2)
            for each, rows in ((inner.query, given), (inner.key, kept), (inner.value, kept))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        made = module.output.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return module.output.LayerNorm(made + given)

    def feed(first, second, given):
        return second.LayerNorm(second.dense(F.gelu(first.dense(given))) + given)

    x = attention(layer.attention, x, x, mask)
    of_queries, of_text = x[:, :queries], x[:, queries:]
    if layer.crossattention is not None and queries:
        of_queries = attention(layer.crossattention, of_queries, features, None)
    made = [
        feed(layer.intermediate_query["dense"] and _dense(layer.intermediate_query), layer.output_query, of_queries)
    ]
    return torch.cat([*made, feed(_dense(layer.intermediate), layer.output, of_text)], 1)


class _dense:
    def __init__(self, holder):
        self.dense = holder["dense"]


def dense_rows(qformer, features, ids, how, queries):
    """Rows of all layers: how = "apart" (queries and text do not meet), "together", or "caption"."""
    count, length = ids.shape
    text = qformer.embeddings.word_embeddings(ids.clamp(min=0)) + qformer.embeddings.position_embeddings.weight[:length]
    x = torch.cat([qformer.query_tokens[:, :queries].expand(count, -1, -1), text], 1)
    x = qformer.embeddings.layernorm(x)
    real = F.pad(ids >= 0, (queries, 0), value=True)
    is_text = torch.arange(queries + length) >= queries
    mask = real[:, None, :].expand(-1, queries + length, -1).clone()
    if how == "apart":
        mask &= is_text[:, None] == is_text[None]
    if how == "caption":
        mask &= ~is_text[None] | (is_text[:, None] & torch.ones(len(is_text), len(is_text), dtype=torch.bool).tril())
    for layer in qformer.encoder["layer"]:
        x = dense_layer(layer, x, mask, features, queries)
    return x[:, :queries], x[:, queries:]


def by_hand(model, batch, drawn):
    """(contrast, match, caption): means, with the formulas of the paper and LAVIS' code."""
    qformer, queries = model.projector, stage_one.QUERIES
    features, ids = model.tower_rows(batch.tiles), batch.column("instruction").long()
    rows, text = dense_rows(qformer, features, ids, "apart", queries)
    images = F.normalize(qformer.vision_projection(rows), dim=-1)
    texts = F.normalize(qformer.text_projection(text[:, 0]), dim=-1)
    scores = torch.stack([torch.stack([(image @ each).max() for each in texts]) for image in images])
    scores = scores / qformer.temperature
    count = len(ids)
    smooth = torch.full((count, count), 0.1 / count) + 0.9 * torch.eye(count)
    contrast = -((smooth * scores.log_softmax(1)).sum(1).mean() + (smooth * scores.T.log_softmax(1)).sum(1).mean()) / 2
    images_of, texts_of = drawn
    logits = []
    for image, caption in [*zip(range(count), range(count), strict=True), *zip(images_of, range(count), strict=True)]:
        logits.append(dense_rows(qformer, features[[image]], ids[[caption]], "together", queries)[0])
    for image, caption in zip(range(count), texts_of, strict=True):
        logits.append(dense_rows(qformer, features[[image]], ids[[caption]], "together", queries)[0])
    of_pairs = torch.cat([qformer.itm_head(each).mean(1) for each in logits]).log_softmax(1)
    match = -(of_pairs[:count, 1].sum() + of_pairs[count:, 0].sum()) / (3 * count)
    caption_ids = ids.clone()
    caption_ids[:, 0] = model.first_word
    _, text = dense_rows(qformer, features, caption_ids, "caption", queries)
    head = qformer.cls["predictions"]
    made = head.transform["LayerNorm"](F.gelu(head.transform["dense"](text[:, :-1])))
    words = (made @ qformer.embeddings.word_embeddings.weight.T + head.bias).log_softmax(-1)
    target = caption_ids[:, 1:]
    real = target >= 0
    own = words.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    caption = -(0.9 * own + 0.1 * words.mean(-1))[real].mean()
    return contrast, match, caption


def test_losses_and_gradients_by_hand(pair, monkeypatch):
    model, batch = pair[1], batch_of(pair[1], PAIRS)
    drawn = []
    real = retrieval._negatives
    monkeypatch.setattr(retrieval, "_negatives", lambda *given: drawn.append(real(*given)) or drawn[-1])
    parameters = [value.requires_grad_(name.startswith("projector.")) for name, value in model.named_parameters()]
    trained = [value for value in parameters if value.requires_grad]
    out = model(batch, seed=5)
    found = torch.autograd.grad(out.losses.mean(), trained)
    expected = by_hand(model, batch, [each.tolist() for each in drawn[0]])
    for loss, value in zip((out.contrast, out.match, out.caption), expected, strict=True):
        assert loss.shape == (4,)
        assert relative(loss.mean(), value) < 1e-5
    torch.testing.assert_close(out.losses, out.contrast + out.match + out.caption)
    largest = max(each.abs().max() for each in found)
    for one, other in zip(found, torch.autograd.grad(sum(expected), trained), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-6 * largest


def test_negatives_are_hard_and_of_others():
    scores = torch.tensor([[9.0, 1.0, 0.0, -30.0]]).expand(2000, 4).clone()
    to_texts = scores.roll(1, 0)
    images, texts = retrieval._negatives(to_texts[:4], scores[:4], 0, 0)
    assert all(int(place) != number for number, place in enumerate(images.tolist()))
    assert all(int(place) != number for number, place in enumerate(texts.tolist()))
    drawn = [retrieval._negatives(scores[:4], scores[:4], 0, seed)[0].tolist() for seed in range(400)]
    first = torch.tensor([each[0] for each in drawn])
    share = torch.bincount(first, minlength=4) / len(drawn)
    expected = torch.tensor([-torch.inf, 1.0, 0.0, -30.0]).softmax(0)
    assert share[0] == 0
    assert (share - expected).abs().max() < 0.08
    assert retrieval._negatives(scores[:1, :1], scores[:1, :1], 0, 0) is None
    part = retrieval._negatives(scores[:2], scores[:2], 2, 7)
    whole = retrieval._negatives(scores[:4], scores[:4], 0, 7)
    assert part[0].tolist() == whole[0].tolist()[2:]  # the draw belongs to the pair


def test_one_pair_alone_and_none(pair):
    model = pair[1]
    with torch.no_grad():
        out = model(batch_of(model, PAIRS[:1]))
        assert out.contrast.item() == 0
        assert out.losses.isfinite().all()
        assert model(batch_of(model, [])).losses.shape == (0,)
