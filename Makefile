# Everything here works without a terminal and without standard input.
#
#   make setup     what is needed to work in this tree: QEMUs, a kernel for test guests, .venv
#   make demo      a system snapshot and its restore, on a guest that would notice a fault
#   make check     formatting, lint, types, layers and the quick tests: under a minute
#   make test      check, and every other test, with real guests in a real QEMU
#   make format    let ruff format and mend what it can
#   make clean     remove all that the above have made

.PHONY: setup demo check test lint format clean

bin := .venv/bin
pytest := $(bin)/pytest -n 2 --dist loadgroup --quiet

setup:
	@scripts/setup

demo: setup
	$(bin)/python -m calotype.testing.demo

check: lint
	$(pytest) tests/unit tests/property tests/repo

test: lint
	$(pytest) tests

lint: setup
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/mypy
	$(bin)/lint-imports --no-logo

format: setup
	$(bin)/ruff format
	$(bin)/ruff check --fix

clean:
	rm -rf .venv .deps dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
