"""How much of the host's memory loading takes while it quantises."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from llava_fast.families.llava_names import from_stored, to_stored
from tests.support import tiny

LAYERS = 24
MEASURE = """
import sys, torch
from pathlib import Path
from llava_fast.checkpoints.load import load_checkpoint, load_weights
from llava_fast.models.quantised import Quantisation, Quantised
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops.quantised_linear import quantise

def highest():  # the most that was resident since clear_refs, anonymous and mapped
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

checkpoint = load_checkpoint(sys.argv[1])
with torch.device("meta"):
    model = LlavaModel(checkpoint.config)
quantise(torch.randn(64, 64), "int4", 32)  # the pages of PyTorch's own code
Path("/proc/self/clear_refs").write_text("5")
before = highest()
load_weights(model, checkpoint, quantisation=Quantisation("int4"))
held = sum(parameter.nbytes for parameter in model.parameters())
held += sum(module.quantised.nbytes for module in model.modules() if isinstance(module, Quantised))
print(highest() - before, held)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_at_most_a_fifth_more_than_the_quantised_model(tmp_path):
    """310 million parameters, 620 MB in bfloat16."""
    text = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    case = tiny.Case("llava", text_options=text | heads)
    with torch.device("meta"):
        hf = tiny.MODELS[case.kind][1](tiny.hf_config(case))
    drawn: dict = {}
    tensors = {}
    for name, parameter in hf.state_dict().items():
        if (shape := tuple(parameter.shape)) not in drawn:
            drawn[shape] = torch.randn(shape).mul_(0.02).bfloat16()
        tensors[to_stored(from_stored(name), "hf")] = drawn[shape].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    hf.config.save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    peak, held = map(int, run.stdout.split())
    assert 0.6 < held / (sum(tensor.nbytes for tensor in tensors.values()) * 5 / 16) < 1.2  # 4 bits, and scales
    assert peak <= 1.2 * held
