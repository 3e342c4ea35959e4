# `make` lists what there is to make.

EVENTS ?=

.PHONY: help build run demo test chaos lint servers

help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the release binary, target/release/standpipe
	cargo build --release --locked

run: build ## Run reader and worker with the environment's settings
	./target/release/standpipe run

demo: servers build ## Watch it work, with private servers and a simulated relay; EVENTS=200000 stops after that many
	./target/release/standpipe demo $(if $(EVENTS),--events $(EVENTS))

test: servers ## Run all tests, against private servers
	cargo test --locked

chaos: servers ## Break everything at random for twenty minutes; CHAOS_SECONDS=..., STANDPIPE_SEED=... and more in tests/chaos.rs
	CHAOS_EVENTS=$${CHAOS_EVENTS:-500000} CHAOS_SECONDS=$${CHAOS_SECONDS:-1200} \
	CHAOS_DAEMON_KILLS=$${CHAOS_DAEMON_KILLS:-200} CHAOS_REDIS_KILLS=$${CHAOS_REDIS_KILLS:-40} \
	CHAOS_POSTGRES_KILLS=$${CHAOS_POSTGRES_KILLS:-40} CHAOS_CUTS=$${CHAOS_CUTS:-100} CHAOS_OTHERS=$${CHAOS_OTHERS:-8} \
	cargo test --release --locked --test chaos -- --nocapture

lint: ## Check the formatting and the lints
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings

servers: ## Install redis-server and postgresql when they are missing
	./scripts/install-servers.sh
