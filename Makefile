# Two targets do everything from a bare clone: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

STUB := $(CURDIR)/.venv/cuda-stub
WITH_STUB := PYTHONPATH=$(STUB)/site LD_LIBRARY_PATH=$(STUB)/lib

QUICK := tests/test_contracts.py tests/passes/test_golden.py tests/formats tests/graph tests/docs tests/targets

.PHONY: demo test quick mutants fuzz test-cuda-placement cuda-kernels lint bench clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/.ready
	$(BIN)/python benchmarks/demo.py

# A process for each core, one thread each: tiny matrices gain nothing from a second thread.
test: .venv/.ready .venv/.browser lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# What to run before each commit: no model of an exporter is compiled, so that it takes less than a minute.
quick: .venv/.ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)

# Whether tests fail where the code is wrong (minutes; not in CI). COUNT=40 draws simple faults in the core modules.
COUNT ?= 0
SEED ?= 0
mutants: .venv/.ready
	$(BIN)/python tests/mutants.py --count $(COUNT) --seed $(SEED)

# Hostile models, recipes and data, COUNT of them; which are drawn goes by SEED (10 minutes of two cores; not in CI).
fuzz: .venv/.ready
	$(BIN)/python tests/fuzz/run.py --count $(or $(filter-out 0,$(COUNT)),5000) --seed $(SEED)

# The tests of report.html run in Chromium: Debian's package, else the one that playwright brings, else they are skipped.
.venv/.browser: .venv/.ready
	command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { [ "$$(id -u)" = 0 ] && apt-get install -y --no-install-recommends chromium; } \
		|| $(BIN)/playwright install chromium \
		|| echo "no Chromium can be had here: the tests in a browser will be skipped"
	touch $@

# What the CUDA provider decides when it loads a model, on stand-ins for the CUDA libraries: no GPU, and no numbers.
$(STUB)/.ready: .venv/.ready tests/cuda_stub/build.py tests/cuda_stub/stub.c
	$(BIN)/python tests/cuda_stub/build.py $(STUB)
	touch $@

test-cuda-placement: $(STUB)/.ready
	$(WITH_STUB) $(BIN)/python -m pytest tests/cuda_stub

# The kernel table of the target ort-cuda; another version of onnxruntime-gpu is named in tests/cuda_stub/build.py.
cuda-kernels: $(STUB)/.ready
	$(WITH_STUB) $(BIN)/python -m qcompiler.targets.dump \
		qcompiler/targets/kernels-ort-cuda-1.31.1.json CUDAExecutionProvider

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/.ready
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/weight_only.py
	$(BIN)/python benchmarks/weight_only_memory.py
	$(BIN)/python benchmarks/kv_quality.py
	$(BIN)/python benchmarks/kv_cache.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/charts.py

clean:
	rm -rf .venv models/.cache benchmarks/.cache demo-output
