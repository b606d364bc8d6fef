# Everything starts here. Needs Python 3.11, make and git; the rest is fetched from the package registries.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .envs/base/bin
DEV := .envs/dev/bin
OUT ?= demo-output
BUF := npx --yes @bufbuild/buf@1.75.0
# Where this is set, each of a service's twenty processes compiles all that it imports, at each start: 54 s instead of 25 s (`make serve` says it).
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-open3d setup-cugraph demo serve test test-s3 lint proto proto-release types audit train lock bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## build the environments (.envs/<stage>) and fetch what the 3-D view needs
	@$(PYTHON) runtime_envs/build.py
	@sh runtime_envs/system.sh

setup-dev: ## the same, with the environment for tests and notebooks
	@$(PYTHON) runtime_envs/build.py base nnunet smoothing postprocess imaging dev numpy1
	@sh runtime_envs/system.sh
	@sh runtime_envs/system.sh chromium

setup-open3d: ## also the surface stage with open3d, an extra (SCANGRAPH_SMOOTHING__OPEN3D=true uses it)
	@$(PYTHON) runtime_envs/build.py smoothing-open3d
	@sh runtime_envs/system.sh open3d

setup-cugraph: ## also the mask stage with cugraph, an extra for GPUs (SCANGRAPH_POSTPROCESS__CUGRAPH=true uses it)
	@$(PYTHON) runtime_envs/build.py postprocess-cugraph

demo: setup ## run the main job: make demo [CT=path.nii.gz] [OUT=dir]
	@$(BIN)/scangraph demo $(if $(CT),--ct "$(CT)") --out "$(OUT)"

serve: setup ## start the service: make serve [PORT=8000]
	@$(BIN)/scangraph serve $(if $(PORT),--port $(PORT))

lint: setup-dev ## style
	@$(DEV)/ruff check .
	@$(DEV)/ruff format --check .

proto: ## style of proto/, and whether it breaks clients of the last release (needs npx)
	@cd proto && $(BUF) lint && $(BUF) breaking --against released/v1.binpb

proto-release: ## keep proto/ as what the next changes must not break
	@cd proto && $(BUF) build -o released/v1.binpb

types: setup-dev ## types
	@$(DEV)/mypy

test: lint types ## every check
	@$(DEV)/python -m pytest $(PYTEST)

test-s3: setup-dev ## the service's tests with its files in S3: make test-s3 [S3=moto|radosgw]
	@$(DEV)/python -m tests.s3 $(or $(S3),moto) $(abspath $(DEV))/python -m pytest tests/gateway tests/executor tests/imageio \
		tests/scangraph/test_client.py tests/scangraph/test_remote_cli.py $(PYTEST)

audit: setup-dev ## ask an advisory database for known faults of the locked packages (SCANGRAPH_OSV=address)
	@$(DEV)/python -m cluster.audit

train: setup-dev ## train the demonstration models again (up to an hour on a CPU)
	@.envs/nnunet/bin/python -m models.training.train
	@$(DEV)/python -m models.training.detector

bench: setup-dev ## measure again what benchmarks/README.md quotes
	@$(DEV)/python -m benchmarks.nifti
	@$(DEV)/python -m benchmarks.display
	@$(DEV)/python -m benchmarks.hops
	@$(DEV)/python -m benchmarks.starts
	@$(DEV)/python -m benchmarks.load
	@$(DEV)/python -m benchmarks.autoscaling
	@$(DEV)/python -m benchmarks.uploads 2
	@$(DEV)/python -m benchmarks.faults
	@$(DEV)/python -m benchmarks.doors.grpc
	@$(DEV)/python -m benchmarks.doors.kafka
	@$(DEV)/python -m benchmarks.nnunet.speed
	@$(DEV)/python -m benchmarks.nnunet.export
	@$(DEV)/python -m benchmarks.nnunet.profile
	@$(DEV)/python -m benchmarks.nnunet.fallbacks
	@$(DEV)/python -m benchmarks.smoothing.speed
	@$(DEV)/python -m benchmarks.smoothing.quality
	@$(DEV)/python -m benchmarks.smoothing.files
	@$(DEV)/python -m benchmarks.smoothing.distances
	@$(DEV)/python -m benchmarks.postprocess.repair
	@$(DEV)/python -m benchmarks.postprocess.derived
	@$(DEV)/python -m benchmarks.imaging
	@$(DEV)/python -m benchmarks.doors.observability
	@$(DEV)/python -m benchmarks.page

lock: ## resolve runtime_envs/*.in into the locks again
	@$(PYTHON) runtime_envs/build.py --lock

clean: ## remove environments and results, keep the data folder
	rm -rf .envs scangraph/imageflow demo-output .pytest_cache .mypy_cache .ruff_cache
