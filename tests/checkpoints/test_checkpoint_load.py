"""Loading Hugging Face checkpoints: every tensor bit for bit, and one clear error for each kind of damage."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint, load_weights
from llava_fast.errors import CheckpointError, RequestError
from llava_fast.models.vlm import LlavaModel
from tests.support import tiny
from tests.support.tiny_checkpoints import (
    KINDS,
    assert_same_tensors,
    build,
    edit_json,
    edit_tensors,
    hf_model,
    save_hf,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_each_family_arrives_bit_for_bit(tmp_path, kind):
    tensors = save_hf(kind, tmp_path)
    model = build(load_checkpoint(tmp_path))
    assert_same_tensors(model, tensors)
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_shards_with_an_index(tmp_path):
    model = hf_model("llava")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_tensors(build(load_checkpoint(tmp_path)), save_hf("llava", tmp_path / "whole"))


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_files_new_and_old(tmp_path, legacy):
    tensors = save_hf("llava_next", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    torch.save(stored, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "model.safetensors").unlink()
    assert_same_tensors(build(load_checkpoint(tmp_path)), tensors)


def test_bin_shards(tmp_path):
    tensors = save_hf("llava", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = sorted(stored)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save({name: stored[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_tensors(build(load_checkpoint(tmp_path)), tensors)


def test_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    tensors = save_hf("llava", tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    edit_tensors(
        tmp_path / "model.safetensors",
        lambda t: t.update({k: v.float() for k, v in t.items() if k.startswith("vision_tower")}),
    )
    mixed = build(load_checkpoint(tmp_path))  # a float32 tower beside a bfloat16 decoder: the decoder's counts
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.bfloat16}
    wide = build(load_checkpoint(tmp_path, dtype=torch.float64))
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    name = "decoder.layers.1.mlp.up_proj.weight"
    assert torch.equal(dict(wide.named_parameters())[name], tensors[name].bfloat16().double())


def test_load_weights_keeps_requires_grad_and_takes_its_own_dtype(tmp_path):
    save_hf("llava", tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    with torch.device("meta"):
        model = LlavaModel(checkpoint.config)
    model.vision_tower.requires_grad_(False)
    load_weights(model, checkpoint, device="cpu", dtype=torch.float16)
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_buffers_and_the_siglip_head_are_skipped_knowingly(tmp_path):
    tensors = save_hf("llava_onevision", tmp_path)
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "vision_tower.vision_model.head.probe": torch.ones(1, 1, 32),
    }
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update(extra))
    assert_same_tensors(build(load_checkpoint(tmp_path)), tensors)


def test_a_tied_head_may_be_stored_but_must_be_the_embedding(tmp_path):
    tensors = save_hf("llava_onevision", tmp_path)
    embedding = tensors["decoder.embed_tokens.weight"]
    head = {"language_model.lm_head.weight": embedding.clone()}
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update(head))
    assert_same_tensors(build(load_checkpoint(tmp_path)), tensors)
    head["language_model.lm_head.weight"][0, 0] += 1
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update(head))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' differs from the token embedding"):
        load_checkpoint(tmp_path)


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), r"lacks 1 tensor: decoder\.norm\.weight; the download is incomplete"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1." in name],
            r"lacks \d+ tensors: .* and \d+ more",
        ),
        (
            lambda t: t.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}),
            r"has 1 tensor: language_model\.model\.layers\.7\.mlp\.up_proj\.weight that the model",
        ),
        (lambda t: t.update({NORM: torch.ones(17)}), r"model\.norm\.weight' has shape \[17\], but .*implies \[16\]"),
        (lambda t: t.update({"transformer.wte.weight": torch.ones(2)}), r"'transformer\.wte\.weight', which no"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), r"norm\.weight' is torch\.int8; load an unquantised"),
        (lambda t: t.pop("language_model.model.embed_tokens.weight"), "has no token embedding"),
    ],
)
def test_wrong_tensors_are_named_before_anything_is_assigned(tmp_path, edit, message):
    save_hf("llava", tmp_path)
    edit_tensors(tmp_path / "model.safetensors", edit)
    model = None
    with pytest.raises(CheckpointError, match=message):  # noqa: PT012 either step may be the one that finds it
        checkpoint = load_checkpoint(tmp_path)
        with torch.device("meta"):
            model = LlavaModel(checkpoint.config)
        load_weights(model, checkpoint)
    assert model is None or all(parameter.is_meta for parameter in model.parameters())


def test_a_single_file_comes_before_the_index_of_shards_that_it_replaced(tmp_path):
    """transformers leaves the index when it saves one file over shards, and loads the file."""
    hf_model("llava").save_pretrained(tmp_path, max_shard_size="20KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    tensors = save_hf("llava", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_same_tensors(build(load_checkpoint(tmp_path)), tensors)


def test_a_missing_shard_is_named_with_its_count(tmp_path):
    hf_model("llava").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks the shard {shard.name}, which has \d+ tensors according to"):
        load_checkpoint(tmp_path)


def test_a_shard_without_a_tensor_of_its_index(tmp_path):
    hf_model("llava").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    name = min(load_file(shard))
    edit_tensors(shard, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=rf"{shard.name} lacks '{name}'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"", None])
def test_unreadable_safetensors(tmp_path, content):
    save_hf("llava", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        load_checkpoint(tmp_path)


def test_unreadable_bin(tmp_path):
    save_hf("llava", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_checkpoint(tmp_path)
    torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain dict of tensors"):
        load_checkpoint(tmp_path)


def test_directories_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json: it is not a LLaVA checkpoint"):
        load_checkpoint(tmp_path)
    save_hf("llava", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: it needs model\.safetensors or"):
        load_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"config\.json is a file; give the directory"):
        load_checkpoint(tmp_path / "a" / "config.json")
    save_hf("llava", tmp_path / "b")
    edit_json(tmp_path / "b" / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        load_checkpoint(tmp_path / "b")


def test_hub_ids_go_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    tensors = save_hf("llava", tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert_same_tensors(build(load_checkpoint("someone/llava-tiny")), tensors)
    assert asked == ["someone/llava-tiny"]


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'someone/absent' is neither a local directory nor an"):
        load_checkpoint("someone/absent")


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"device": "abc"}, "device 'abc' is unknown"),
        ({"device": 3.5}, "device 3.5 is unknown"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used here"),
        ({"device_map": ["cuda:77"]}, "device 'cuda:77' cannot be used here"),
        ({"device": "meta"}, "holds no weights"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"dtype": torch.int8}, "dtype torch.int8 is not supported"),
        ({"dtype": 3}, "dtype 3 is not supported"),
        ({"processor": {}}, "processor is {}: give a ProcessorOptions"),
    ],
)
def test_options_that_cannot_be_used(option, problem, tmp_path):
    with pytest.raises(CheckpointError, match=problem):
        llava_fast.load(tmp_path, **option)


def test_an_image_token_that_is_none(tmp_path):
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, tmp_path)
    edit_json(tmp_path / "config.json", image_token_index=10**6)
    model = llava_fast.load(tmp_path)
    with pytest.raises(RequestError, match=r"the tokenizer has no token 1000000, which config\.json names"):
        model.generate([{"prompt": "hello"}])


MEASURE = """
import sys, torch
from llava_fast.storage.tensor_files import open_file
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:")))

for dtype in (torch.bfloat16, torch.float32):
    before, peak, kept = resident(), 0, []
    for tensor in open_file(Path(sys.argv[1])).values():
        value = tensor.load().to(dtype)
        value.sum()  # touch every page
        kept.append(value)
        peak = max(peak, resident() - before)
    print(peak, sum(value.nbytes for value in kept))
    del kept, value, tensor
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_host_memory_stays_near_the_weights(tmp_path):
    """Whether tensors are converted or stay views of the file, peak memory is at most 1.2 times what is kept."""
    file = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.randn(1024, 1024) for number in range(40)}, file)
    run = subprocess.run([sys.executable, "-c", MEASURE, file], capture_output=True, text=True, check=True)
    measured = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert [kept for _, kept in measured] == [40 * 2**20 * 2, 40 * 2**20 * 4]
    for peak, kept in measured:
        assert peak <= 1.2 * kept
