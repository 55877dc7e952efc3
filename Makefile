# make demo: install and train a small model in a few minutes; make test: the whole default suite.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test fast slow lint install clean

demo: $(VENV)/.installed
	$(BIN)/jaxllm demo

test: $(VENV)/.installed-dev
	JAXLLM_TEST_CACHE=$(CURDIR)/.cache/xla $(BIN)/python -m pytest -n 2

fast: $(VENV)/.installed-dev
	JAXLLM_TEST_CACHE=$(CURDIR)/.cache/xla $(BIN)/python -m pytest -n 2 -m fast

slow: $(VENV)/.installed-dev
	JAXLLM_TEST_CACHE=$(CURDIR)/.cache/xla $(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

install: $(VENV)/.installed

# uv where it is installed, else venv and pip; pip is there either way, since messages say `pip install`.
$(VENV)/.installed: pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  test -d $(VENV) || uv venv --seed --python $(PYTHON) $(VENV); uv pip install --python $(BIN)/python -e .; \
	else \
	  test -d $(VENV) || $(PYTHON) -m venv $(VENV); $(BIN)/python -m pip install --quiet -e .; \
	fi
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install --python $(BIN)/python -e ".[dev]"; \
	else \
	  $(BIN)/python -m pip install --quiet -e ".[dev]"; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
