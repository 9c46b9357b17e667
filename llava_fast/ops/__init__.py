"""The fused ops. Each can be called on its own: it validates its arguments and runs on the chosen backend."""

from llava_fast.ops.assemble_inputs import assemble_inputs
from llava_fast.ops.backend import use_backend
from llava_fast.ops.decoder_step import decoder_step
from llava_fast.ops.image import image_tiles
from llava_fast.ops.layer_norm import add_layer_norm, double_layer_norm, layer_norm
from llava_fast.ops.linear import linear
from llava_fast.ops.linear_act import linear_act
from llava_fast.ops.linear_cross_entropy import linear_cross_entropy
from llava_fast.ops.mix_rows import mix_rows
from llava_fast.ops.packed_attention import packed_attention
from llava_fast.ops.paged_attention import paged_attention
from llava_fast.ops.patch_embed import patch_embed
from llava_fast.ops.quantised_linear import QuantisedWeight, quantised_linear
from llava_fast.ops.rms_norm import add_rms_norm, rms_norm
from llava_fast.ops.rope import rope
from llava_fast.ops.scaled_linear import scaled_linear
from llava_fast.ops.swiglu import swiglu
from llava_fast.ops.token_pack import token_pack

__all__ = [
    "QuantisedWeight",
    "add_layer_norm",
    "add_rms_norm",
    "assemble_inputs",
    "decoder_step",
    "double_layer_norm",
    "image_tiles",
    "layer_norm",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "mix_rows",
    "packed_attention",
    "paged_attention",
    "patch_embed",
    "quantised_linear",
    "rms_norm",
    "rope",
    "scaled_linear",
    "swiglu",
    "token_pack",
    "use_backend",
]
