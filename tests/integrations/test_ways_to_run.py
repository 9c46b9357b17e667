"""Further ways to run an accelerated model: assisted generation, and training under torch.compile."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaForCausalLM

import llava_fast
from tests.support.against_stock import assert_same_gradients, batch, fresh, gradients, shallow
from tests.support.parity import assert_close

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("how", ["assistant", "prompt lookup", "same model"])
@pytest.mark.parametrize("name", ["llava15", "next"])
def test_assisted_generation(name, how, no_fallback):
    """One prompt at a time, as transformers has it; the assistant reads text alone."""
    if how == "assistant" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("5.17 gives images to a text-only assistant, which refuses them")
    inputs = batch(name, "a")
    answers = []
    for model in (fresh(name), llava_fast.accelerate(fresh(name))):
        torch.manual_seed(1)
        assistant = {
            "assistant": {"assistant_model": LlamaForCausalLM(model.config.text_config).eval()},
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "same model": {"assistant_model": model},
        }[how]
        answers.append(model.generate(**inputs, **GREEDY, **assistant).tolist())
    plain = fresh(name).generate(**inputs, **GREEDY).tolist()
    assert answers[0] == answers[1] == plain


def test_training_under_compile(no_fallback):
    """The graph that is traced is the stock one (test_accelerate has the forward pass in both orders)."""
    torch._dynamo.reset()
    inputs = batch("llava15", "a", labels=True)
    expected_out, expected = gradients(shallow("llava15"), inputs)
    model = llava_fast.accelerate(shallow("llava15"))
    model.compile(backend="eager")
    out, found = gradients(model, inputs)
    assert_close("compiled loss", out.loss, expected_out.loss, 1e-5)
    assert_same_gradients("compiled gradients", found, expected)
