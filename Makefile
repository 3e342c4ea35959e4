# `make` lists what there is to make.

EVENTS ?=
# What is built for tests: with everything, and the same for every target, so that nothing is compiled twice.
FEATURES := --features kafka

.PHONY: help build deb run demo bench bench-check test test-deb test-ui test-clients test-kafka long chaos fuzz lint deny test-monitoring test-compose servers previous-release

help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the release binaries, target/release/standpipe and standpipe-lab
	cargo build --release --locked

deb: $(if $(BINARY),,build) ## Pack it as target/debian/standpipe_*.deb; BINARY=... packs another one
	BINARY='$(BINARY)' ./scripts/make-deb.sh

run: build ## Run reader and worker with the environment's settings
	./target/release/standpipe run

demo: servers build ## Watch it work, with private servers and a simulated relay; EVENTS=200000 stops after that many
	./target/release/standpipe-lab demo $(if $(EVENTS),--events $(EVENTS))

bench: servers build ## Measure throughput, latency and memory; BENCH='--sweep --svg docs' for more (standpipe-lab bench --help)
	./target/release/standpipe-lab bench $(BENCH)

bench-check: ## Count the instructions of the hot paths and compare with those noted; UPDATE=1 notes them anew; needs valgrind
	./scripts/bench-check.sh

test: previous-release ## Run all tests, against private servers
	./scripts/install-servers.sh pgbouncer
	skip=; ./scripts/install-rabbitmq.sh || { skip='-- --skip amqp::'; echo 'the RabbitMQ tests are skipped' >&2; }; \
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$(($$(nproc) + 2))} cargo test --locked --no-fail-fast $(FEATURES) $$skip

test-deb: deb ## Install the package in a fresh Debian, run its units under systemd, purge it; as root, installs debootstrap
	./scripts/test-deb.sh

long: previous-release ## What `make test` has shorter variants of, in full: floods and outages of a minute, a backfill of 20,000 accounts, 20,000 lost commits, live latency beside bad servers and floods, 100,000 events to twenty subscribers, a thousand requests through twenty kills, RabbitMQ, Kafka, functions for tasks, convergence with 5,000 cases, the long chaos run
	./scripts/install-servers.sh pgbouncer
	./scripts/install-rabbitmq.sh
	STANDPIPE_LONG=1 cargo test --locked --no-fail-fast $(FEATURES) --test it -- --nocapture upstream:: database::
	STANDPIPE_LONG=1 cargo test --release --locked --no-fail-fast $(FEATURES) --test it -- --nocapture --test-threads=1 backfill:: lost:: hosts:: latency:: subscribe:: ingest::every amqp:: kafka:: handlers::
	STANDPIPE_CASES=5000 cargo test --release --locked $(FEATURES) --test it convergence::
	$(MAKE) chaos

chaos: servers ## Break everything at random for twenty minutes; CHAOS_SECONDS=..., STANDPIPE_SEED=... and more in tests/it/chaos.rs
	CHAOS_EVENTS=$${CHAOS_EVENTS:-500000} CHAOS_SECONDS=$${CHAOS_SECONDS:-1200} \
	CHAOS_DAEMON_KILLS=$${CHAOS_DAEMON_KILLS:-200} CHAOS_REDIS_KILLS=$${CHAOS_REDIS_KILLS:-40} \
	CHAOS_POSTGRES_KILLS=$${CHAOS_POSTGRES_KILLS:-40} CHAOS_CUTS=$${CHAOS_CUTS:-100} CHAOS_OTHERS=$${CHAOS_OTHERS:-8} \
	cargo test --release --locked $(FEATURES) --test it -- --nocapture chaos::

fuzz: ## Give the decoders a million broken frames and entries; FUZZ_CASES=... for more
	FUZZ_CASES=$${FUZZ_CASES:-1000000} cargo test --release --locked $(FEATURES) --test it -- --nocapture decoders::

test-ui: servers ## Look at the dashboard in a browser: press its buttons, make the pictures in docs/images; installs Chromium when it is missing
	./scripts/install-browser.sh
	UI_WARM_UP=$${UI_WARM_UP:-60} cargo test --locked $(FEATURES) --test it -- --ignored --nocapture dashboard_browser::

lint: ## Check the formatting, the lints and, where cargo-deny is installed, the dependencies
	cargo fmt --check
	cargo clippy --all-targets --locked $(FEATURES) -- -D warnings
	cargo clippy --locked --no-default-features -- -D warnings
	./scripts/deny.sh

deny: ## Check licences, sources and known holes of the dependencies; needs cargo-deny
	DENY=required ./scripts/deny.sh

test-monitoring: ## Test the alert rules and the dashboard of monitoring/; gets promtool when it is missing
	./scripts/install-promtool.sh
	cargo test --locked $(FEATURES) --test it -- --include-ignored monitoring::

test-compose: $(if $(BINARY),,build) ## Try Dockerfile, compose file and monitoring with a real Docker engine; as root; FULL=1 compiles in the container, BINARY=... compiles nothing
	./tests/compose/scenario.sh $(if $(FULL),--full)

test-kafka: ## Send events through a topic of another broker than the stand-in of the other tests, Tansu; gets it into target/tools
	./scripts/install-tansu.sh
	cargo test --locked $(FEATURES) --test it -- --ignored --nocapture kafka::events

test-clients: ## Connect npm's and PyPI's clients for Jetstreams (versions 1 and 2); installs them into target/tools
	./scripts/install-clients.sh
	cargo test --locked $(FEATURES) --test it -- --ignored subscribe::a_client events::a_client

servers: ## Install redis-server and postgresql when they are missing
	./scripts/install-servers.sh

previous-release: ## Build the release before this one, for the tests that have both work side by side; does nothing when it is there
	./scripts/previous-release.sh
