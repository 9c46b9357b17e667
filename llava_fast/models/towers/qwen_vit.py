"""Qwen-VL's tower, OpenCLIP's ViT-bigG without its class row, and Monkey's: the same over the windows of a larger image
and the whole of it, with low-rank weights for each window.

Shapes: T tiles, N rows per view, C width, H heads, D head size, W windows of a tile, R rank. A view is an image of the
size that the positions are resized to. Parameter names are those of the published checkpoints.
Sources: Bai et al. 2023 (Qwen-VL); Li et al. 2023 (Monkey); Yuliang-Liu/Monkey 498e1d9 visual.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.blocks.by_tile import by_tile
from llava_fast.models.blocks.resampling import bicubic
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.models.towers.base import Tower
from llava_fast.models.towers.vit import ClipConfig, VitConfig, embed_patches, normalised, on_device, prepare_tiles

POSITIONS = 256
ATTENTION_RANK, MLP_RANK = 16, 32
"""Fixed in the published code, as are the positions."""


@dataclass(frozen=True, kw_only=True)
class QwenVitConfig(VitConfig):
    """Its feature is the last layer's output, without a norm; ValueError for another `feature_layers`.

    positions  number of learned positions, a square, which are resized to a view's patches.
    windows    a tile is cut into so many windows, a square number, of 1 / sqrt(windows) of its side, row by row. They
               are followed by the whole tile, shrunk to a window's size. 1: a tile is one view.
    """

    kind = "qwen_vit"
    own_normalisation = ClipConfig.own_normalisation
    hf4_prefix = ""

    positions: int = POSITIONS
    windows: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_layers != (-1,):
            raise ValueError(f"feature_layers are {self.feature_layers}: of this tower only (-1,) is supported")
        across = math.isqrt(self.windows)
        if across**2 != self.windows or self.image_size % (across * self.patch_size):
            raise ValueError(
                f"a tile of {self.image_size} pixels cannot be cut into {self.windows} square windows of whole patches "
                f"of {self.patch_size} pixels"
            )
        if math.isqrt(self.positions) ** 2 != self.positions:
            raise ValueError(f"{self.positions} positions form no square")

    @property
    def across(self) -> int:
        """Windows along one side of a tile."""
        return math.isqrt(self.windows)

    @property
    def views(self) -> int:
        """Of a tile: its windows, and the whole if there are several."""
        return self.windows + (self.windows > 1)

    @property
    def side(self) -> int:
        """Patches along one side of a view."""
        return self.image_size // self.across // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.views * self.side**2

    def attention_flops(self, tiles: int) -> float:
        return super().attention_flops(tiles) / self.views

    def build(self) -> QwenVit:
        return QwenVit(self)


class LowRank(nn.Module):
    """lora_scale * x A^T B^T: what one window adds to a Linear's result. Its dropout (0.05 in training) is not
    applied."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_scale = nn.Parameter(torch.ones(1))
        self.lora_a = nn.Linear(in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_b(self.lora_a(x)) * self.lora_scale


class LowRanks(nn.ModuleList):
    """One LowRank for each window; none: nothing is added."""

    def __init__(self, config: QwenVitConfig, out_features: int, rank: int) -> None:
        windows = config.windows if config.windows > 1 else 0
        super().__init__(LowRank(config.hidden_size, out_features, rank) for _ in range(windows))

    def add(self, out_TNC: Tensor, x_TNC: Tensor) -> Tensor:
        """`out`, which may be overwritten, and what each window adds for its x. The views of a tile are consecutive,
        its windows first; views that make no whole tile are padding. A tile's windows are one batched product, unless
        a module is wrapped or hooked."""
        if not len(self):
            return out_TNC
        views = len(self) + 1
        whole = len(x_TNC) // views * views
        sets = [each for each in self if fused.is_untouched(each, LowRank) and _are_plain(each)]
        if len(sets) == len(self):
            down = torch.stack([each.lora_a.weight.T for each in sets])
            up = torch.stack([each.lora_b.weight.T * each.lora_scale for each in sets])
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x_TNC.device.type):
                for first in range(0, whole, views):
                    windows = slice(first, first + len(self))
                    out_TNC[windows].baddbmm_(x_TNC[windows] @ down, up)
                return out_TNC
            more_IWNC = self._windows(x_TNC[:whole]) @ down @ up
        else:
            each_INC = self._windows(x_TNC[:whole]).unbind(1)
            more_IWNC = torch.stack([one(x) for one, x in zip(self, each_INC, strict=True)], dim=1)
        more = F.pad(more_IWNC, (0, 0, 0, 0, 0, 1)).flatten(0, 1)  # not in place: recomputation saves some products
        return torch.cat([out_TNC[:whole] + more, out_TNC[whole:]]) if whole < len(x_TNC) else out_TNC + more

    def _windows(self, x_TNC: Tensor) -> Tensor:
        """[images, W, N, C]: without the whole image of each."""
        return x_TNC.unflatten(0, (-1, len(self) + 1))[:, :-1]


def _are_plain(adapter: LowRank) -> bool:
    return all(fused.is_plain(linear, nn.Linear) for linear in (adapter.lora_a, adapter.lora_b))


class QwenVitAttention(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.in_proj_lora = LowRanks(config, 3 * width, ATTENTION_RANK)
        self.out_proj = nn.Linear(width, width)
        self.out_proj_lora = LowRanks(config, width, ATTENTION_RANK)

    def forward(self, x_TNC: Tensor) -> Tensor:
        joined = self.in_proj_lora.add(self.in_proj(x_TNC), x_TNC)
        query, key, value = joined.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        out_TNC = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.out_proj_lora.add(self.out_proj(out_TNC), out_TNC)


class QwenVitMLP(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(fused.activated(x, self.c_fc, self.activation))


class QwenVitLayer(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = QwenVitAttention(config)
        self.mlp = QwenVitMLP(config)
        self.mlp_lora = LowRanks(config, config.hidden_size, MLP_RANK)

    def forward(self, x_TNC: Tensor, before: nn.Module | None = None) -> Tensor:
        """The layer on x, or on `before`(x). A window's low-rank weights beside the MLP read the residual stream, not
        its norm."""
        if before is not None:
            x_TNC, normed_TNC = fused.norm_norm(x_TNC, before, self.ln_1)
        else:
            x_TNC, normed_TNC = fused.add_norm(x_TNC, None, self.ln_1)
        x_TNC, normed_TNC = fused.add_norm(x_TNC, self.attn(normed_TNC), self.ln_2)
        return x_TNC + self.mlp_lora.add(by_tile(self.mlp, normed_TNC), x_TNC)


class QwenVitLayers(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(QwenVitLayer(config) for _ in range(config.num_layers))


class QwenVit(Tower):
    """uint8 tiles (or normalised float ones) to the last layer's rows."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.config: QwenVitConfig = config
        width = config.hidden_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(config.positions, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = QwenVitLayers(config)
        self.recompute: Recompute = "none"

    def forward(self, tiles: Tensor, count: Tensor | None = None) -> Tensor:
        """[T, 3, S, S] uint8 or normalised float -> [T, views * N, C], in the weights' dtype."""
        x_TNC = torch.cat(list(self._embedded(tiles, count)), dim=1)
        x_TNC = x_TNC.unflatten(1, (self.config.views, -1)).flatten(0, 1)
        before: nn.Module | None = self.ln_pre
        for layer in self.transformer.resblocks:
            x_TNC = run_layer(self.recompute, layer, x_TNC, before)
            before = None
        return x_TNC.unflatten(0, (-1, self.config.views)).flatten(1, 2)

    def _embedded(self, tiles: Tensor, count: Tensor | None) -> Iterator[Tensor]:
        """The rows [T, views * N, C] of each tile's windows, then [T, N, C] of the whole, with positions."""
        config = self.config
        grid, across = (config.side, config.side), config.across
        positions: Tensor = self.positional_embedding
        if (size := math.isqrt(config.positions)) != config.side:
            positions = bicubic(positions.unflatten(0, (size, size)), grid)
        prepared, mean, std = prepare_tiles(config, tiles, positions)
        if across == 1:
            yield embed_patches(self.conv1, prepared, positions, None, mean, std, count)
            return
        cut = prepared.unflatten(2, (across, -1)).unflatten(4, (across, -1)).permute(0, 2, 4, 1, 3, 5)
        many = None if count is None else count * config.windows
        rows = embed_patches(self.conv1, cut.flatten(0, 2).contiguous(), positions, None, mean, std, many)
        yield rows.unflatten(0, (-1, config.windows)).flatten(1, 2)
        window = config.image_size // across
        floats = _floats(config, tiles)  # shrunk unrounded, as in the original: this is not a uint8 tile
        whole = F.interpolate(floats, size=(window, window), mode="bicubic").to(positions.dtype)
        yield embed_patches(self.conv1, whole, positions, None, mean, std, count)

    def unused(self) -> list[nn.Module]:
        return []


def _floats(config: QwenVitConfig, tiles: Tensor) -> Tensor:
    """The tiles normalised, in float32."""
    mean, std = (on_device(values, tiles.device) for values in config.normalisation)
    return normalised(tiles, mean, std, torch.float32).float()


def to_visual(config: QwenVitConfig) -> dict[str, Any]:
    """The tower's fields of a published config.json's section `visual`."""
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * round(ratio, 4)) == config.intermediate_size:
        ratio = round(ratio, 4)
    elif int(config.hidden_size * ratio) < config.intermediate_size:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "heads": config.num_heads,
        "image_size": config.image_size,
        "layers": config.num_layers,
        "mlp_ratio": ratio,
        "patch_size": config.patch_size,
        "width": config.hidden_size,
    }
