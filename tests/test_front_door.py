"""What `import llava_fast` offers: every public name, its type for a type checker, and no torch until one is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import llava_fast
from llava_fast import errors

PACKAGE = Path(llava_fast.__file__).parent


@pytest.mark.parametrize("name", llava_fast.__all__)
def test_every_public_name_is_there(name):
    found = getattr(llava_fast, name)
    assert found is getattr(llava_fast, name)
    assert name in dir(llava_fast)
    if name not in ("ops", "__version__"):
        assert found.__name__ == name
        assert found.__doc__


def test_every_error_class_is_public_and_in_errors():
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert kinds <= set(llava_fast.__all__)
    for file in PACKAGE.rglob("*.py"):
        defined = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
        bases = {base.id for node in defined for base in node.bases if isinstance(base, ast.Name)}
        assert file.name == "errors.py" or not bases & kinds, file


def test_an_import_loads_no_torch_and_an_unknown_name_is_an_attribute_error():
    code = "import sys, llava_fast; llava_fast.RequestError; assert 'torch' not in sys.modules; llava_fast.Sampling"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = llava_fast.lode


def test_inner_modules_import_what_they_use_and_not_the_front_door():
    for file in PACKAGE.rglob("*.py"):
        if file.name == "__init__.py" and file.parent == PACKAGE:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "llava_fast", f"{file}:{node.lineno}"
            elif isinstance(node, ast.Import):
                assert all(alias.name != "llava_fast" for alias in node.names), f"{file}:{node.lineno}"
