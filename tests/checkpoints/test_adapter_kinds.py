"""Every kind of PEFT adapter: merging gives the answers of the unmerged adapter, or an error that names the kind."""

import copy
import sys

import pytest
import torch

import llava_fast
from llava_fast.checkpoints.adapters import _UNMERGEABLE
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError
from tests.support import tiny
from tests.support.parity import assert_close
from tests.support.tiny_checkpoints import edit_json, edit_tensors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "next_biases"  # tied embeddings, and biases in every Linear
TARGETS = ["q_proj", "v_proj", "up_proj"]
DECODER = r".*language_model.*\.(q_proj|v_proj|down_proj)"
PROMPT, PICTURE = "hello <image> there, what is it?", tiny.picture(60, 90)


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | changes)


def sub(name, **fields):
    """A section of LoraConfig that peft does not export."""
    return getattr(sys.modules["peft.tuners.lora.config"], name)(**fields)


PLAIN = {
    "plain": lora,
    "rslora": lambda: lora(use_rslora=True),
    "False": lambda: lora(init_lora_weights=False),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "mica": lambda: lora(init_lora_weights="mica"),
    "eva": lambda: lora(init_lora_weights="eva"),
    "some layers": lambda: lora(layers_to_transform=[1], layers_pattern="layers"),
    "exclude_modules": lambda: lora(exclude_modules=r".*vision_tower.*"),
    "all-linear": lambda: lora(target_modules="all-linear"),
    "saved projector": lambda: lora(modules_to_save=["multi_modal_projector"]),
    "saved embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved embedding and head": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
}
MORE = {
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "dora": lambda: lora(use_dora=True),
    "dora on pissa": lambda: lora(use_dora=True, init_lora_weights="pissa"),
    "fan_in_fan_out": lambda: lora(fan_in_fan_out=True),
    "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "bias all": lambda: lora(bias="all"),
    "bias lora_only": lambda: lora(bias="lora_only"),
    "lora_bias": lambda: lora(lora_bias=True),
    "tokens": lambda: lora(trainable_token_indices=[5, 9]),
    "saved embedding, tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "adapted embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "adapted embedding, tied": lambda: lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "adapted head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "patches": lambda: lora(target_modules=["patch_embedding", "q_proj"]),
    "target_parameters": lambda: lora(target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
    "qalora": lambda: lora(use_qalora=True),
    "bdlora": lambda: lora(
        use_bdlora=sub("BdLoraConfig", target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)
    ),
    "kasa": lambda: lora(kasa_config=sub("KasaConfig")),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10, init_r=4, target_r=2),
    "BOFT": lambda: peft.BOFTConfig(target_modules=DECODER),
    "C3A": lambda: peft.C3AConfig(target_modules=DECODER, block_size=16),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=50),
    "HRA": lambda: peft.HRAConfig(target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS),
    "LayerNorm": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "layer_norm1"]),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8, r=0),
    "TrainableTokens": lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 9]),
    "VBLoRA": lambda: peft.VBLoRAConfig(target_modules=DECODER, vector_length=8, num_vectors=16),
    "VeRA": lambda: peft.VeraConfig(target_modules=DECODER),
}
PEFT_CHANGES_BOTH = {"adapted embedding", "adapted embedding, tied", "adapted head"}
"""Where PEFT's own merge adds to the weight that embedding and head share, though it runs them apart."""
UNTIED = {"saved embedding", "saved head", "saved embedding and head", "adapted embedding", "adapted head"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.save(tiny.CASES[NAME], tiny.pair(NAME).hf, folder)
    return folder


def write(path, config, moved=0.05):
    """An adapter of a copy of the tiny model, trained by random steps."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(tiny.pair(NAME).hf), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad and moved:
                parameter.data += moved * torch.randn_like(parameter)
    adapted.save_pretrained(path)
    return path


def read(path):
    """PEFT's model with the adapter, unmerged."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(tiny.pair(NAME).hf), path).eval()


@torch.no_grad()
def reference(model):
    return model(**tiny.pair(NAME).reference_inputs(PROMPT, [PICTURE])).logits[0]


@torch.no_grad()
def answer(model):
    return model(model.prepare([{"prompt": PROMPT, "images": [PICTURE]}]), logits="all").logits


@pytest.mark.parametrize("kind", [*PLAIN, *MORE])
def test_merged_to_the_answers_of_peft(kind, base, tmp_path, monkeypatch):
    path = write(tmp_path, (PLAIN | MORE)[kind]())
    adapted = read(path)
    expected = reference(adapted)
    assert (expected - reference(tiny.pair(NAME).hf)).abs().max() > 1e-3 * expected.abs().max()
    if kind not in PEFT_CHANGES_BOTH:
        assert_close("PEFT's merge", reference(adapted.merge_and_unload()), expected)
    if kind in PLAIN:  # tensor by tensor, without PEFT
        monkeypatch.setitem(sys.modules, "peft", None)
    ours = llava_fast.load(path, model_base=base)
    found = answer(ours)
    assert_close("adapters", found, expected)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert ours.config.decoder.tie_embeddings == (kind not in UNTIED)


@pytest.mark.parametrize("kind", ["pissa", "olora", "dora on pissa"])
def test_an_untouched_start_is_the_base(kind, base, tmp_path):
    path = write(tmp_path, MORE[kind](), moved=0)
    assert_close("starts", answer(llava_fast.load(path, model_base=base)), answer(tiny.pair(NAME).ours))


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_an_untied_model_is_saved_as_it_answers(layout, base, tmp_path):
    merged = llava_fast.load(write(tmp_path / "adapter", PLAIN["saved embedding"]()), model_base=base)
    llava_fast.save(merged, tmp_path / "saved", layout=layout)
    assert torch.equal(answer(llava_fast.load(tmp_path / "saved", chat_template="vicuna_v1")), answer(merged))
    if layout == "hf":
        again = type(tiny.pair(NAME).hf).from_pretrained(tmp_path / "saved")
        assert_close("adapters", reference(again), answer(merged))


def test_names_of_transformers_4(base, tmp_path):
    path = write(tmp_path, lora(target_modules=DECODER, use_dora=True))
    expected = reference(read(path))

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("model.model.language_model.", "model.language_model.model.")] = tensors.pop(key)

    edit_tensors(path / "adapter_model.safetensors", rename)
    assert_close("adapters", answer(llava_fast.load(path, model_base=base)), expected)


@pytest.mark.parametrize("kind", ["pissa", "dora", "patterns"])
def test_an_original_adapter(kind, base, tmp_path):
    """Names of the original LLaVA, whose tower PEFT does not see, and a projector trained beside the adapter."""
    whole, path = tmp_path / "whole", tmp_path / "adapter"
    llava_fast.save(llava_fast.load(base), whole, layout="original")
    config = MORE[kind]()
    config.target_modules = DECODER
    adapted = read(write(path, config))
    edit_tensors(
        path / "adapter_model.safetensors",
        lambda t: [t.update({k.replace("model.language_model.", "model."): t.pop(k)}) for k in list(t)],
    )
    edit_json(path / "adapter_config.json", target_modules=["q_proj", "v_proj", "down_proj"])
    (path / "config.json").write_text((whole / "config.json").read_text())
    projector = adapted.base_model.model.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.weight.add_(0.05)
    extra = {"base_model.model.model.mm_projector.0.weight": projector.linear_1.weight.detach()}
    torch.save(extra, path / "non_lora_trainables.bin")
    assert_close(
        "adapters", answer(llava_fast.load(path, model_base=whole, chat_template="vicuna_v1")), reference(adapted)
    )


def test_rounded_as_peft_rounds_it(base, tmp_path):
    """A bfloat16 base stays bfloat16, and gets PEFT's own values to the bit."""
    half = copy.deepcopy(tiny.pair(NAME).hf).bfloat16()
    tiny.save(tiny.CASES[NAME], half, tmp_path / "half")
    path = write(tmp_path / "adapter", MORE["dora"]())
    wanted = peft.PeftModel.from_pretrained(half, path).merge_and_unload(safe_merge=True)
    tensors = load_checkpoint(path, model_base=tmp_path / "half").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "layers.0.self_attn.q_proj.weight"
    found = tensors[f"decoder.{name}"].load()
    assert torch.equal(found, wanted.get_parameter(f"model.language_model.{name}"))


def test_a_saved_embedding_takes_the_dtype_of_the_base(base, tmp_path):
    tiny.save(tiny.CASES[NAME], copy.deepcopy(tiny.pair(NAME).hf).bfloat16(), tmp_path / "half")
    path = write(tmp_path / "adapter", PLAIN["saved embedding"]())  # float32, as it was trained
    assert load_checkpoint(path, model_base=tmp_path / "half").dtype == torch.bfloat16


REFUSED = {
    "alora": (lora, {"alora_invocation_tokens": [5]}, r"alora_invocation_tokens \[5\] cannot be merged: it acts only"),
    "arrow": (lora, {"arrow_config": {"top_k": 2}}, "arrow_config .* cannot be merged: it weighs several adapters"),
    "replication": (lora, {"layer_replication": [[0, 2]]}, r"layer_replication \[\[0, 2\]\] cannot be merged"),
    "corda": (lora, {"init_lora_weights": "corda"}, "'corda' changed the base by data, .*path_initial_model_for"),
    "lora_ga": (lora, {"init_lora_weights": "lora_ga"}, "'lora_ga' changed the base by gradients"),
    "pissa_niter": (lora, {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base by random draws"),
    "loftq": (lora, {"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' cannot be merged by PEFT"),
    "megatron": (lora, {"megatron_config": {"a": 1}}, "megatron_config .* cannot be merged by PEFT .*megatron"),
    "lily": (lambda: peft.LilyConfig(target_modules=TARGETS), {}, "'LILY', which cannot be merged by PEFT"),
    "prompts": (lora, {"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING', which cannot be merged .*it learns a prompt"),
    "no type": (lora, {"peft_type": "NEW"}, "peft_type is 'NEW', which cannot be merged by PEFT"),
    "no field": (lora, {"use_more": True}, "use_more True is unknown to PEFT .*: upgrade it"),
    "no magnitudes": (lora, {"use_dora": True}, "the file lacks .*lora_magnitude_vector.*; give the base model"),
    "no targets": (lora, {"target_modules": ["q_proj"], "use_dora": True}, "the base does not have .*v_proj"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind, base, tmp_path):
    config, changes, message = REFUSED[kind]
    path = write(tmp_path, config())
    edit_json(path / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, model_base=base)


def test_without_peft(base, tmp_path, monkeypatch):
    path = write(tmp_path, MORE["dora"]())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        CheckpointError, match=r"use_dora True needs PEFT to be merged: pip install 'llava_fast\[train\]'"
    ):
        load_checkpoint(path, model_base=base)


def test_each_field_that_no_merge_serves_is_one_of_pefts():
    fields = lora().to_dict()
    assert fields.keys() >= _UNMERGEABLE.keys()
