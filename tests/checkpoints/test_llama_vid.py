"""LLaMA-VID: a checkpoint of the original layout, against its parts put together by hand from transformers' BLIP-2,
InstructBLIP and Llama and the original's steps; videos, dialogues, its tower's own file; saved, what it cannot be."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import llava_fast
from llava_fast.batch.answering import Answerer
from llava_fast.batch.answering import Settings as BatchSettings
from llava_fast.checkpoints.assemble import Assembly
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.doctor import report
from llava_fast.errors import CheckpointError, RequestError
from llava_fast.families import family_of_config, read_config
from llava_fast.families.llama_vid import LlamaVid
from llava_fast.inputs.options import ProcessorOptions
from llava_fast.inputs.pictures.video import FrameRate
from llava_fast.models import visual
from llava_fast.models.batch import Batch
from llava_fast.models.vlm import LlavaModel
from llava_fast.serve.service import Service
from llava_fast.serve.settings import Settings as ServeSettings
from tests.support import lavis, tiny
from tests.support.parity import assert_close, assert_same_answer
from tests.support.qformers import question_tokenizer
from tests.support.tiny_checkpoints import edit_json

QUERIES, SIDE = 5, 4
WORDS = {"vocab_size": len(question_tokenizer()) + 1, "max_position_embeddings": 512}
ROPE = {"rope_type": "linear", "type": "linear", "factor": 16.0}
CONFIG = {
    "architectures": ["LlavaLlamaAttForCausalLM"],
    "model_type": "llava",
    "bert_type": "qformer_pretrain_freeze_all",
    "bos_token_id": 1,
    "compress_type": None,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_processor": "./llamavid/processor/clip-patch8-32",
    "max_token": 2048,
    "mm_hidden_size": lavis.TOWER["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "./model_zoo/LAVIS/eva_vit_g.pth",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_query": QUERIES,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": ROPE,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_mm_proj": True,
    "vocab_size": tiny.VOCABULARY,
    **tiny.TEXT,
    "vision_config": lavis.TOWER,
    "qformer_config": lavis.QFORMER | WORDS,
}


class Parts(nn.Module):
    """The model of the original code, of transformers' parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.qformer = lavis.tower(norm_eps=None), lavis.qformer(WORDS["vocab_size"])
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 16.0}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": rope}
        self.llama = LlamaForCausalLM(LlamaConfig(**tiny.TEXT, **heads, vocab_size=tiny.VOCABULARY)).eval()
        lavis.randomise(self.llama)
        self.query = nn.Parameter(torch.randn(1, QUERIES, 48))
        self.ln, self.projector = nn.LayerNorm(32), nn.Linear(48, 32)
        self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 64)
        self.mm = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        for module in (self.ln, self.projector, self.key, self.value, self.mm):
            lavis.randomise(module)

    def rows(self, pixels: torch.Tensor, question: str, compress: str | None = None) -> torch.Tensor:
        """[1 + content rows, 64] of one image or frame [3, H, W]."""
        whole = self.tower(pixels[None])[0]
        ids = question_tokenizer()(question, return_tensors="pt")["input_ids"]
        ids = torch.cat([ids[:, :1], ids[:, 1:][:, -255:]], dim=1)  # [CLS] and the last tokens
        mask = torch.ones(1, QUERIES + ids.shape[1])
        seen = self.qformer(ids, mask, query_embeds=self.query, encoder_hidden_states=self.ln(whole))[0]
        asks, patches = self.projector(seen[:, :QUERIES]), whole[:, 1:]
        scores = asks @ self.key(patches).transpose(1, 2) / 32**0.5
        context = self.value((scores.softmax(-1) @ patches).mean(1))
        if compress == "mean":
            patches = patches.mean(1, keepdim=True)
        elif compress is not None:
            stride = SIDE // int(compress.removeprefix("grid:"))
            planes = patches.reshape(1, SIDE, SIDE, 32).permute(0, 3, 1, 2)
            patches = F.avg_pool2d(planes, stride, stride).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([context, self.mm(patches)[0]])

    def stored(self, of=lambda module: dict(module.named_parameters())) -> dict[str, torch.Tensor]:
        """Weights (or what `of` gives for each module) by the original names."""
        tower = lavis.tower_tensors(of(self.tower))
        found = {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
        qformer = lavis.qformer_tensors(of(self.qformer))
        found |= {f"model.vlm_att_encoder.bert.{name}": value for name, value in qformer.items()}
        parts = {"ln": "vlm_att_ln", "projector": "vlm_att_projector", "key": "vlm_att_key_projector"}
        for mine, theirs in (parts | {"value": "vlm_att_val_projector", "mm": "mm_projector"}).items():
            found |= {f"model.{theirs}.{name}": value for name, value in of(getattr(self, mine)).items()}
        return found | of(self.llama) | {"model.vlm_att_query": of(self)["query"]}


def write(folder) -> Parts:
    """A checkpoint as the original code writes it."""
    parts = Parts()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone().contiguous() for name, value in parts.stored().items()}
    buffers = {"model.vlm_att_encoder.bert.embeddings.position_ids": torch.arange(512)[None]}
    save_file(tensors | buffers, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny.tokenizer().save_pretrained(folder)
    question_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    return parts


@pytest.fixture(scope="module")
def vid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vid") / "llama-vid-7b"
    parts = write(folder)
    return folder, llava_fast.load(folder), parts


def loaded(folder, place, **changed):
    """The model with other fields in config.json."""
    shutil.copytree(folder, place)
    edit_json(place / "config.json", **changed)
    return llava_fast.load(place)


def squared(picture: np.ndarray, vision) -> torch.Tensor:
    """Padded to a square with the mean colour and resized, normalised."""
    image, side = Image.fromarray(picture), max(picture.shape[:2])
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in vision.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return lavis.pixels(vision, np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)))


def cropped(frame: np.ndarray, vision) -> torch.Tensor:
    """CLIP's processor: the shorter side resized to 32, the centre cropped."""
    image = Image.fromarray(frame)
    short = min(image.size)
    size = tuple(int(32 * side / short) for side in image.size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    return lavis.pixels(vision, np.asarray(resized.crop((left, top, left + 32, top + 32))))


def reference(model, parts: Parts, prompt: str, visuals: list[torch.Tensor]) -> torch.Tensor:
    """The decoder's inputs for a prompt whose placeholders stand for these rows."""
    embed, made = parts.llama.get_input_embeddings(), []
    for number, chunk in enumerate(prompt.replace("<video>", "<image>").split("<image>")):
        ids = model.tokenizer(chunk, add_special_tokens=number == 0)["input_ids"]
        made.append(embed(torch.tensor(ids, dtype=torch.long)))
        made += visuals[number : number + 1]
    return torch.cat(made)[None]


def requests() -> list[dict]:
    made = [{"prompt": f"hello <image> {h}x{w}?", "images": [tiny.picture(h, w)]} for h, w in ((32, 32), (20, 90))]
    made.append({"prompt": "a <image><image>\nthe b", "images": [tiny.picture(70, 40), tiny.picture(20, 90)]})
    return [*made, {"prompt": "only text"}]


def inputs_of(model, parts: Parts, request: dict, compress: str | None = None) -> torch.Tensor:
    prompt, vision = request["prompt"], model.config.vision
    asked = prompt.replace("<image>", "")
    rows = [parts.rows(squared(picture, vision), asked, compress) for picture in request.get("images", [])]
    return reference(model, parts, prompt, rows)


@torch.no_grad()
def test_logits_singly_and_batched(vid):
    _, model, parts = vid
    expected = [parts.llama(inputs_embeds=inputs_of(model, parts, each)).logits[0] for each in requests()]
    for request, logits in zip(requests(), expected, strict=True):
        assert_close("LLaMA-VID logits", model(model.prepare([request]), logits="all").logits, logits)
        assert model.processor.count(request).all == len(logits)
    together = model(model.prepare(requests()), logits="all").logits
    for found, logits in zip(together.split([len(each) for each in expected]), expected, strict=True):
        assert_close("LLaMA-VID logits, packed batch", found, logits)
    padded = model(model.prepare(requests(), layout="padded"), logits="all").logits
    for found, logits in zip(padded, expected, strict=True):
        assert_close("LLaMA-VID logits, padded batch", found[: len(logits)], logits)


@torch.no_grad()
@pytest.mark.parametrize(("compress", "rows"), [("mean", 2), ("grid:2", 5), ("grid:3", 17)])
def test_content_rows(vid, tmp_path, compress, rows):
    model, parts = loaded(vid[0], tmp_path / "copy", compress_type=compress), vid[2]
    request = requests()[1]
    logits = parts.llama(inputs_embeds=inputs_of(model, parts, request, compress)).logits[0]
    assert_close("LLaMA-VID logits, content rows", model(model.prepare([request]), logits="all").logits, logits)
    assert llava_fast.count_tokens(model, 20, 90) == rows


@torch.no_grad()
def test_greedy_answers_of_a_mixed_batch(vid):
    _, model, parts = vid
    answers = model.generate(requests(), max_new_tokens=16, ignore_eos=True)
    for request, answer in zip(requests(), answers, strict=True):
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
        inputs = inputs_of(model, parts, request)
        out = parts.llama.generate(inputs_embeds=inputs, max_new_tokens=16, output_logits=True, **options)
        assert_same_answer(answer.token_ids, out.sequences[0].tolist(), torch.stack(out.logits)[:, 0])


@torch.no_grad()
def test_a_video_is_two_rows_a_frame_and_runs_in_blocks(vid, tmp_path, monkeypatch):
    model, parts = loaded(vid[0], tmp_path / "copy", compress_type="mean"), vid[2]
    video = np.stack([tiny.picture(40, 60, seed) for seed in range(7)])
    request = {"prompt": "<video>\nwho is it?", "video": video}
    rows = torch.cat([parts.rows(cropped(frame, model.config.vision), "\nwho is it?", "mean") for frame in video])
    logits = parts.llama(inputs_embeds=reference(model, parts, request["prompt"], [rows])).logits[0]
    assert len(rows) == 14
    seen = []
    model.vision_tower.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    for most in (64, 3):
        monkeypatch.setattr(visual, "TILES_AT_ONCE", most)
        assert_close("LLaMA-VID logits, video", model(model.prepare([request]), logits="all").logits, logits)
    assert seen == [7, 3, 3, 1]
    mixed = [request, *requests()]
    for each, answer in zip(mixed, model.generate(mixed, max_new_tokens=6, ignore_eos=True), strict=True):
        assert model.generate([each], max_new_tokens=6, ignore_eos=True)[0].token_ids == answer.token_ids
    turns = [{**turn, "content": turn["content"].replace("<image>", "<video>")} for turn in dialogue()[:-1]]
    told, seen[:] = {"messages": turns, "video": video}, []
    monkeypatch.setattr(visual, "TILES_AT_ONCE", 64)
    whole = model(model.prepare([told])).logits
    monkeypatch.setattr(visual, "TILES_AT_ONCE", 4)
    torch.testing.assert_close(model(model.prepare([told])).logits, whole, rtol=1e-4, atol=1e-4)
    assert seen == [7, 4, 4, 4, 4, 4, 1]


def dialogue() -> list[dict]:
    asked = ["<image>\nwhat is it?", "who?", "a the hello"]
    turns = [({"role": "user", "content": text}, {"role": "assistant", "content": "the hello"}) for text in asked]
    return [turn for pair in turns for turn in pair]


def test_gradients_of_a_dialogue_whose_questions_each_encode_the_image(vid):
    _, model, parts = vid
    picture = tiny.picture(20, 90)
    batch = model.prepare([{"messages": dialogue(), "images": [picture]}], labels=True)
    assert (len(batch.tiles), batch.plan.tower_tiles, batch.plan.tiles) == (1, 1, 3)  # the tower runs once
    model.zero_grad()
    parts.zero_grad()
    model(batch).loss.backward()
    shown = [{**turn, "content": turn["content"].replace("<image>\n", "")} for turn in dialogue()]
    shown = [turn | {"content": f"<image>\n{turn['content']}"} if turn["role"] == "user" else turn for turn in shown]
    prompt = model.processor.template.render(shown, add_generation_prompt=False)
    pixels = squared(picture, model.config.vision)
    rows = [parts.rows(pixels, question) for question in ("what is it?", "who?", "a the hello")]
    logits = parts.llama(inputs_embeds=reference(model, parts, prompt, rows)).logits[0]
    at = batch.column("supervised_row").long()
    F.cross_entropy(logits[at], batch.column("supervised_target").long()).backward()
    names = family_of_config(model.config).names
    expected = {names.from_stored(name): value for name, value in parts.stored(lavis.grads).items()}
    floor = 1e-6 * max(grad.abs().max() for grad in expected.values())
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = found.keys() - expected.keys()
    assert all(name.startswith(("projector.qformer.encoder.layer.2.intermediate.",)) for name in missing), missing
    for name, grad in found.items():
        if name in expected and expected[name].abs().max() >= floor:
            assert_close("LLaMA-VID gradients", grad, expected[name])
    model.zero_grad()


@pytest.mark.parametrize("compress", [None, "mean", "grid:2"])
def test_text_alone_runs_every_part_where_sharding_needs_it(vid, tmp_path, compress):
    model = loaded(vid[0], tmp_path / "copy", compress_type=compress).train()
    model.runs_every_part = True
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]
    model(model.prepare([{"messages": turns}], labels=True)).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.projector.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or grad.any()] == []


def test_where_images_stand_in_a_dialogue(vid):
    model, turns = vid[1], dialogue()[:-1]
    request = {"messages": turns, "images": [tiny.picture(20, 90)]}
    questions = [ids[ids >= 0] for ids in model.processor.prepare([request]).plan.column("instruction")]
    read = [question_tokenizer().decode(ids, skip_special_tokens=True) for ids in questions]
    assert read == ["what is it?", "who?", "a the hello"]
    given = model.processor.with_options(ProcessorOptions(image_turns="given"))
    assert given.prepare([request]).plan.tiles == 1
    uncut = model.processor.with_options(ProcessorOptions(tiles_on="device")).prepare([request])
    assert torch.equal(model.inputs_embeds(Batch.from_prepared(uncut)), model.inputs_embeds(model.prepare([request])))
    video = np.stack([tiny.picture(40, 60)] * 2)
    told = [{**turns[0], "content": "<video>\nwhat is it?"}, *turns[1:]]
    assert model.processor.prepare([{"messages": told, "video": video}]).plan.tiles == 6
    mixed = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture(9, 9)}, {"type": "text", "text": "a"}]}
    ]
    mixed += [{"role": "assistant", "content": "<image> b"}, {"role": "user", "content": "c"}]
    literal = model.processor.with_options(ProcessorOptions(literal_text=True))
    assert literal.prepare([{"messages": mixed}]).plan.tiles == 2
    chat = model.chat()
    chat.send("what?", images=[tiny.picture(20, 90)], max_new_tokens=3)
    chat.send("who?", max_new_tokens=3)
    alone = model.generate([{"messages": chat.messages[:-1], "images": [tiny.picture(20, 90)]}], max_new_tokens=3)[0]
    assert chat.messages[-1]["content"] == alone.text


def test_a_number_of_frames_wins_over_the_rate(vid):
    model, fps = vid[1], FrameRate(1.0)
    for number, chosen in ((None, fps), (4, 4)):
        options = ProcessorOptions(video_frames=number)
        assert model.processor.with_options(options).chosen_frames == chosen
        assert Service(model, ServeSettings(model_name="a", video_frames=number)).processor.chosen_frames == chosen
        settings = BatchSettings(prompt="a", video_frames=number)
        assert Answerer(model, settings).processor.chosen_frames == chosen
    options = ProcessorOptions(video_frames=4, video_fps=2)
    assert model.processor.with_options(options).chosen_frames == FrameRate(2)
    assert model.processor.with_options(ProcessorOptions(video_fps=0)).chosen_frames == 16


def test_two_placeholders_of_one_video_are_refused(vid):
    request = {"messages": [{"role": "user", "content": "<video><video> what"}], "video": [tiny.picture(40, 60)]}
    with pytest.raises(RequestError, match="2 <video> placeholders and 1 were given"):
        vid[1].prepare([request])


def test_the_last_tokens_of_a_long_question_are_read(vid):
    model = vid[1]
    plan = model.processor.prepare([{"prompt": "<image>" + "ab" * 200 + "?", "images": [tiny.picture(9, 9)]}]).plan
    (ids,) = plan.column("instruction")
    assert len(ids) == 256
    assert question_tokenizer().decode(ids) == f"[CLS]{'ab' * 200}?"[:5] + ("ab" * 200 + "?")[-254:] + "[SEP]"


def test_rope_is_stretched_as_config_says(vid):
    decoder = vid[1].config.decoder
    assert (decoder.rope.kind, decoder.rope.factor, decoder.context_length) == ("linear", 16.0, 65536)
    assert vid[1].processor.max_rows == 65536


def test_saved_it_is_the_same_to_the_bit(vid, tmp_path):
    folder, model, _ = vid
    llava_fast.save(model, tmp_path / "saved", layout="original")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == CONFIG
    stored, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert stored.keys() == {name for name in expected if not name.endswith("position_ids")}
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    again = llava_fast.load(tmp_path / "saved")
    assert again.config == model.config
    assert again.connector_tokenizer.get_vocab() == model.connector_tokenizer.get_vocab()
    model.config, kept = replace(model.config, source={}), model.config
    llava_fast.save(model, tmp_path / "anew", layout="original")
    model.config = kept
    assert load_checkpoint(tmp_path / "anew").config == model.config
    with pytest.raises(CheckpointError, match="llama_vid has no other layout than 'original'"):
        llava_fast.save(model, tmp_path / "hf", layout="hf")


def test_the_tower_may_be_in_lavis_own_file(vid, tmp_path):
    """With a 40th layer and a head, and positions of another size."""
    folder, model, _ = vid
    shutil.copytree(folder, tmp_path / "copy")
    stored = load_file(folder / "model.safetensors")
    start = "model.vision_tower.vision_tower."
    own = {name.removeprefix(start): stored.pop(name) for name in list(stored) if name.startswith(start)}
    save_file(stored, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lacks its tower's weights, and .*eva_vit_g.pth does not exist; give vis"
    ):
        llava_fast.load(tmp_path / "copy")
    more = {name.replace("blocks.2", "blocks.3"): value for name, value in own.items() if "blocks.2" in name}
    torch.save(
        own | more | {"norm.weight": torch.ones(32), "head.weight": torch.ones(3, 32)}, tmp_path / "eva_vit_g.pth"
    )
    again = llava_fast.load(tmp_path / "copy", vision_tower=tmp_path / "eva_vit_g.pth")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    larger = {**lavis.TOWER, "image_size": 48}
    edit_json(tmp_path / "copy" / "config.json", vision_config=larger)
    grown = llava_fast.load(tmp_path / "copy", vision_tower=tmp_path).vision_tower.embeddings.position_embedding
    planes = own["pos_embed"][:, 1:].reshape(1, SIDE, SIDE, 32).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(grown[0, 1:], planes.reshape(36, 32))
    assert torch.equal(grown[0, 0], own["pos_embed"][0, 0])
    for shape in ((1, 1 + SIDE**2 + 1, 32), (1, 1, 32), (1, 1 + SIDE**2, 16), (1 + SIDE**2, 32)):
        torch.save(own | {"pos_embed": torch.ones(shape)}, tmp_path / "eva_vit_g.pth")
        with pytest.raises(CheckpointError, match=r"eva_vit_g.pth: pos_embed is .*; an EVA's positions are \[1, 1"):
            llava_fast.load(tmp_path / "copy", vision_tower=tmp_path)


def test_a_new_one_is_assembled_from_lavis_files(vid, tmp_path, monkeypatch):
    _, model, parts = vid
    parts.llama.save_pretrained(tmp_path / "vicuna")
    tiny.tokenizer().save_pretrained(tmp_path / "vicuna")
    question_tokenizer().save_pretrained(tmp_path / "vicuna" / "qformer_tokenizer")
    torch.save(lavis.tower_tensors(dict(parts.tower.named_parameters())), tmp_path / "eva_vit_g.pth")
    qformer = lavis.qformer_tensors(dict(parts.qformer.named_parameters()))
    file = {f"Qformer.bert.{name}": value for name, value in qformer.items()} | {"llm_proj.weight": torch.ones(2, 2)}
    file |= {"query_tokens": parts.query, "ln_vision.weight": parts.ln.weight, "ln_vision.bias": parts.ln.bias}
    torch.save({"model": {name: value.detach() for name, value in file.items()}}, tmp_path / "instruct_blip.pth")
    fields = LlamaVid.assembled_fields
    sizes = {"vision_config": lavis.TOWER, "qformer_config": lavis.QFORMER | WORDS, "num_query": QUERIES}
    monkeypatch.setattr(LlamaVid, "assembled_fields", lambda *given: fields(*given) | sizes)
    named = {"decoder": str(tmp_path / "vicuna"), "vision_tower": str(tmp_path / "eva_vit_g.pth")}
    made = llava_fast.load(Assembly(**named, qformer_from=str(tmp_path / "instruct_blip.pth"), compress="mean"))
    fresh = ("projector.content.", "projector.key.", "projector.value.", "projector.qformer.language_projection.")
    for name, parameter in model.named_parameters():
        assert torch.equal(made.get_parameter(name), parameter) == (not name.startswith(fresh)), name
    turns = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "hello"}]
    assert made(made.prepare([{"messages": turns, "images": [tiny.picture(9, 9)]}], labels=True)).loss > 0
    torch.save({"query": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="has no query_tokens: give LAVIS' InstructBLIP"):
        llava_fast.load(Assembly(**named, qformer_from=str(tmp_path / "other.pth")))
    with pytest.raises(
        CheckpointError,
        match=r"compress and model\.image_size need a connector that reads text: give model.qformer_from",
    ):
        llava_fast.load(Assembly(**named, compress="mean"))


def test_the_published_sizes(tmp_path):
    published = {key: value for key, value in CONFIG.items() if key not in ("vision_config", "qformer_config")}
    published |= {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_query": 32}
    published |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    published |= {"mm_hidden_size": 1408, "image_processor": "./llamavid/processor/clip-patch14-224"}
    for processor, compress, rows in (
        ("224", "mean", 2),
        ("224", None, 257),
        ("336", None, 577),
        ("224", "grid:4", 17),
    ):
        published |= {"image_processor": f"./llamavid/processor/clip-patch14-{processor}", "compress_type": compress}
        (tmp_path / "config.json").write_text(json.dumps(published))
        config, tower = read_config(tmp_path)
        assert llava_fast.count_tokens(config, 480, 640) == rows
    assert str(tower.home) == "model_zoo/LAVIS/eva_vit_g.pth"
    with torch.device("meta"):
        model = LlavaModel(config)
    names = {family_of_config(config).names.to_stored(name, "original", config) for name in model.state_dict()}
    assert model.config.vision.layers_needed == 39
    assert {
        "model.vision_tower.vision_tower.blocks.38.attn.v_bias",
        "model.vlm_att_encoder.bert.embeddings.word_embeddings.weight",
        "model.vlm_att_encoder.bert.encoder.layer.11.attention.self.query.weight",
        "model.vlm_att_encoder.bert.encoder.layer.10.crossattention.output.LayerNorm.weight",
        "model.vlm_att_encoder.bert.encoder.layer.11.output.dense.bias",
        "model.vlm_att_query",
        "model.vlm_att_val_projector.weight",
        "model.mm_projector.2.bias",
    } <= names
    assert model.projector.qformer.embeddings.word_embeddings.weight.shape == (30523, 768)


def test_doctor_says_that_transformers_has_none(vid):
    with pytest.raises(CheckpointError, match="transformers has no LLaMA-VID, so there is nothing"):
        report(str(vid[0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bert_type": "raw_bert_layer:2"}, "bert_type is 'raw_bert_layer:2'; supported are qformer_pretrain"),
        ({"compress_type": "grid:1"}, "compress_type is 'grid:1'; supported are null, 'mean' and 'grid:N'"),
        ({"compress_type": "grid:9"}, "4 by 4 patches have no grid of 9 by 9 means"),
        (
            {"mm_vision_tower": "openai/clip-vit-large-patch14"},
            "mm_vision_tower is 'openai/clip-vit-large-patch14'; supp",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; supported for a LLaMA-VID is mlpNx_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, and EVA's tower has 32"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; supported are square, pad"),
        ({"vision_config": None, "image_processor": "clip"}, "image_processor 'clip' does not end in the side"),
    ],
)
def test_what_it_cannot_be_is_refused(vid, tmp_path, change, said):
    shutil.copytree(vid[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "copy")


@pytest.mark.parametrize("images", [np.zeros((4, 4, 3), np.uint8), 3, "a"], ids=["array", "number", "text"])
def test_images_that_are_no_list_are_refused(vid, images):
    with pytest.raises(RequestError, match='"images" must be a list'):
        vid[1].prepare([{"messages": [{"role": "user", "content": "<image> what?"}], "images": images}])
