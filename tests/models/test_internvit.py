"""InternViT and pixel shuffle against transformers' InternVL, part by part and as a whole model."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen3Config
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows
from llava_fast.inputs.tiling.grid import GridTiling
from llava_fast.models.batch import Batch
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors import CONNECTORS
from llava_fast.models.connectors.pixel_shuffle import PixelShuffleConfig, shuffled
from llava_fast.models.decoders.qwen3 import Qwen3Config as Decoder
from llava_fast.models.fused import merge_linears
from llava_fast.models.towers import TOWERS
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops import use_backend
from llava_fast.train.estimate.flops import forward_flops
from tests.support.parity import assert_close

TILE, PATCH = 32, 8
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SIDES = {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}
KINDS = {
    "300M": {"attention_bias": True},
    "6B": {"norm_type": "rms_norm", "use_qk_norm": True},
    "final norm": {"use_mean_pooling": False, "hidden_act": "gelu_pytorch_tanh"},
}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3).add_(float(parameter.dim() == 1))
    return model.eval()


def hf_tower(kind: str):
    torch.manual_seed(0)
    return randomised(InternVLVisionModel(InternVLVisionConfig(**SMALL, **SIDES, **KINDS[kind])))


def tower_of(hf, layers=(-1,)):
    config = TOWERS["internvl_vision"].from_hf(hf.config, feature_layers=layers)
    tower = config.build()
    tower.load_state_dict(hf.state_dict())  # strict: transformers' names are this tower's
    return tower


def pixels(tower, tiles: int = 2):
    """uint8 tiles, and the same normalised."""
    made = torch.randint(0, 256, (tiles, 3, TILE, TILE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in tower.config.normalisation)
    return made, (made / 255 - mean) / std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
def test_features_and_gradients_are_transformers(kind, layer):
    hf = hf_tower(kind)
    tower = tower_of(hf, (layer,))
    tiles, normalised = pixels(tower)
    expected = hf(pixel_values=normalised, output_hidden_states=True)
    expected = expected.last_hidden_state if layer == -1 else expected.hidden_states[layer]
    for given in (tiles, normalised):
        assert_close("InternViT", tower(given), expected)
    weight = torch.randn(expected.shape)
    (expected * weight).sum().backward()
    (tower(tiles) * weight).sum().backward()
    reference = {name: parameter.grad for name, parameter in hf.named_parameters()}
    largest = max(grad.abs().max() for grad in reference.values() if grad is not None)
    for name, parameter in tower.named_parameters():
        if reference[name] is None or parameter.grad is None:
            assert reference[name] is parameter.grad, name
        elif reference[name].abs().max() < 1e-6 * largest:
            assert parameter.grad.abs().max() < 1e-6 * largest, name
            assert name.endswith("k_proj.bias"), name
        else:
            assert_close("InternViT gradients", parameter.grad, reference[name])
    unused = {id(parameter) for module in tower.unused() for parameter in module.parameters()}
    assert unused == {id(parameter) for parameter in tower.parameters() if parameter.grad is None}


@torch.no_grad()
def test_several_layers_recomputed_or_with_merged_linears_give_the_same():
    tower = tower_of(hf_tower("6B"), (1, -1))
    tiles, _ = pixels(tower)
    expected = tower(tiles)
    assert expected.shape == (2, 17, 64)
    assert torch.equal(expected, torch.cat([tower_of(hf_tower("6B"), (layer,))(tiles) for layer in (1, -1)], -1))
    merged = merge_linears(copy.deepcopy(tower))
    assert_close("InternViT, merged", merged(tiles), expected)
    tower.recompute = "layers"
    assert torch.equal(tower(tiles), expected)


@pytest.mark.slow
@torch.no_grad()
def test_kernels_give_what_steps_give():
    tower = tower_of(hf_tower("300M"))
    tiles, _ = pixels(tower, 1)
    expected = tower(tiles)
    with use_backend("triton"):
        assert_close("InternViT with kernels", tower(tiles), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_its_config_is_written_as_it_was_read(kind):
    config = TOWERS["internvl_vision"].from_hf(hf_tower(kind).config, feature_layers=(-1,))
    again = TOWERS["internvl_vision"].from_hf(InternVLVisionConfig(**config.to_hf()), feature_layers=(-1,))
    assert again == config
    assert config.rows_per_tile == 17


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": [32, 64]}, r"image_size is \[32, 64\]; only squares"),
        ({"use_mask_token": True}, "use_mask_token is True"),
        ({"use_absolute_position_embeddings": False}, "use_absolute_position_embeddings is False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_what_it_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        TOWERS["internvl_vision"].from_hf(InternVLVisionConfig(**(SMALL | SIDES | change)))


def test_blocks_are_in_row_major_order():
    rows = torch.arange(16.0)[None, :, None]  # a square of 4 x 4 rows
    assert shuffled(rows, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    config = PixelShuffleConfig(8, 16)
    assert config.rows_of(16) == 4
    assert not config.rowwise
    assert CONNECTORS.name_of(type(config)) == "pixel_shuffle"
    with pytest.raises(ValueError, match="17 rows per tile are not a square"):
        config.rows_of(17)
    assert config.build()(torch.zeros(0, 16, 8)).shape == (0, 4, 16)


# ---------------------------------------------------------------- tower, connector and decoder as one model


@pytest.fixture(scope="module")
def pair():
    """The same InternVL in transformers and here, of one tile an image."""
    text = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    hf_config = InternVLConfig(
        vision_config=InternVLVisionConfig(**SMALL, **SIDES),
        text_config=Qwen3Config(**text, **heads),
        image_token_id=59,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    hf = randomised(InternVLForConditionalGeneration(hf_config))
    tower = TOWERS["internvl_vision"].from_hf(hf.config.vision_config, feature_layers=(-1,))
    config = LlavaConfig(
        vision=tower,
        projector=PixelShuffleConfig(tower.feature_size, text["hidden_size"]),
        decoder=Decoder.from_hf(hf.config.text_config, tied=False),
        geometry=VisualGeometry(tile_size=TILE, patch_size=2 * PATCH, tiling=GridTiling(1, 4)),
        layout="hf",
        model_type="internvl",
        image_token_id=59,
    )
    ours = LlavaModel(config)
    ours.load_state_dict({renamed(name): value for name, value in hf.state_dict().items()})
    return hf, ours


def renamed(name: str) -> str:
    parts = {"vision_tower": "vision_tower", "multi_modal_projector": "projector", "language_model": "decoder"}
    whole, part, rest = ["decoder", "lm_head", "weight"] if name == "lm_head.weight" else name.split(".", 2)
    return "decoder.lm_head.weight" if whole == "decoder" else f"{parts[part]}.{rest}"


def batch_of(model, counts, layout="packed", size=(20, 30)):
    """Sequences with so many images of a size each among text, as a Batch, and as transformers takes each."""
    generator = torch.Generator().manual_seed(3)
    sequences, each = [], []
    for images in counts:
        text = [torch.randint(0, 50, (3,), generator=generator, dtype=torch.int32) for _ in range(images + 1)]
        shown = VisualPiece(image_rows(model.config.geometry, *size))
        pieces = [TextPiece(text[0].numpy(), torch.zeros(3, dtype=bool).numpy())]
        ids = [text[0]]
        for words in text[1:]:
            pieces += [shown, TextPiece(words.numpy(), torch.ones(3, dtype=bool).numpy())]
            ids += [torch.full((len(shown.rows),), 59, dtype=torch.int32), words]
        sequences.append(pieces)
        each.append(torch.cat(ids).long()[None])
    plan = build_plan(sequences, model.config.geometry.tower_rows_per_tile, layout)
    tiles, normalised = pixels(model.vision_tower, plan.tiles)
    of_each = [count * plan.tiles // sum(counts) for count in counts] if plan.tiles else counts
    return Batch(tiles, plan, torch.from_numpy(plan.flat)), each, normalised.split(of_each)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("size", "tiles_each"), [((32, 32), 1), ((40, 100), 4)])  # the latter with its thumbnail
def test_logits_and_gradients_are_transformers(pair, layout, size, tiles_each):
    hf, ours = pair
    batch, ids, tiles = batch_of(ours, [1, 2, 1], layout, size)
    assert batch.plan.tiles == 4 * tiles_each
    found = ours(batch, logits="all").logits.flatten(0, -2)
    hf.zero_grad()
    losses, count = 0.0, len(batch.plan.column("supervised_row"))
    boundaries = batch.plan.column("boundaries")
    for place, (tokens, pictures) in enumerate(zip(ids, tiles, strict=True)):
        start, labels = int(boundaries[place]), tokens.clone()
        labels[0, :3] = -100
        labels[tokens == 59] = -100
        out = hf(input_ids=tokens, pixel_values=pictures, labels=labels, num_items_in_batch=count)
        assert_close("InternVL logits", found[start : start + tokens.shape[1]], out.logits[0])
        out.loss.backward()
        losses += out.loss.item()
    ours.zero_grad()
    loss = ours(batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(losses, rel=1e-5)
    expected = {renamed(name): parameter.grad for name, parameter in hf.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close("InternVL gradients", parameter.grad, expected[name])


def test_text_alone_and_a_model_that_runs_every_part(pair):
    _, ours = pair
    batch, _, _ = batch_of(ours, [0, 0])
    ours.zero_grad()
    empty = Batch(batch.tiles[:0], batch.plan, batch.flat)
    try:
        ours.runs_every_part = True
        out = ours(empty, logits="all").logits
        out.sum().backward()
        assert ours.projector.linear_1.weight.grad is not None
        assert not ours.projector.linear_1.weight.grad.any()
    finally:
        ours.runs_every_part = False
    with torch.no_grad():
        assert torch.equal(ours(empty, logits="all").logits, out)


def test_its_cost_counts_the_connectors_rows(pair):
    _, ours = pair
    rows, products = 4, (4 * 32) * 64 + 64 * 64
    assert forward_flops(ours.config, [30], tiles=3).projector == 2 * products * 3 * rows


def test_a_geometry_that_counts_the_towers_rows_is_refused(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="the connector gives 4 rows per tile, but the geometry has 16"):
        replace(ours.config, geometry=VisualGeometry(tile_size=TILE, patch_size=PATCH))
    pooled = replace(ours.config.geometry, video_pool="average", video_pool_stage="before")
    with pytest.raises(ValueError, match="video_pool_stage is 'before'"):
        replace(ours.config, geometry=pooled)
