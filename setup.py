"""Builds llava_fast._C: csrc/ compiled by ninja into one pybind11 module, with CUDA where nvcc is.

Needs no torch. LLAVA_FAST_CUDA=0|1|auto (default auto) says whether the .cu files are compiled: auto means
"if nvcc (CUDA 12 or 13) is on PATH", 1 makes a missing nvcc an error. CXX is the C++ compiler, CXXFLAGS is added.
Each configuration has its own folder under build/, so switching between them never links a stale object.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -DNDEBUG".split()
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "--cudart=static", "-Werror=cross-execution-space-call"),
    *("-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off", "--fmad=false"),
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"),
]


def find_nvcc() -> tuple[str, str] | None:
    """(path, "major.minor") of the nvcc to use, or None for a CPU build; LLAVA_FAST_CUDA decides."""
    wanted = os.environ.get("LLAVA_FAST_CUDA", "auto").lower()
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"LLAVA_FAST_CUDA must be 0, 1 or auto, not {wanted!r}")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("LLAVA_FAST_CUDA=1, but nvcc is not on PATH; install CUDA 12 or 13, or set 0")
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    if version is None or version[1].split(".")[0] not in ("12", "13"):
        found = version[1] if version else "an unknown version"
        if wanted == "1":
            raise SystemExit(f"LLAVA_FAST_CUDA=1, but {nvcc} is CUDA {found}; CUDA 12 or 13 is needed")
        print(f"llava_fast: {nvcc} is CUDA {found}, not 12 or 13: building without CUDA", file=sys.stderr)
        return None
    return nvcc, version[1]


def compiler() -> list[str]:
    """The words of CXX, as "ccache g++ -pthread" has several; else the system's compiler."""
    given = os.environ.get("CXX", "")
    words = [given] if shutil.which(given) else shlex.split(given)
    return words or [shutil.which("c++") or shutil.which("g++") or "c++"]


def host_compiler(words: list[str]) -> list[str]:
    """CXX as nvcc takes it: the program by -ccbin, its flags by -Xcompiler; launchers before it are left out."""
    flags_at = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    launched = next((place for place, word in enumerate(words[:flags_at]) if Path(word).name not in LAUNCHERS), 0)
    program, *flags = words[launched:]
    escaped = (flag.replace(",", r"\,") for flag in flags)  # nvcc splits what it hands on at commas
    return ["-ccbin", program, *(f"-Xcompiler={flag}" for flag in escaped)]


def cxx_flags() -> list[str]:
    return CXX_FLAGS + os.environ.get("CXXFLAGS", "").split()


def quote(path: object) -> str:
    """A path as a word of a shell command in build.ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: object) -> str:
    """A path as a word of a build line in build.ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(module: str, nvcc: tuple[str, str] | None) -> str:
    """The text of build.ninja: one object per source in csrc/, linked into `module`."""
    import pybind11

    cxx = " ".join(map(quote, compiler()))
    csrc = ROOT / "csrc"
    flags = [*cxx_flags(), f"-I{quote(csrc)}"]
    flags += [f"-isystem {quote(path)}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    if nvcc:
        flags.append("-DLLAVA_FAST_BUILT_WITH_CUDA")
        nvcc_here = " ".join(map(quote, [nvcc[0], *host_compiler(compiler())]))
        link = f"{nvcc_here} -shared --cudart=static -arch=sm_80 -Xlinker=--exclude-libs,ALL"
    elif sys.platform == "darwin":
        link = f"{cxx} -bundle -undefined dynamic_lookup"
    else:
        link = f"{cxx} -shared -pthread"
    commands = {"cxx": f"{cxx} {' '.join(flags)}", "link": link}
    if nvcc:
        commands["nvcc"] = f"{nvcc_here} {' '.join(NVCC_FLAGS)} -I{quote(csrc)}"

    lines = ["ninja_required_version = 1.5"]
    for rule, command in commands.items():
        if rule == "link":
            lines += ["rule link", f"  command = {command} $in -o $out"]
        else:
            lines += [f"rule {rule}", f"  command = {command} -MD -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for rule, pattern in (("cxx", "*.cpp"), ("nvcc", "*.cu")):
        for source in sorted(csrc.rglob(pattern)) if rule in commands else []:
            objects.append(escape("_".join(source.relative_to(csrc).parts) + ".o"))
            lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
    lines += [f"build {escape(module)}: link {' '.join(objects)}", f"default {escape(module)}"]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """build_ext that hands the one extension to ninja; works for wheels, sdists and `pip install -e`."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        nvcc = find_nvcc()
        kind = f"cuda{nvcc[1]}" if nvcc else "cpu"
        key = hashlib.sha256(repr((compiler(), cxx_flags(), nvcc, NVCC_FLAGS)).encode()).hexdigest()[:8]
        folder = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target.name, nvcc))
        print(f"llava_fast: building {target.name} ({kind}) in {folder}", flush=True)
        subprocess.run([*find_ninja(), "-C", str(folder)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old file open keeps its own copy
        shutil.copy2(folder / target.name, target)


def find_ninja() -> list[str]:
    """The ninja of the build requirements, else the system's."""
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


setup(ext_modules=[Extension("llava_fast._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
