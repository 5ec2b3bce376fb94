# Every target sets itself up; see scripts/install for what PYTHON, VENV and TORCH_INDEX_URL do.
BIN := .venv/bin
MODEL ?= demo
SOAK_SECONDS ?= 600
CHAOS_KILLS ?= 200
CHAOS_BACKEND ?= sqlite
LM_EVAL_LIMIT ?= 200
LOAD_SECONDS ?= 600
# Two processes of one thread each are faster than one of two, as most tests are small.
TEST_PROCESSES ?= 2
PYTEST_ENV := OMP_NUM_THREADS=1
PYTEST_FLAGS := -n $(TEST_PROCESSES) --dist worksteal

.PHONY: help demo demo-train test lint format check test-oldest test-vllm bench bench-quick bench-tax \
	bench-kernel bench-gpu bench-residency bench-fanout bench-train bench-vllm soak fuzz load chaos \
	lm-eval transcript docs lint-deploy rehearse clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

demo:  ## install, start the server with the example adapters, print curl lines (MODEL=hub id or folder)
	@scripts/install demo
	@$(BIN)/reft demo --model $(MODEL)

demo-train:  ## train and evaluate the sentiment example from scratch, then inspect the result
	@scripts/install demo train
	@$(BIN)/reft train examples/sentiment/config.yaml output=runs/demo-train/sentiment.safetensors
	@$(BIN)/reft adapter inspect runs/demo-train/sentiment.safetensors

test:  ## install what the tests need and run them
	@scripts/install test
	@$(PYTEST_ENV) $(BIN)/python -m pytest $(PYTEST_FLAGS)

lint:  ## ruff and mypy
	@scripts/install test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy reft_core server trainer benchmarks

format:  ## rewrite the sources in the project's format
	@scripts/install test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: lint test  ## what CI asks, but for test-oldest

# What no transformers takes part in is left to `make test`: the file format, the compiled loops.
test-oldest:  ## the core tests on the oldest transformers we promise
	@VENV=.venv-oldest CONSTRAINT='transformers==5.16.*' scripts/install test
	@$(PYTEST_ENV) .venv-oldest/bin/python -m pytest $(PYTEST_FLAGS) tests/reft_core \
		--ignore=tests/reft_core/adapter_files --ignore=tests/reft_core/native

test-vllm:  ## the adapters inside vLLM, in an environment of its own (.venv-vllm; six minutes once installed)
	@.ci/vllm

bench:  ## the engine against vLLM, llama.cpp and transformers, its roofline, its adapters (about 45 minutes)
	@scripts/install demo
	@$(BIN)/python -m benchmarks.engine

bench-quick:  ## the same with fewer workloads and repeats, in five minutes once peers are installed
	@scripts/install demo
	@$(BIN)/python -m benchmarks.engine --quick

bench-tax:  ## what adapters cost in throughput, against the same requests without any
	@scripts/install demo
	@$(BIN)/python -m benchmarks.adapter_tax --dtype float32
	@$(BIN)/python -m benchmarks.adapter_tax --dtype bfloat16

bench-kernel:  ## ways to apply edits against each other, and their share of a prefill
	@scripts/install demo
	@$(BIN)/python -m benchmarks.kernel

bench-gpu:  ## everything that needs a GPU: decode, prefill, adapters' cost, edits, cold loads
	@scripts/install demo
	@$(BIN)/python -m benchmarks.gpu

bench-fanout:  ## what one prompt costs under 16 adapters, against one of them
	@scripts/install demo
	@$(BIN)/python -m benchmarks.fanout --dtype float32
	@$(BIN)/python -m benchmarks.fanout --dtype bfloat16

bench-residency:  ## thousands of registered adapters against ten, and the time of a cold load
	@scripts/install demo
	@$(BIN)/python -m benchmarks.residency

bench-train:  ## a training step against pyreft and PEFT's LoRA, in time and memory (REFT_DATA=folder with sst2)
	@scripts/install demo train
	@$(BIN)/python -m benchmarks.training

bench-vllm:  ## adapters inside vLLM: what they cost beside its LoRA, what they share, prefill and decode apart
	@scripts/install demo
	@$(BIN)/python -m benchmarks.vllm_disaggregation
	@$(BIN)/python -m benchmarks.vllm_tax

lint-deploy:  ## Dockerfile, Compose file, Helm chart, systemd unit, by the tools that read them
	@scripts/install test
	@scripts/deploy-tools
	@DEPLOY_TOOLS_REQUIRED=1 $(BIN)/python -m pytest -q tests/deploy

rehearse:  ## the image's build and start without Docker (root, Linux); see deploy/docker/rehearse
	@scripts/install demo
	@PYTHON=$(BIN)/python deploy/docker/rehearse --build-arg TORCH_INDEX_URL=default

soak:  ## ten minutes of random traffic on a real server, then a count of everything (SOAK_SECONDS=60)
	@scripts/install test
	@$(BIN)/python -m benchmarks.soak --seconds $(SOAK_SECONDS)

fuzz:  ## attacks on the server and on the reader of adapter files (FUZZ="--num-files 1000" for fewer)
	@scripts/install test
	@$(PYTEST_ENV) $(BIN)/python -m benchmarks.fuzz $(FUZZ)

load:  ## a thousand connections and 64 streams for ten minutes, then what HTTP costs (LOAD_SECONDS=60)
	@scripts/install test
	@$(BIN)/python -m benchmarks.load --seconds $(LOAD_SECONDS)

lm-eval:  ## lm-eval asks a running server; its scores against transformers' (REFT_DATA=folder with sst2 and ARC-Easy)
	@scripts/install demo
	@$(BIN)/python -m benchmarks.lm_eval --data $(or $(REFT_DATA),$(error REFT_DATA names no folder with sst2/test.jsonl and ARC-Easy/test.jsonl)) --limit $(LM_EVAL_LIMIT)

transcript:  ## docs/clients.md from a run of OpenAI's client and curl, and the last make lm-eval
	@scripts/install test
	@$(BIN)/python -m benchmarks.transcript

chaos:  ## kill -9 a real server 200 times while adapters change (CHAOS_KILLS=20 CHAOS_BACKEND=postgresql-s3)
	@scripts/install test
	@$(BIN)/python -m benchmarks.chaos --kills $(CHAOS_KILLS) --backend $(CHAOS_BACKEND)

docs:  ## write the pages that come from the code: the API, the settings, the methods
	@scripts/install test
	@$(BIN)/python -m server.http.api_reference docs/api.md
	@$(BIN)/python -m server.settings.reference docs/settings.md
	@$(BIN)/reft methods --markdown > docs/methods.md

clean:  ## remove the environments and caches
	rm -rf .venv .venv-oldest .venv-vllm .venv-bench-* .pytest_cache .mypy_cache .ruff_cache build *.egg-info
