"""The demo's stage 0: attention begins as a convolution, and what makes it one stays through training."""

import numpy as np
import pytest
import torch
import tower as stage0
from make_model import make_model

import llava_fast
from llava_fast.demo import split_scans


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "model")
    model = llava_fast.load(tmp_path / "model", device="cpu")
    stage0.initialise(model.vision_tower, torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def test_each_head_looks_at_its_neighbour(model):
    tower = model.vision_tower
    side, heads = model.config.geometry.side, tower.config.num_heads
    tiles = torch.randint(0, 256, (2, 3, tower.config.image_size, tower.config.image_size), dtype=torch.uint8)
    mean, std = torch.tensor(tower.config.image_mean), torch.tensor(tower.config.image_std)
    layer = tower.encoder.layers[0]
    x = layer.layer_norm1(tower.pre_layrnorm(tower.embeddings(tiles, mean, std)))
    query, key = (
        linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(0)
    for head, (dx, dy) in enumerate(stage0.NEIGHBOURS):
        inner = [(y, x) for y in range(1, side - 1) for x in range(1, side - 1)]
        share = [weights[head, 1 + y * side + x, 1 + (y + dy) * side + x + dx].item() for y, x in inner]
        assert sum(share) / len(share) > 0.6, (head, dx, dy)


def test_training_leaves_positions_queries_and_keys(model):
    tower = model.vision_tower
    reserved = tower.config.hidden_size // tower.config.num_heads
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    accuracy = stage0.train_tower(tower, model.config.geometry, split_scans()[0], minutes=0.02)
    assert 0 <= accuracy <= 1
    after = dict(tower.named_parameters())
    assert not torch.equal(before["encoder.layers.0.mlp.fc1.weight"], after["encoder.layers.0.mlp.fc1.weight"])
    assert not after["embeddings.patch_embedding.weight"][:reserved].any()
    for name in ("q_proj", "k_proj"):
        full = f"encoder.layers.1.self_attn.{name}.weight"
        assert torch.equal(before[full], after[full])
    position = "embeddings.position_embedding.weight"
    torch.testing.assert_close(before[position][1:, :reserved], after[position][1:, :reserved], rtol=0.01, atol=0)


def test_labels_are_what_the_patches_show(model):
    geometry = model.config.geometry

    tiles, labels = stage0.dense_batch(np.random.default_rng(0), geometry, split_scans()[0], plain=1.0)
    assert tiles.dtype == torch.uint8
    assert labels.shape == (len(tiles), geometry.side**2)
    assert ((labels >= 0) & (labels <= stage0.NO_DIGIT)).all()
    assert (labels != stage0.NO_DIGIT).any(1).all()
    patch = geometry.patch_size
    brightness = tiles.float().mean(1).unfold(1, patch, patch).unfold(2, patch, patch).mean((-1, -2)).flatten(1)
    ink = labels != stage0.NO_DIGIT
    assert brightness[ink].mean() > 4 * brightness[~ink].mean()  # white ink on black
