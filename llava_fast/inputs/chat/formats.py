"""The chat formats of the LLaVA family as data: every literal string around a system, user or answer text.

Read in the public sources llava/conversation.py and llava/train/train.py of haotian-liu/LLaVA (branch main,
c121f04) and LLaVA-VL/LLaVA-NeXT (main; the files as of 7315dc1 and 45f2d92). `chat.py` renders them.

Which tokens the original trainers supervise (their preprocess_* functions):

- plain: everything after `<image>`, that is the caption and "\n". The human text of the sample is dropped. A
  sample must be one question with an image and one answer, and only "\n" ends the answer.
- v1 (vicuna), llama_2 and mistral, mpt (chatml_direct): the answer with the space before it, and the token
  that ends the turn. They find it by tokenising each round again; if the lengths differ they print
  "tokenization mismatch" and drop every label of the sample.
- qwen (LLaVA-NeXT): the whole assistant turn with `<|im_start|>assistant\n` and the last newline. In addition every
  token that is `<|im_start|>`, `<|im_end|>` or a single newline (id 198), at any position: also in system and
  user turns, even a newline inside the user's text.
- llama_v3 (LLaVA-NeXT): the whole assistant turn with its header, and every `<|begin_of_text|>`,
  `<|start_header_id|>`, `<|end_header_id|>` and `<|eot_id|>`. "\n\n" is on its list too, but without effect: it is
  looked up as a vocabulary string, and a byte-level vocabulary spells newlines "Ċ".
- qwen_vl (Qwen-VL's finetune.py): the answer, and every `<|im_start|>` and `<|im_end|>` with the newline after it, of
  all turns; roles are not.
- monkey (finetune_multitask.py): the answer and the end token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llava_fast.errors import RequestError


@dataclass(frozen=True)
class TurnFormat:
    """One chat format. Pairs are the literal text before and after what they wrap.

    `system` is the default system prompt: "" writes no system part, None means that the format does not support
    one. `answer` wraps the text that the model generates, so its second string contains the end of turn;
    `assistant_header` is the generation prompt before it.
    """

    name: str
    aliases: tuple[str, ...]
    stop: tuple[str, ...]
    user: tuple[str, str]
    answer: tuple[str, str]
    assistant_header: str = ""
    after_answer: str = ""
    system: str | None = ""
    system_wrap: tuple[str, str] = ("", "")
    system_inside_user: bool = False  # the system part is inside the first user turn (Llama 2)
    start: str = ""  # before everything else
    before_later_users: str = ""  # before every user turn but the first
    strip_text: bool = False  # strip white space at both ends of texts, like `| trim` in the source template
    placeholders_only: bool = False  # keep only the image placeholders of a user turn
    placeholders_first: bool = False  # put those of a user turn before its literal text, and strip the rest
    placeholders_lead: bool = False  # put those of a user turn at the beginning of its text, and strip the rest
    # If not empty, the original trainer supervises whole assistant turns, and these tokens at any position.
    original_label_tokens: tuple[str, ...] = ()
    original_header: bool = True  # with those, also the assistant's header
    picture: str = ""  # replaces each image's placeholder, with the number of the image in the conversation
    cuts: tuple[str, ...] = ()  # texts of these roles are tokenised apart from what precedes them


_VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)

_PLAIN = TurnFormat(
    name="plain",
    aliases=("v0_plain",),
    stop=("\n",),
    system=None,
    user=("", ""),
    answer=("", "\n"),
    placeholders_only=True,
)
_VICUNA_V1 = TurnFormat(
    name="vicuna_v1",
    aliases=("v1",),
    stop=("</s>",),
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_wrap=("", " "),
    user=("USER: ", " "),
    assistant_header="ASSISTANT:",
    answer=(" ", "</s>"),
)
# LLaVA-1.5 and 1.6 are trained and evaluated with vicuna_v1, but the original command line uses this one.
_LLAVA_V1 = replace(
    _VICUNA_V1,
    name="llava_v1",
    aliases=(),
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
)
# No "<s>" before the first turn: the tokeniser adds it. The source writes it and strips it again.
_LLAMA_2 = TurnFormat(
    name="llama_2",
    aliases=(),
    stop=("</s>",),
    system="You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
    "in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
    "instead of answering something not correct. If you don't know the answer to a question, please "
    "don't share false information.",
    system_wrap=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    system_inside_user=True,
    user=("[INST] ", " [/INST]"),
    before_later_users="<s>",
    answer=(" ", " </s>"),
)
_LLAVA_LLAMA_2 = replace(_LLAMA_2, name="llava_llama_2", system=_VISION_ASSISTANT)
_MISTRAL = replace(
    _LLAMA_2,
    name="mistral",
    aliases=("mistral_instruct", "llava_mistral_instruct"),
    system="",
    before_later_users="",
)
# 34b (Yi). There is no text between `<|im_end|>` and the next `<|im_start|>`.
_CHATML_DIRECT = TurnFormat(
    name="chatml_direct",
    aliases=("mistral_direct",),
    stop=("<|im_end|>",),
    system="Answer the questions.",
    system_wrap=("<|im_start|>system\n", "<|im_end|>"),
    user=("<|im_start|>user\n", "<|im_end|>"),
    assistant_header="<|im_start|>assistant\n",
    answer=("", "<|im_end|>"),
)
# The source uses the chat template of Meta-Llama-3-8B-Instruct's tokenizer; this is the text it produces.
_LLAVA_LLAMA_3 = TurnFormat(
    name="llava_llama_3",
    aliases=(),
    stop=("<|eot_id|>",),
    start="<|begin_of_text|>",
    system=_VISION_ASSISTANT,
    system_wrap=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant_header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer=("", "<|eot_id|>"),
    strip_text=True,
    original_label_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
# SliME's llama3: no system prompt; the tokeniser adds "<|begin_of_text|>". Its trainer supervises answers and their
# ends alone.
_SLIME_LLAMA_3 = replace(
    _LLAVA_LLAMA_3, name="slime_llama_3", start="", system="", strip_text=False, original_label_tokens=()
)
_QWEN = TurnFormat(
    name="qwen",
    aliases=("qwen_1_5", "qwen_2"),
    stop=("<|im_end|>",),
    system="You are a helpful assistant.",
    system_wrap=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant_header="<|im_start|>assistant\n",
    answer=("", "<|im_end|>"),
    after_answer="\n",
    original_label_tokens=("<|im_start|>", "<|im_end|>", "\n"),
)
# LAVIS asks one question so. "\n" is the end token of its OPT; LAVIS has no system prompt.
_BLIP2 = TurnFormat(
    name="blip2",
    aliases=(),
    stop=("\n",),
    system_wrap=("", " "),
    user=("Question: ", " "),
    assistant_header="Answer:",
    answer=(" ", "\n"),
    placeholders_first=True,
)
# The question alone, in LAVIS without a second one.
_INSTRUCTBLIP = TurnFormat(
    name="instructblip",
    aliases=(),
    stop=("</s>",),
    system_wrap=("", " "),
    user=("", ""),
    answer=(" ", "</s>"),
    placeholders_first=True,
)
# The meta instruction is in Chinese and English. The image stands before the question.
_XCOMPOSER = TurnFormat(
    name="xcomposer",
    aliases=(),
    stop=("<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"),
    system="You are an AI assistant whose name is 浦语.\n"
    "- 浦语 is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is "
    "designed to be helpful, honest, and harmless.\n"
    "- 浦语 can understand and communicate fluently in the language chosen by the user such as English and 中文.",
    system_wrap=("meta instruction\n", "\nconversation\n"),
    user=(" <|User|>:", "\n<TOKENS_UNUSED_0>"),
    assistant_header=" <|Bot|>:",
    answer=(" ", "<TOKENS_UNUSED_1>"),
    placeholders_lead=True,
)
# Each part is tokenised by itself, as in make_context and finetune.py.
_QWEN_VL = TurnFormat(
    name="qwen_vl",
    aliases=("qwen_vl_chat",),
    stop=("<|im_end|>", "<|im_start|>"),
    system="You are a helpful assistant.",
    system_wrap=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant_header="<|im_start|>assistant\n",
    answer=("", "<|im_end|>"),
    after_answer="\n",
    original_label_tokens=("<|im_start|>", "<|im_end|>\n"),
    original_header=False,
    picture="Picture {}: <image>\n",
    cuts=("system", "user", "assistant"),
)
# The base model completes a text ("raw" in its generation_config.json).
_QWEN_VL_RAW = TurnFormat(
    name="qwen_vl_raw",
    aliases=(),
    stop=("<|endoftext|>",),
    system_wrap=("", "\n"),
    user=("", ""),
    answer=("", "<|endoftext|>"),
    picture="Picture {}: <image>\n",
    cuts=("assistant",),
)
# inference.py: the picture, a space, one question, and " Answer: ". The answer's first token has no space.
_MONKEY = TurnFormat(
    name="monkey",
    aliases=(),
    stop=("<|endoftext|>",),
    system_wrap=("", "\n"),
    user=(" ", " Answer: "),
    answer=("", "<|endoftext|>"),
    placeholders_first=True,
    cuts=("assistant",),
)

TURN_FORMATS = (
    _PLAIN,
    _VICUNA_V1,
    _LLAVA_V1,
    _LLAMA_2,
    _LLAVA_LLAMA_2,
    _MISTRAL,
    _CHATML_DIRECT,
    _LLAVA_LLAMA_3,
    _SLIME_LLAMA_3,
    _QWEN,
    _BLIP2,
    _INSTRUCTBLIP,
    _XCOMPOSER,
    _QWEN_VL,
    _QWEN_VL_RAW,
    _MONKEY,
)


def default_template_name(model_path_or_name: str, decoder_type: str) -> str:
    """The template for a checkpoint without one, chosen by its name, then by its decoder.

    The order for names with "llama-2", "mistral", "v1.6-34b" or "v1" is that of the original command line
    (llava/eval/run_llava.py and llava/serve/cli.py, haotian-liu/LLaVA c121f04). LLaVA-NeXT leaves the choice
    for its Llama 3 and Qwen models to the user ("llava_llama_3" and "qwen_1_5" in its examples); here their
    names decide, and take precedence over "v1". The original's fallback is always the format of the first LLaVA
    (llava_v0); here it depends on the decoder.

    model_path_or_name: a path or Hub id; only its last component counts (the last two for ".../checkpoint-N").
    decoder_type: `model_type` of the language model or of the original checkpoint ("llama", "mistral",
        "qwen2", "llava_qwen", ...).
    Returns a name for `builtin_template`. Raises RequestError for a decoder without a known template.
    """
    parts = model_path_or_name.strip("/").split("/")
    name = "_".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:]).lower()
    decoder = decoder_type.lower()
    for fragments, template in (
        (("llama-2",), "llava_llama_2"),
        (("mistral", "mixtral"), "mistral_instruct"),
        (("v1.6-34b",), "chatml_direct"),
        (("llama-3", "llama3"), "llava_llama_3"),
        (("qwen",), "qwen_1_5"),
        (("v1",), "llava_v1"),
    ):
        if any(fragment in name for fragment in fragments):
            return template
    if "mistral" in decoder or "mixtral" in decoder:
        return "mistral_instruct"
    if "qwen" in decoder:
        return "qwen_1_5"
    if "llama" in decoder:
        return "chatml_direct" if "34b" in name else "vicuna_v1"
    raise RequestError(
        f"no chat template is known for {model_path_or_name!r} with a decoder of type {decoder_type!r}: "
        "name one of the built-in templates"
    )
