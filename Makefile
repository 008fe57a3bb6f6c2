# `make demo` and `make test` need Python >= 3.10, make and a C++ compiler; each prepares .venv, with what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS := 0  # of pytest-xdist; 0: one process. Tests that look for processes of a kind do not bear neighbours yet
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/native/*.cpp' 2>/dev/null)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-merge test bench docs check format native sanitize aarch64 clean espeak chromium

demo: $(VENV)/.demo espeak
	$(BIN)/python -m lors.speech.demo demo-out

demo-merge: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(MODELS)

test: $(VENV)/.installed espeak chromium
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks all

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict # into build/site; `$(BIN)/mkdocs serve` shows it while it is written

# torch first, with what lors_kernels imports: a range in somebody's requirements must not bring another one. Python compiles
# what is imported. For the demonstration the kernels are built for this processor alone.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.demo: ONLY = LORS_BUILD_CUDA=0 LORS_BUILD_ISA=$$($(BIN)/python -c "from lors_kernels.backends import cpu; print(cpu.instruction_set())")
$(VENV)/.installed: EXTRAS := dev
$(VENV)/.demo $(VENV)/.installed: pyproject.toml setup.py constraints.txt $(shell git ls-files csrc 2>/dev/null)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -q --no-compile torch==2.13.0 numpy ml_dtypes
	PIP_CONSTRAINT=constraints.txt $(ONLY) $(BIN)/pip install -q --no-compile -e '.[$(EXTRAS)]'
	touch $(VENV)/.demo $@ # what is installed for everything serves the demonstration

# Programs that some tests and the demonstration use: speech (without it the recordings in the package serve), and a
# browser that judges the pages. Installed where that is possible; else the tests say what they go without.
define program # names on the PATH, Debian's package
@for name in $(1); do command -v $$name >/dev/null && exit 0; done; \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(2) >/dev/null; then exit 0; fi; \
  echo "$(firstword $(1)) is not installed (Debian: apt-get install $(2)); going on without it"
endef

espeak:
	$(call program,espeak-ng,espeak-ng)

chromium:
	$(call program,chromium chromium-browser google-chrome,chromium)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The kernels without Python: plain, and under the sanitizers.
NATIVE := $(wildcard csrc/cpu/*.cpp csrc/common/*.cpp) tests/native/native_test.cpp
build/native-%: $(NATIVE) $(wildcard csrc/cpu/*.h csrc/common/*.h)
	mkdir -p build
	$(CXX) -std=c++17 -g -O1 -fno-omit-frame-pointer -Wall -Wextra $(if $(filter plain,$*),-O3,-march=native -fsanitize=$*) -Icsrc $(NATIVE) -o $@ -pthread

native: build/native-plain
	build/native-plain

sanitize: build/native-address,undefined build/native-thread
	UBSAN_OPTIONS=halt_on_error=1 build/native-address,undefined
	build/native-thread

# Decompositions of matrices from its input: what `python -m benchmarks certificate` asks of 64-bit ARM.
build/svd-aarch64: $(filter-out tests/native/native_test.cpp,$(NATIVE)) tests/native/svd_cases.cpp $(wildcard csrc/cpu/*.h csrc/common/*.h)
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O3 -fno-math-errno -Wall -Wextra -static -Icsrc $(filter %.cpp,$^) -o $@ -pthread

# The same for 64-bit ARM, compiled as the extension module is, on an emulated processor.
build/native-aarch64: $(NATIVE) $(wildcard csrc/cpu/*.h csrc/common/*.h)
	$(call program,aarch64-linux-gnu-g++,g++-aarch64-linux-gnu)
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O3 -fno-math-errno -Wall -Wextra -static -Icsrc $(NATIVE) -o $@ -pthread

aarch64: build/native-aarch64
	$(call program,qemu-aarch64,qemu-user)
	qemu-aarch64 build/native-aarch64

clean:
	rm -rf build $(VENV) demo-out bench-data lors_kernels/*.so python_api/*.egg-info
