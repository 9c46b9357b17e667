"""The build: an sdist that suffices, a wheel made and imported without torch, no stale object after a switch."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("pybind11")
pytest.importorskip("ninja")


def run(command, folder, **environment):
    """Runs a command that must succeed; what it printed, both streams."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def without_torch(code):
    return [sys.executable, "-c", "import sys; sys.modules['torch'] = None; " + code]


def copy_project(target):
    """The files of the checkout that a build can read, without what builds and runs leave behind."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "llava_fast"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    run(without_torch("from setuptools import build_meta; build_meta.build_sdist('dist')"), project)
    (archive,) = (project / "dist").glob("llava_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(project / "unpacked", filter="data")
    return next((project / "unpacked").iterdir())


def test_sdist_holds_every_source(sdist):
    for folder, patterns in (("csrc", ("*",)), ("llava_fast", ("*.py", "*.json", "*.yaml", "py.typed"))):
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                if path.is_file() and "__pycache__" not in path.parts:
                    assert (sdist / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for name in ("setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE"):
        assert (sdist / name).is_file()
    assert not list(sdist.rglob("*.so"))


@pytest.mark.timeout(900)  # seconds where the machine is free, minutes where others use it
def test_wheel_from_the_sdist_works_without_torch(sdist, tmp_path):
    """Unoptimised, to be quick."""
    build = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    run(without_torch(build), sdist, LLAVA_FAST_CUDA="0", CXXFLAGS="-O0")
    (wheel,) = (sdist / "wheel").glob("llava_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    assert not [name for name in names if name.startswith(("csrc", "tests", "build"))]
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "llava-fast = llava_fast.cli.main" in next(tmp_path.glob("*.dist-info/entry_points.txt")).read_text()
    for path in (ROOT / "llava_fast").rglob("*.json"):
        assert str(path.relative_to(ROOT)) in names

    code = """
        import json, numpy
        from llava_fast import _C
        image = numpy.arange(48, dtype=numpy.uint8).reshape(4, 4, 3)
        pixels = _C.resize(image, 4, 4, "bicubic", "13", 1).tolist()
        print(json.dumps([_C.__file__, _C.built_with_cuda(), _C.has_cuda(), pixels]))
    """
    file, built, has, pixels = json.loads(run(without_torch("\n" + textwrap.dedent(code)), tmp_path))
    assert Path(file).parent == tmp_path / "llava_fast"
    assert (built, has) == (False, False)
    assert [value for row in pixels for pixel in row for value in pixel] == list(range(48))


# --- configurations, on a project of two small sources and a stand-in for nvcc ---

MODULE = """
    #include <Python.h>
    #include "part.h"
    #ifdef LLAVA_FAST_BUILT_WITH_CUDA
    int cuda_part();
    #else
    static int cuda_part() { return 0; }
    #endif
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
    PyMODINIT_FUNC PyInit__C() {
      PyObject* module = PyModule_Create(&definition);
      PyModule_AddIntConstant(module, "part", PART);
      PyModule_AddIntConstant(module, "cuda_part", cuda_part());
      return module;
    }
"""

CUDA_PART = """
    #include "part.h"
    #ifndef FIRST_OF
    #define FIRST_OF(a, b) 10
    #endif
    int cuda_part() { return FIRST_OF(20, 30) * PART; }
"""

NVCC = """
    #!{python}
    # Stands in for nvcc: says a version, compiles .cu files as C++.
    import shutil, subprocess, sys
    words, kept, host = iter(sys.argv[1:]), [], "c++"
    if "--version" in sys.argv:
        sys.exit(print("Cuda compilation tools, release {version}, V{version}.1"))
    for word in words:
        if word == "-ccbin":
            host = next(words)
        elif word.startswith("-Xcompiler=-D"):
            kept.append(word.partition("=")[2].replace("\\\\,", ","))
        elif word in ("-o", "-MF"):
            kept += [word, next(words)]
        elif word.endswith(".cu"):
            kept += ["-x", "c++", word]
        elif word in ("-c", "-MD", "-shared") or word.startswith("-I") or word.endswith(".o"):
            kept.append(word)
    if shutil.which(host) is None:
        sys.exit(host + ": No such file or directory")
    sys.exit(subprocess.call([host, "-fPIC", *kept]))
"""


class SmallProject:
    def __init__(self, folder):
        self.folder = folder
        self.csrc = folder / "csrc"
        (self.csrc / "sub").mkdir(parents=True)
        (folder / "llava_fast").mkdir()
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        (self.csrc / "module.cpp").write_text(textwrap.dedent(MODULE))
        (self.csrc / "sub" / "part.cu").write_text(textwrap.dedent(CUDA_PART))
        self.set_part(1)

    def set_part(self, value):
        (self.csrc / "part.h").write_text(f"#define PART {value}\n")

    def fake_nvcc(self, version):
        """A PATH on which nvcc is the stand-in."""
        tools = self.folder / f"tools {version}"
        tools.mkdir(exist_ok=True)
        nvcc = tools / "nvcc"
        nvcc.write_text(textwrap.dedent(NVCC).strip().format(python=sys.executable, version=version))
        nvcc.chmod(0o755)
        return f"{tools}{os.pathsep}{os.environ['PATH']}"

    def build(self, **environment):
        return run([sys.executable, "setup.py", "build_ext", "--inplace"], self.folder, **environment)

    def values(self):
        """(part, cuda_part) of the module as a new process sees it."""
        code = "import _C; print(_C.part, _C.cuda_part)"
        printed = run([sys.executable, "-c", code], self.folder / "llava_fast")
        return tuple(int(word) for word in printed.split())


@pytest.fixture
def project(tmp_path):
    return SmallProject(tmp_path / "a project")  # with a space, which every command must quote


def test_switching_configurations_links_nothing_stale(project):
    cuda = {"LLAVA_FAST_CUDA": "auto", "PATH": project.fake_nvcc("13.0")}
    project.build(LLAVA_FAST_CUDA="0")
    assert project.values() == (1, 0)
    project.build(**cuda)
    assert project.values() == (1, 10)
    project.set_part(2)
    project.build(LLAVA_FAST_CUDA="0")
    assert project.values() == (2, 0)
    project.build(**cuda)
    assert project.values() == (2, 20)
    folders = sorted(path.name.split("-")[0] for path in (project.folder / "build").glob("c*"))
    assert folders == ["cpu", "cuda13.0"]
    assert "no work to do" in project.build(**cuda)


def test_a_compiler_of_several_words_compiles_for_cuda_too(project):
    """As conda sets it: a launcher before it, which nvcc does not take, and flags, one with a comma."""
    path = project.fake_nvcc("13.0")
    launcher = project.folder / "tools 13.0" / "ccache"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    project.build(LLAVA_FAST_CUDA="1", PATH=path, CXX="ccache c++ '-DFIRST_OF(a,b)=a'")
    assert project.values() == (1, 20)
    renamed = project.folder / "tools 13.0" / "a compiler"
    renamed.symlink_to(shutil.which("c++"))
    project.set_part(3)
    project.build(LLAVA_FAST_CUDA="1", PATH=path, CXX=str(renamed))
    assert project.values() == (3, 30)


def test_bad_configurations_are_named(project):
    def message(**environment):
        with pytest.raises(AssertionError) as error:
            project.build(**environment)
        return str(error.value)

    no_tools = str(project.folder)
    assert "LLAVA_FAST_CUDA must be 0, 1 or auto, not 'yes'" in message(LLAVA_FAST_CUDA="yes")
    assert "nvcc is not on PATH" in message(LLAVA_FAST_CUDA="1", PATH=no_tools)
    assert "CUDA 11.8; CUDA 12 or 13 is needed" in message(LLAVA_FAST_CUDA="1", PATH=project.fake_nvcc("11.8"))


def test_another_cuda_is_left_out_by_auto(project):
    printed = project.build(LLAVA_FAST_CUDA="auto", PATH=project.fake_nvcc("11.8"))
    assert "CUDA 11.8, not 12 or 13: building without CUDA" in printed
    assert project.values() == (1, 0)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: path.name)
def test_cuda_kernels_use_no_stack(source, capability, tmp_path):
    """What ptxas reports of each kernel: no stack, no spills, and registers for at least 1,024 threads."""
    flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{capability}", "-Werror=cross-execution-space-call"]
    command = ["nvcc", *flags, "-I", ROOT / "csrc", "-Xptxas", "-v", "-o", tmp_path / "kernels.cubin", source]
    report = run(command, tmp_path)
    kernels = report.count("Compiling entry function")
    assert kernels
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == kernels
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == kernels
    assert min(registers) > 8
    assert max(registers) <= 64
