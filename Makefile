# Commands for users and developers. Start with `make quickstart`. CI runs `make check` and
# `make test`.

CARGO_TARGET := $(shell rustc -vV | sed -n 's/^host: //p')
PREFIX ?= /usr/local
# With `dev`, `bhatti` shares its dependencies with the tests: it compiles fast and runs slower.
BUILD_PROFILE ?= release
ifeq ($(BUILD_PROFILE),dev)
BUILT := debug
BUILD_FEATURES := --features bhatti-node/faults,tokio/test-util
else
BUILT := $(BUILD_PROFILE)
endif

.PHONY: build build-bhatti build-lohar quickstart test test-long test-data test-engines test-firecracker power-loss check audit api-check bench bench-check compare install clean

# Side by side: the agent is optimized as a whole, on one core.
build:
	@$(MAKE) --no-print-directory -j2 build-bhatti build-lohar
	mkdir -p dist
	install -m 0755 target/$(CARGO_TARGET)/$(BUILT)/bhatti target/$(CARGO_TARGET)/agent/lohar dist/

build-bhatti:
	cargo build --profile $(BUILD_PROFILE) --locked -p bhatti $(BUILD_FEATURES)

build-lohar:
	cargo build --profile agent --locked -p lohar

quickstart:
	./scripts/quickstart.sh

test:
	./scripts/test.sh

# The tests that take more than a minute each, which `make test` leaves out.
test-long: test-data
	cargo nextest run --locked --workspace --profile long

# Every engine's conformance tests, natively and in the KVM lab, as a table.
test-engines: build
	./scripts/test-engines.sh

# The daemon's tests on Firecracker, in the KVM lab if this machine has no KVM.
# PROGRAMS="vm_network vm_volumes" selects test programs.
test-firecracker: build
	./scripts/test-firecracker.sh $(PROGRAMS)

# Cuts the power of a recorded daemon at 300 points on ext4 and on XFS; takes about ten minutes.
# SEED=N repeats a choice of points.
power-loss: test-data
	cargo xtask power-loss --file-system ext4 --file-system xfs $(if $(SEED),--seed $(SEED))

check:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items
	cargo xtask tidy
	./scripts/check-dependencies.sh
	@echo 'SKIPPED: known vulnerabilities of dependencies, because their database is on the network: make audit'

audit:
	./scripts/check-dependencies.sh advisories

# Sends a daemon thousands of requests that the API's description allows; takes a few minutes.
api-check: build
	./scripts/api-check.sh

# The inputs of tests and benchmarks: packages, programs, images.
test-data:
	./scripts/test-data.sh

bench: test-data
	cargo xtask bench

# Checks whether the promises hold: ratios with their noise, and instruction counts.
bench-check: test-data
	cargo xtask bench check

# Compares bhatti with Docker, QEMU alone and the host, in turns.
compare: test-data
	./scripts/with-docker.sh cargo xtask compare

install: build
	install -D -m 0755 dist/bhatti $(DESTDIR)$(PREFIX)/bin/bhatti
	install -D -m 0755 dist/lohar $(DESTDIR)$(PREFIX)/lib/bhatti/lohar
	dist/bhatti man $(DESTDIR)$(PREFIX)/share/man/man1

clean:
	cargo clean
	rm -rf dist
