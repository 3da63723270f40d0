# make demo   sets everything up, then trains a small reasoner on this machine until it is visibly better
# make demo-lm  the same with a real model of 135M parameters, which it fetches (93 MB)
# make test   sets everything up, then runs the tests
# make smollm2   fetches a small real language model into models/smollm2-135m
# Others: install, test-unit (under a minute), test-vllm, test-ascend, test-faults, test-browser, lint, bench, clean. PYTHON=python3.12 picks the interpreter.
# JOBS=1 runs tests one after another.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_WAIT_POLICY = PASSIVE
# Most tests wait for one process at a time, so two of them at once share two cores well.
JOBS   ?= 2
PARALLEL = --numprocesses $(JOBS) --dist worksteal

.PHONY: demo demo-lm smollm2 test test-unit test-vllm test-ascend test-faults test-browser lint bench install clean FORCE

demo: install
	$(BIN)/emberl train configs/quickstart.yaml

# A small real model, SmolLM2-135M-Instruct (93 MB to fetch), in models/smollm2-135m.
smollm2: install
	$(BIN)/python tests/models/smollm2.py models/smollm2-135m

demo-lm: smollm2
	$(BIN)/emberl train configs/smollm2_135m.yaml

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

test-unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m "not slow"

# Ten thousand faults on the way of the weights: lost, repeated, cut, flipped and foreign patches, crashes at every step.
# And sixty steps of a run whose workers, graders and learner are killed and stopped at random.
test-faults: install
	EMBERL_FAULTS=10000 $(BIN)/pytest tests/rollout/weights/test_faults.py tests/system/test_chaos.py

# The NPU side without an NPU, in an environment of its own (triton-ascend cannot stand beside stock Triton): lowered kernels, vllm-ascend's
# sources, and the real torch-npu over stand-ins of CANN's libraries. VERIFIED=configs/ascend/README.md writes its table of what was verified.
test-ascend:
	tests/ascend/setup.sh $(VENV)-ascend
	OMP_NUM_THREADS=1 $(VENV)-ascend/bin/pytest tests/ascend --ignore=tests/ascend/npu $(VERIFIED:%=--verified %)
	OMP_NUM_THREADS=1 ASCEND_LAUNCH_BLOCKING=1 LD_LIBRARY_PATH=$(abspath $(VENV)-ascend/cann) \
		PYTHONPATH=$(abspath $(VENV)-ascend/src):$(abspath $(VENV)-ascend/torch-npu-2.13.0) $(VENV)-ascend/bin/pytest tests/ascend tests/ascend/npu --ignore-glob='tests/ascend/test_*' $(VERIFIED:%=--verified %) || [ $$? -eq 5 ]  # 5: no torch-npu, so no tests
ifdef VERIFIED  # what the ordinary tests show of NPUs
	PYTHONPATH=tests/ascend $(BIN)/pytest -p verified --verified $(VERIFIED) $$(grep -l "^SHOWS = {" -r tests --include=test_*.py | grep -v ^tests/ascend)
endif

# Rollouts on real vLLM for the CPU, in an environment of its own (vLLM pins the versions of torch and transformers).
# VLLM_VERSION=0.23.0 make test-vllm VENV=.venv-0.23 tests another version.
test-vllm:
	tests/vllm/setup.sh $(VENV)-vllm
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/pytest $(PARALLEL) tests/vllm

# The page of an evaluation in a headless browser: Debian's chromium, which is installed where that is possible.
test-browser: install
	tests/browser/setup.sh
	$(BIN)/pytest tests/browser

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --config-settings editable_mode=strict -e '.[dev,bench]'
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

install: $(VENV)/.ready

# The strict editable install links file by file, so that type checkers resolve emberl.*; a new file needs a new link.
$(VENV)/.ready: pyproject.toml .ci/install $(VENV)/.files
	sh .ci/install $(VENV) $(PYTHON)
	touch $@

$(VENV)/.files: FORCE
	@mkdir -p $(VENV)
	@find rl rollout rewards kernels configs -name '*.py' -o -name '*.yaml' -o -name '*.html' -o -name py.typed | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

FORCE:

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-ascend build *.egg-info .pytest_cache .mypy_cache .ruff_cache
