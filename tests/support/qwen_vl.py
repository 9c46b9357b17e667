"""Tiny Qwen-VLs and Monkeys as the published code writes them, and what that code computes, in plain PyTorch."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from llava_fast.checkpoints.tiktoken import FORMS

MERGES = [b"he", b"ll", b"hell", b"hello", b" t", b" the", b" a", b"\n\n", b"us", b"er", b" f", b"oo", b" foo"]
RANKS = [bytes([byte]) for byte in range(256)] + MERGES
CONTROL = [token for token, _ in FORMS["qwen.tiktoken"].control]
IMG = len(RANKS) + CONTROL.index("<img>")
END = len(RANKS)
WIDTH, TOWER, PATCH, QUERIES, LAYERS = 128, 32, 14, 4, 2
SEQ_LENGTH, MOST = 80, 320
CUT = "\0"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def config(monkey: bool) -> dict:
    return {
        "architectures": ["MonkeyLMHeadModel" if monkey else "QWenLMHeadModel"],
        "model_type": "monkey" if monkey else "qwen",
        "bf16": False,
        "fp32": True,
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "kv_channels": 32,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": MOST,
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": SEQ_LENGTH,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "visual": {
            "heads": 4,
            "image_size": 112 if monkey else 56,
            "image_start_id": IMG,
            "layers": LAYERS,
            "mlp_ratio": 1.9231,
            "n_queries": QUERIES,
            "output_dim": WIDTH,
            "patch_size": PATCH,
            "width": TOWER,
            **({"lora_repeat_num": 4} if monkey else {}),
        },
        "vocab_size": len(RANKS) + len(CONTROL) + 4,
    }


def shapes(monkey: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of such a checkpoint."""
    rows, inner = config(monkey)["vocab_size"], int(TOWER * 1.9231)
    found = {
        "transformer.wte.weight": (rows, WIDTH),
        "lm_head.weight": (rows, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        found |= {f"{at}ln_1.weight": (WIDTH,), f"{at}ln_2.weight": (WIDTH,)}
        found |= {f"{at}attn.c_attn.weight": (3 * WIDTH, WIDTH), f"{at}attn.c_attn.bias": (3 * WIDTH,)}
        found |= {f"{at}attn.c_proj.weight": (WIDTH, WIDTH), f"{at}mlp.c_proj.weight": (WIDTH, 96)}
        found |= {f"{at}mlp.w1.weight": (96, WIDTH), f"{at}mlp.w2.weight": (96, WIDTH)}
    see = "transformer.visual."
    found |= {f"{see}conv1.weight": (TOWER, 3, PATCH, PATCH), f"{see}positional_embedding": (256, TOWER)}
    norms = {"ln_pre": TOWER, "ln_post": WIDTH, "attn_pool.ln_q": WIDTH, "attn_pool.ln_kv": WIDTH}
    linears = {}
    for layer in range(LAYERS):
        at = f"transformer.resblocks.{layer}."
        norms |= {f"{at}ln_1": TOWER, f"{at}ln_2": TOWER}
        linears |= {f"{at}attn.in_proj": (3 * TOWER, TOWER), f"{at}attn.out_proj": (TOWER, TOWER)}
        linears |= {f"{at}mlp.c_fc": (inner, TOWER), f"{at}mlp.c_proj": (TOWER, inner)}
        for window in range(4 if monkey else 0):
            for name, out, rank in (("attn.in_proj", 3 * TOWER, 16), ("attn.out_proj", TOWER, 16), ("mlp", TOWER, 32)):
                adapter = f"{see}{at}{name}_lora.{window}."
                found |= {f"{adapter}lora_a.weight": (rank, TOWER), f"{adapter}lora_b.weight": (out, rank)}
                found[f"{adapter}lora_scale"] = (1,)
    found |= {f"{see}{name}.{leaf}": (size,) for name, size in norms.items() for leaf in ("weight", "bias")}
    found |= {f"{see}{name}.weight": size for name, size in linears.items()}
    found |= {f"{see}{name}.bias": size[:1] for name, size in linears.items()}
    pool = {"query": (QUERIES, WIDTH), "pos_embed": (QUERIES, WIDTH), "kv_proj.weight": (WIDTH, TOWER)}
    pool |= {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
    pool |= {"attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,)}
    return found | {f"{see}attn_pool.{name}": size for name, size in pool.items()} | {f"{see}proj": (WIDTH, WIDTH)}


def write(folder: Path, monkey: bool = False, chat_format: str | None = "chatml", seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with random weights; returns its tensors, which require gradients."""
    torch.manual_seed(seed)
    tensors = {}
    for name, shape in shapes(monkey).items():
        one = float(("ln_" in name and name.endswith("weight")) or name.endswith("lora_scale"))
        scale = 0.2 if len(shape) > 1 else 0.1
        tensors[name] = torch.randn(shape) * (3 if name.endswith("wte.weight") else 1) * scale + one
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(monkey)))
    words = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(RANKS))
    (folder / "qwen.tiktoken").write_text(words)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}')
    generation = {"eos_token_id": END, "pad_token_id": END} | ({} if monkey else {"chat_format": chat_format})
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return {name: value.clone().requires_grad_() for name, value in tensors.items()}


@dataclass(frozen=True)
class Published:
    """What the published code computes with these tensors."""

    w: dict[str, Tensor]
    monkey: bool

    def _norm(self, x: Tensor, name: str) -> Tensor:
        name = f"transformer.visual.{name}"
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        name = f"transformer.visual.{name}"
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _adapted(self, x: Tensor, name: str, window: int | None) -> Tensor | float:
        if window is None:
            return 0.0
        at = f"transformer.visual.{name}_lora.{window}."
        down, up = self.w[f"{at}lora_a.weight"], self.w[f"{at}lora_b.weight"]
        return F.linear(F.linear(x, down), up) * self.w[f"{at}lora_scale"]

    def view(self, pixels: Tensor, window: int | None = None) -> Tensor:
        """The rows [Q, C] of one view [3, S, S], normalised; `window`: with its low-rank weights."""
        x = F.conv2d(pixels[None], self.w["transformer.visual.conv1.weight"], stride=PATCH)
        side = x.shape[-1]
        table = self.w["transformer.visual.positional_embedding"].reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
        x = x + F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        x = self._norm(x.flatten(2)[0].T, "ln_pre")
        for layer in range(LAYERS):
            at = f"transformer.resblocks.{layer}."
            normed = self._norm(x, f"{at}ln_1")
            joined = self._linear(normed, f"{at}attn.in_proj") + self._adapted(normed, f"{at}attn.in_proj", window)
            query, key, value = joined.view(-1, 4, 3 * TOWER // 4).split(TOWER // 4, dim=-1)
            scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(TOWER // 4)
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
            x = x + self._linear(mixed, f"{at}attn.out_proj") + self._adapted(mixed, f"{at}attn.out_proj", window)
            inner = F.gelu(self._linear(self._norm(x, f"{at}ln_2"), f"{at}mlp.c_fc"))
            x = x + self._linear(inner, f"{at}mlp.c_proj") + self._adapted(x, f"{at}mlp", window)
        return self._resampled(x, side)

    def _resampled(self, x: Tensor, side: int) -> Tensor:
        pool = {name: self.w[f"transformer.visual.attn_pool.{name}"] for name in ("query", "pos_embed")}
        value = self._norm(self._linear(x, "attn_pool.kv_proj"), "attn_pool.ln_kv")
        grid = math.isqrt(QUERIES)
        table = pool["pos_embed"].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        query = self._norm(pool["query"], "attn_pool.ln_q") + pool["pos_embed"]
        at = "transformer.visual.attn_pool.attn."
        weights, biases = (self.w[f"{at}in_proj_{leaf}"].chunk(3) for leaf in ("weight", "bias"))
        given = (query, value + table.flatten(2)[0].T, value)
        query, key, value = (F.linear(*each) for each in zip(given, weights, biases, strict=True))  # one head of 128
        out = ((query @ key.T) / math.sqrt(WIDTH)).softmax(-1) @ value
        out = F.linear(out, self.w[f"{at}out_proj.weight"], self.w[f"{at}out_proj.bias"])
        return self._norm(out, "ln_post") @ self.w["transformer.visual.proj"]

    def picture(self, picture: np.ndarray) -> Tensor:
        """The rows of a picture."""
        size = 112 if self.monkey else 56
        squashed = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(squashed).copy()).permute(2, 0, 1) / 255 - MEAN) / STD
        if not self.monkey:
            return self.view(pixels)
        views = [pixels[:, top : top + 56, left : left + 56] for top in (0, 56) for left in (0, 56)]
        rows = [self.view(view, number) for number, view in enumerate(views)]
        return torch.cat([*rows, self.view(F.interpolate(pixels[None], size=(56, 56), mode="bicubic")[0])])

    def rows(self, words, prompt: str, pictures: list) -> Tensor:
        """The decoder's inputs for a prompt with <image> in the places of pictures. What CUT separates is tokenised
        apart."""
        table, made = self.w["transformer.wte.weight"], []
        for number, chunk in enumerate(prompt.split("<image>")):
            ids = [IMG + 1] if number else []
            for part in chunk.split(CUT):
                ids += words(part, add_special_tokens=False)["input_ids"]
            ids += [IMG] if number < len(pictures) else []
            made.append(table[torch.tensor(ids, dtype=torch.long)])
            if number < len(pictures):
                made.append(self.picture(pictures[number]))
        return torch.cat(made)

    def logits(self, x: Tensor, prompt: int | None = None, training: bool = False) -> Tensor:
        """[rows, vocabulary] of the decoder's inputs; `prompt`: how many of them are the prompt, default all."""
        length, heads = len(x), 4
        alpha = 1.0
        if not training:
            alpha = max(2 ** math.ceil(math.log2((prompt or length) / SEQ_LENGTH) + 1) - 1, 1)
        size = WIDTH // heads
        base = 10000.0 * alpha ** (size / (size - 2))
        angles = torch.outer(torch.arange(length).float(), 1.0 / base ** (torch.arange(0, size, 2).float() / size))
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        far = [
            math.log(place, SEQ_LENGTH) if place > SEQ_LENGTH and not training else 1.0
            for place in range(1, length + 1)
        ]

        def turned(rows: Tensor) -> Tensor:
            first, second = rows.chunk(2, dim=-1)
            return rows * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

        def normed(rows: Tensor, name: str) -> Tensor:
            return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w[f"transformer.{name}.weight"]

        mask = torch.full((length, length), -math.inf).triu(1)
        for layer in range(LAYERS):
            w = {name.removeprefix(f"transformer.h.{layer}."): value for name, value in self.w.items()}
            joined = F.linear(normed(x, f"h.{layer}.ln_1"), w["attn.c_attn.weight"], w["attn.c_attn.bias"])
            query, key, value = (part.view(length, heads, size) for part in joined.split(WIDTH, dim=-1))
            query, key = turned(query) * torch.tensor(far)[:, None, None], turned(key)
            scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(size) + mask
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
            x = x + F.linear(mixed, w["attn.c_proj.weight"])
            inner = normed(x, f"h.{layer}.ln_2")
            inner = F.linear(inner, w["mlp.w1.weight"]) * F.silu(F.linear(inner, w["mlp.w2.weight"]))
            x = x + F.linear(inner, w["mlp.c_proj.weight"])
        return F.linear(normed(x, "ln_f"), self.w["lm_head.weight"])

    @torch.no_grad()
    def greedy(self, rows: Tensor, tokens: int) -> tuple[list[int], Tensor]:
        """The answer to the prompt with these rows, and the logits of its steps."""
        found: list[int] = []
        steps, x = [], rows
        for _ in range(tokens):
            steps.append(self.logits(x, len(rows))[-1])
            found.append(int(steps[-1].argmax()))
            x = torch.cat([x, self.w["transformer.wte.weight"][found[-1:]]])
        return found, torch.stack(steps)
