# make demo        set up .venv; demonstrations, imitation, then PPO from pictures and words (some 25 minutes on 2 cores)
# make demo-state  one policy learns three tabletop tasks from the simulator's state (under 15 minutes)
# make demo-text   a real language model learns to add, to subtract and to multiply (some 25 minutes)
# make test        set up .venv with the test tools; lint, types and the default test suite
# make bench       the benchmarks of scripts/, in their quick form, beside the peers they install
# make docs        rewrite the generated pages in docs/
# make clean       remove .venv, build/ and caches; runs/ is kept
#
# The set-up is reused until pyproject.toml or constraints.txt change. PYTHON=... chooses the interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: demo demo-state demo-text test bench lint types unit docs setup setup-dev clean

# A run folder is never overwritten, so a second demo gets a name of its own.
demo: $(VENV)/.ready
	$(BIN)/embodied-rl collect tabletop_vla_tokens_sft --episodes 1800 --misses 0.5 --show-misses --out runs/tabletop_demos
	@test -e runs/tabletop_vla_tokens_sft/summary.json || $(BIN)/embodied-rl train tabletop_vla_tokens_sft
	@name=tabletop_vla_tokens; n=2; while test -e runs/$$name; do name=tabletop_vla_tokens-$$n; n=$$((n + 1)); done; \
	$(BIN)/embodied-rl train tabletop_vla_tokens name=$$name

demo-state: $(VENV)/.ready
	@name=tabletop_demo; n=2; while test -e runs/$$name; do name=tabletop_demo-$$n; n=$$((n + 1)); done; \
	$(BIN)/embodied-rl train tabletop_demo name=$$name

demo-text: $(VENV)/.ready-text models/smollm2/config.json
	@name=text_demo; n=2; while test -e runs/$$name; do name=text_demo-$$n; n=$$((n + 1)); done; \
	$(BIN)/embodied-rl train text_demo name=$$name

models/smollm2/config.json: | $(VENV)/.ready-text
	$(BIN)/python scripts/get_smollm2.py --out models/smollm2

test: lint types unit

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check

# envs/ and policies/ become part of the package only when installed, so the built tree is what mypy reads.
types: $(VENV)/.ready-dev
	rm -rf build
	$(PIP) --no-deps --no-build-isolation --target build/typed .
	$(BIN)/mypy

unit: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.ready-bench
	for name in envs scaling isolation ppo vla rewards gpu; do $(BIN)/python scripts/bench_$$name.py --quick || exit; done
	test ! -e models/smollm2/config.json || $(BIN)/python scripts/bench_grpo.py --quick

docs: $(VENV)/.ready-dev
	$(BIN)/python scripts/generate_docs.py

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

# torch comes first and pinned: no later resolution may then replace it by another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "embodied_rl needs Python 3.11 or newer; found '$(PYTHON)'. Try: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing embodied_rl into $(VENV) (a few minutes, once)"
	@$(PIP) $(TORCH)
	@$(PIP) -e '.[tensorboard]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing the test tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.ready-text: $(VENV)/.ready
	@echo "installing what language models and their tasks need into $(VENV)"
	@$(PIP) -e '.[text,tasks]'
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready-dev
	@echo "installing the libraries that the benchmarks compare with into $(VENV)"
	@$(PIP) -e '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
