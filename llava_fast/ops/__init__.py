"""The fused operations, usable on their own: each validates its arguments and runs on the chosen backend."""

from llava_fast.ops.backend import use_backend
from llava_fast.ops.decoder_step import decoder_step
from llava_fast.ops.mix_rows import mix_rows
from llava_fast.ops.patch_embed import patch_embed
from llava_fast.ops.token_pack import token_pack

__all__ = ["decoder_step", "mix_rows", "patch_embed", "token_pack", "use_backend"]
