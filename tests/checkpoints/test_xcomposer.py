"""InternLM-XComposer 1: a checkpoint of the published layout, against its parts put together by hand from transformers'
BLIP-2 and Llama; its low-rank weights, tokenizer and prompts; saved, and what it cannot be."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.checkpoints.tokenizer import load_tokenizer
from llava_fast.doctor import report
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config, read_config
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.models.vlm import LlavaModel
from tests.support import lavis, tiny
from tests.support.parity import assert_close, assert_same_answer
from tests.support.tiny_checkpoints import edit_json

QUERIES = 5
CONFIG = {
    "architectures": ["InternLMXComposerForCausalLM"],
    "auto_map": {"AutoModel": "modeling_InternLM_XComposer.InternLMXComposerForCausalLM"},
    "model_type": "InternLMXComposer",
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "intern_converted_llm": True,
    "internlm_lora": None,
    "kqvo_bias": True,
    "num_attention_heads": 4,
    "num_quant": 32,
    "num_query_token": QUERIES,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": tiny.VOCABULARY,
    **tiny.TEXT,
    "vision_config": lavis.TOWER,
    "qformer_config": lavis.QFORMER,
}


class Parts(nn.Module):
    """The model of the published code, of transformers' parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.qformer = lavis.tower(), lavis.qformer()
        heads = {"num_attention_heads": 4, "attention_bias": True, "rms_norm_eps": 1e-5}
        self.llama = LlamaForCausalLM(LlamaConfig(**tiny.TEXT, **heads, vocab_size=tiny.VOCABULARY)).eval()
        lavis.randomise(self.llama)
        self.queries = nn.Parameter(torch.randn(1, QUERIES, 48))
        self.start, self.end = (nn.Parameter(torch.randn(1, 1, 64) * 0.3) for _ in range(2))
        self.proj = nn.Linear(48, 64)

    def rows(self, pixels: torch.Tensor) -> torch.Tensor:
        made = self.qformer(query_embeds=self.queries, encoder_hidden_states=self.tower(pixels[None])[0])[0]
        return torch.cat([self.start, self.proj(made), self.end], dim=1)[0]

    def stored(self, of=lambda module: dict(module.named_parameters())) -> dict[str, torch.Tensor]:
        """Weights (or what `of` gives for each module) by the published names."""
        own = {"queries": "query_tokens", "start": "flag_image_start", "end": "flag_image_end"}
        named, tower = of(self), of(self.tower)
        found = {f"visual_encoder.{name}": value for name, value in lavis.tower_tensors(tower).items()}
        found |= {f"ln_vision.{leaf}": tower[f"post_layernorm.{leaf}"] for leaf in ("weight", "bias")}
        found |= {f"Qformer.bert.{name}": value for name, value in lavis.qformer_tensors(of(self.qformer)).items()}
        found |= {f"internlm_model.{name}": value for name, value in of(self.llama).items()}
        found |= {f"internlm_proj.{name}": value for name, value in of(self.proj).items()}
        return found | {stored: named[name] for name, stored in own.items()}


def write(folder) -> Parts:
    """A checkpoint as the published code writes it."""
    parts = Parts()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone().contiguous() for name, value in parts.stored().items()}
    buffers = {"internlm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | buffers, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny.tokenizer().save_pretrained(folder)
    return parts


@pytest.fixture(scope="module")
def composer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composer") / "xcomposer"
    parts = write(folder)
    return folder, llava_fast.load(folder), parts


def reference(model, parts: Parts, prompt: str, pictures: list) -> torch.Tensor:
    """The decoder's inputs for a prompt, tokenised in the pieces between images."""
    side, embed, made = lavis.TOWER["image_size"], parts.llama.get_input_embeddings(), []
    for number, chunk in enumerate(prompt.split("<image>")):
        ids = model.tokenizer(chunk, add_special_tokens=number == 0)["input_ids"]
        made.append(embed(torch.tensor(ids, dtype=torch.long)))
        if number < len(pictures):
            resized = Image.fromarray(pictures[number]).resize((side, side), Image.Resampling.BICUBIC)
            made.append(parts.rows(lavis.pixels(model.config.vision, np.asarray(resized))))
    return torch.cat(made)[None]


def requests() -> list[dict]:
    made = [{"prompt": f"hello <image> {h}x{w}:", "images": [tiny.picture(h, w)]} for h, w in ((32, 32), (20, 90))]
    made.append({"prompt": "a <image><image>\nthe b", "images": [tiny.picture(70, 40), tiny.picture(20, 90)]})
    return [*made, {"prompt": "only text"}]


@torch.no_grad()
def test_logits_singly_and_batched(composer):
    _, model, parts = composer
    inputs = [reference(model, parts, each["prompt"], each.get("images", [])) for each in requests()]
    expected = [parts.llama(inputs_embeds=each).logits[0] for each in inputs]
    for request, logits in zip(requests(), expected, strict=True):
        assert_close("XComposer logits", model(model.prepare([request]), logits="all").logits, logits)
        assert model.processor.count(request).all == len(logits)
    together = model(model.prepare(requests()), logits="all").logits
    for found, logits in zip(together.split([len(each) for each in expected]), expected, strict=True):
        assert_close("XComposer logits, packed batch", found, logits)
    padded = model(model.prepare(requests(), layout="padded"), logits="all").logits
    for found, logits in zip(padded, expected, strict=True):
        assert_close("XComposer logits, padded batch", found[: len(logits)], logits)


@torch.no_grad()
def test_greedy_answers_of_a_mixed_batch(composer):
    _, model, parts = composer
    answers = model.generate(requests(), max_new_tokens=16, ignore_eos=True)
    for request, answer in zip(requests(), answers, strict=True):
        inputs = reference(model, parts, request["prompt"], request.get("images", []))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
        out = parts.llama.generate(inputs_embeds=inputs, max_new_tokens=16, output_logits=True, **options)
        assert_same_answer(answer.token_ids, out.sequences[0].tolist(), torch.stack(out.logits)[:, 0])


def test_gradients(composer):
    _, model, parts = composer
    turns = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "the hello"}]
    request = {"messages": turns, "images": [tiny.picture(20, 90)]}
    batch = model.prepare([request], labels=True)
    model.zero_grad()
    parts.zero_grad()
    model(batch).loss.backward()
    prompt = model.processor.template.render(turns, add_generation_prompt=False)
    logits = parts.llama(inputs_embeds=reference(model, parts, prompt, request["images"])).logits[0]
    rows = batch.column("supervised_row").long()
    nn.functional.cross_entropy(logits[rows], batch.column("supervised_target").long()).backward()
    names = family_of_config(model.config).names
    expected = {names.from_stored(name): value for name, value in parts.stored(lavis.grads).items()}
    floor = 1e-6 * max(grad.abs().max() for grad in expected.values())
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        if expected[name].abs().max() >= floor:
            assert_close("XComposer gradients", grad, expected[name])
    model.zero_grad()


def test_saved_it_is_the_same_to_the_bit(composer, tmp_path):
    folder, model, _ = composer
    llava_fast.save(model, tmp_path / "saved", layout="original")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == CONFIG
    stored, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert stored.keys() == {name for name in expected if not name.endswith("inv_freq")}
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    again = llava_fast.load(tmp_path / "saved")
    assert again.config == model.config
    model.config, kept = replace(model.config, source={}), model.config
    llava_fast.save(model, tmp_path / "anew", layout="original")
    model.config = kept
    assert load_checkpoint(tmp_path / "anew").config == model.config
    with pytest.raises(CheckpointError, match="InternLMXComposer has no other layout than 'original'"):
        llava_fast.save(model, tmp_path / "hf", layout="hf")


def test_low_rank_weights_are_merged(composer, tmp_path):
    folder, model, _ = composer
    shutil.copytree(folder, tmp_path / "copy")
    stored, at = load_file(folder / "model.safetensors"), "internlm_model.model.layers.1.{}.lora_{}.weight"
    torch.manual_seed(1)
    factors = {}
    for module, (out, inner) in {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}.items():
        factors |= {at.format(module, "A"): torch.randn(4, inner), at.format(module, "B"): torch.randn(out, 4)}
    save_file(stored | factors, tmp_path / "copy" / "model.safetensors")
    lora = {"freeze": False, "learn_param": ["q", "v", "ffn"], "lora_alpha": 8, "lora_dropout": 0.05, "lora_r": 4}
    edit_json(tmp_path / "copy" / "config.json", internlm_lora=lora, lora_cfg=lora)
    merged = llava_fast.load(tmp_path / "copy")
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        change = 2.0 * factors[at.format(module, "B")] @ factors[at.format(module, "A")]
        old, new = (each.decoder.layers[1].get_submodule(module).weight for each in (model, merged))
        torch.testing.assert_close(new - old, change, atol=1e-5, rtol=1e-4)
    llava_fast.save(merged, tmp_path / "saved", layout="original")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == CONFIG
    assert load_file(tmp_path / "saved" / "model.safetensors").keys().isdisjoint(factors)
    edit_json(tmp_path / "copy" / "config.json", internlm_lora={"lora_alpha": 8})
    with pytest.raises(CheckpointError, match=r"LoRA of \S+ has rank 4 and config.json states 8"):
        load_checkpoint(tmp_path / "copy")
    del factors[at.format("mlp.down_proj", "B")]
    save_file(stored | factors, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has lora_A of decoder.layers.1.mlp.down_proj.weight without the other"):
        load_checkpoint(tmp_path / "copy")


def test_the_published_sizes(tmp_path):
    published = {key: value for key, value in CONFIG.items() if key not in ("vision_config", "qformer_config")}
    published |= {"vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "num_query_token": 64}
    published |= {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, _ = read_config(tmp_path)
    with torch.device("meta"):
        model = LlavaModel(config)
    assert (config.projected_per_tile, config.vision.rows_per_tile, config.vision.layers_needed) == (66, 257, 39)
    assert llava_fast.count_tokens(config, 480, 640) == 66
    assert model.vision_tower.post_layernorm.eps == 1e-5
    names = {family_of_config(config).names.to_stored(name, "original", config) for name in model.state_dict()}
    assert {
        "visual_encoder.blocks.38.attn.q_bias",
        "visual_encoder.patch_embed.proj.bias",
        "Qformer.bert.encoder.layer.10.crossattention.self.key.weight",
        "Qformer.bert.encoder.layer.11.output_query.LayerNorm.bias",
        "internlm_model.model.layers.31.self_attn.o_proj.bias",
        "internlm_model.lm_head.weight",
    } <= names


def test_the_prompt_of_the_published_chat():
    template = builtin_template("xcomposer")
    turns = [{"role": "user", "content": "<image>\nwho?"}]
    prompt = template.render(turns)
    assert prompt.startswith("meta instruction\nYou are an AI assistant whose name is 浦语.\n- ")
    assert prompt.endswith("中文.\nconversation\n <|User|>:<image>who?\n<TOKENS_UNUSED_0> <|Bot|>:")
    turns += [{"role": "assistant", "content": "he"}, {"role": "user", "content": "a"}]
    more = " he<TOKENS_UNUSED_1> <|User|>:a\n<TOKENS_UNUSED_0> <|Bot|>:"
    assert template.render(turns) == prompt + more


def test_a_tokenizer_that_is_code_is_read_from_its_model(tmp_path):
    """The published one: a SentencePiece model with the tokens of the chat among its pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = ["the hello of an image", "what is it? who is the man", "the cat sat on the mat and the dog"] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"],
        minloglevel=2,
    )
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_InternLM_XComposer.InternLMXComposerTokenizer", None]},
        "tokenizer_class": "InternLMXComposerTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenization_InternLM_XComposer.py").write_text("raise SystemExit('this code must not run')")
    own = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    read = load_tokenizer(tmp_path, "LlamaTokenizer")
    for prompt in (
        "meta\n <|User|>:",
        "who is the cat?\n<TOKENS_UNUSED_0> <|Bot|>:",
        "浦语 the",
        "a  b<TOKENS_UNUSED_1> c",
    ):
        assert read(prompt)["input_ids"] == [1, *own.encode(prompt)], prompt
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=False)
    without = load_tokenizer(tmp_path, "LlamaTokenizer")
    without.save_pretrained(tmp_path / "saved")
    for each in (without, load_tokenizer(tmp_path / "saved", "LlamaTokenizer")):
        assert each("the")["input_ids"] == own.encode("the")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_doctor_says_that_transformers_has_none(composer):
    with pytest.raises(CheckpointError, match="transformers has no InternLM-XComposer 1, so there is nothing"):
        report(str(composer[0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qformer_config": {"hidden_size": 50}}, "hidden_size 50 is no multiple of 12"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .* leave it out"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters is .* leave it out"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0, .* leave it out"),
        ({"internlm_lora": {"lora_r": 0}}, "internlm_lora.lora_r: Input should be greater than or equal to 1"),
        ({"num_query_token": "64"}, "num_query_token: Input should be a valid integer"),
    ],
)
def test_what_it_cannot_be_is_refused(composer, tmp_path, change, said):
    shutil.copytree(composer[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "copy")
