"""Names of LAVIS' EVA tower and Q-Former, in which InternLM-XComposer and LLaMA-VID store theirs.

    ours        vision_tower.encoder.layers.0.self_attn.projection   encoder.layer.0.attention.attention.query
    LAVIS       vision_tower.blocks.0.attn.proj                      encoder.layer.0.attention.self.query

Source: salesforce/LAVIS 506965b eva_vit.py, Qformer.py.
"""

from __future__ import annotations

from llava_fast.families.names import NameMap, Spelling

_EVA = (
    (".embeddings.class_embedding", ".cls_token"),
    (".embeddings.position_embedding", ".pos_embed"),
    (".embeddings.patch_embedding.", ".patch_embed.proj."),
    (".encoder.layers.", ".blocks."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)
_QFORMER = (
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
    (".embeddings.layernorm.", ".embeddings.LayerNorm."),
)
_PARTS = {"vision_tower.": _EVA, "projector.": _QFORMER}
"""(ours, LAVIS') within the names of each part."""


class LavisNames(NameMap):
    """Rules say where the parts are; within them the names are LAVIS'."""

    def from_stored(self, stored: str) -> str | None:
        ours = super().from_stored(stored)
        for part, pairs in _PARTS.items():
            if ours is not None and ours.startswith(part):
                for mine, theirs in pairs:
                    ours = ours.replace(theirs, mine)
        return ours

    def by_rules(self, ours: str, spelling: Spelling) -> str:
        for part, pairs in _PARTS.items():
            if ours.startswith(part):
                for mine, theirs in pairs:
                    ours = ours.replace(mine, theirs)
        return super().by_rules(ours, spelling)
