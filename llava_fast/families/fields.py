"""Schemas of a checkpoint's JSON files: type and bounds (see storage.bounds) of each field that has an effect."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from llava_fast.models.towers.base import VisionFields
from llava_fast.storage.bounds import Layers, Pixels, Positive, Size
from llava_fast.storage.files import Fields

Side = Annotated[int, Field(ge=0, le=2**16)]
Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
Positions = Annotated[int, Field(ge=1, le=2**31)]
TokenId = Annotated[int, Field(ge=-(2**24), le=2**24)]  # -200 stands for an image, -1 for no padding
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
Pinpoint = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=2, max_length=2)]
Pinpoints = Annotated[list[Pinpoint], Field(max_length=4096)]
Layer = Annotated[int, Field(ge=-1024, le=1024)]
FeatureLayers = Layer | Annotated[list[Layer], Field(min_length=1, max_length=64)]
Labels = Annotated[int, Field(ge=0, le=2**12)]  # number of a classifier's labels, for which transformers builds a table


class NamedTemplate(Fields):
    """One of a list of chat templates."""

    name: str
    template: str


class AddedToken(Fields):
    """A token with what the tokenizer does around it."""

    content: str


SpecialToken = str | AddedToken
ChatTemplate = str | dict[str, str] | list[NamedTemplate]


class Tower(VisionFields):
    """A CLIP or SigLIP vision config."""

    num_labels: Labels | None = None
    num_channels: Annotated[int, Field(ge=3, le=3)] = 3


class Rope(Fields):
    """rope_parameters, or rope_scaling of older files."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Positions | None = None


class Decoder(Fields):
    """A Llama, Mistral, Qwen2 or Qwen3 config."""

    num_labels: Labels | None = None
    model_type: str | None = None
    vocab_size: Vocabulary
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str
    max_position_embeddings: Positions
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=1024)] | None = None
    layer_types: Annotated[list[str], Field(max_length=1024)] | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None


class TowerHome(Tower):
    """config.json of a tower's own repository: that of the tower alone, or of a whole CLIP or SigLIP."""

    vision_config: Tower | None = None


class HfConfig(Fields):
    """config.json in Hugging Face's layout."""

    num_labels: Labels | None = None
    model_type: str | None = None
    text_config: Decoder | None = None
    vision_config: Tower | None = None
    image_token_id: TokenId | None = None
    image_token_index: TokenId | None = None
    video_token_id: TokenId | None = None
    video_token_index: TokenId | None = None
    vision_feature_layer: FeatureLayers | None = None
    vision_feature_select_strategy: str | None = None
    projector_hidden_act: str | None = None
    multimodal_projector_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    image_grid_pinpoints: Pinpoints | None = None
    spatial_pool_mode: str | None = None
    spatial_pool_stride: Annotated[int, Field(ge=1, le=1024)] | None = None
    vision_aspect_ratio: str | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    quantization_config: dict[str, Any] | None = None


class OriginalConfig(Decoder):
    """config.json of an original LLaVA: a decoder's with additional mm_ fields."""

    mm_vision_tower: str | None = None
    mm_vision_select_layer: Layer = -2
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "linear"
    mm_patch_merge_type: str = "flat"
    mm_resampler_type: str | None = None
    mm_spatial_pool_mode: str | None = None
    mm_spatial_pool_stride: Annotated[int, Field(ge=0, le=1024)] | None = None
    mm_newline_position: str = "one_token"
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: Annotated[str, Field(max_length=2**16)] | Pinpoints | None = None
    quantization_config: dict[str, Any] | None = None


class Generation(Fields):
    """generation_config.json."""

    eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=1024)] | None = None
    pad_token_id: TokenId | None = None


class ImageProcessor(Fields):
    """preprocessor_config.json, video_preprocessor_config.json, and the sections of processor_config.json: every field
    that transformers reads there. Those after image_grid_pinpoints have no effect here."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    video_processor_type: str | None = None
    do_convert_rgb: bool | None = None
    do_resize: bool | None = None
    size: Side | Sides | dict[str, Side | None] | None = None
    default_to_square: bool | None = None
    use_square_size: bool | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None  # transformers treats any string as bilinear
    do_center_crop: bool | None = None
    crop_size: Side | Sides | dict[str, Side | None] | None = None
    do_rescale: bool | None = None
    rescale_factor: Positive | None = None
    do_normalize: bool | None = None
    image_mean: Channels | float | None = None
    image_std: Deviations | Positive | None = None
    do_pad: bool | None = None
    pad_size: Side | Sides | dict[str, Side | None] | None = None
    input_data_format: str | None = None
    do_sample_frames: bool | None = None
    image_grid_pinpoints: Pinpoints | None = None
    data_format: Any = None
    return_tensors: Any = None
    device: Any = None
    disable_grouping: Any = None
    image_seq_length: Any = None
    processor_class: Any = None
    auto_map: Any = None
    fps: Any = None
    num_frames: Any = None
    video_metadata: Any = None
    return_metadata: Any = None


class Processor(Fields):
    """processor_config.json. Fields that determine the number of tokens of an image must agree with config.json."""

    patch_size: Pixels | None = None
    num_additional_image_tokens: Annotated[int, Field(ge=0, le=2**20)] | None = None
    num_image_tokens: Annotated[int, Field(ge=0, le=2**20)] | None = None
    vision_feature_select_strategy: str | None = None
    vision_aspect_ratio: str | None = None
    image_token: str | None = None
    video_token: str | None = None
    image_processor: ImageProcessor | None = None
    video_processor: ImageProcessor | None = None
    chat_template: ChatTemplate | None = None


class TemplateFile(Fields):
    """chat_template.json."""

    chat_template: ChatTemplate | None = None


class Note(Fields):
    """llava_fast.json."""

    chat_template: str | None = None


class Adapter(Fields):
    """adapter_config.json, PEFT's fields."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=0, le=2**16)] | None = None  # 0: OFT with a given block size
    lora_alpha: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None
    use_dora: bool | None = None
    bias: str | None = None
    fan_in_fan_out: bool | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None
    modules_to_save: list[str] | str | None = None
    target_modules: list[str] | str | None = None


class TokenizerConfig(TemplateFile):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    auto_map: dict[str, Any] | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[str, AddedToken] | None = None
    model_max_length: Annotated[float, Field(gt=0)] | None = None  # 1e30 without a limit
    padding_side: str | None = None
    truncation_side: str | None = None
    bos_token: SpecialToken | None = None
    eos_token: SpecialToken | None = None
    unk_token: SpecialToken | None = None
    pad_token: SpecialToken | None = None


class SpecialTokens(Fields):
    """special_tokens_map.json."""

    model_config = ConfigDict(extra="allow")
    bos_token: SpecialToken | None = None
    eos_token: SpecialToken | None = None
    unk_token: SpecialToken | None = None
    pad_token: SpecialToken | None = None
    __pydantic_extra__: dict[str, SpecialToken | list[SpecialToken] | dict[str, SpecialToken] | None]


class AddedTokens(Fields):
    """added_tokens.json: tokens and their ids."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[int, Field(ge=0, le=2**24)]]
