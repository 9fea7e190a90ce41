set shell := ["bash", "-euo", "pipefail", "-c"]

# What can be done here
[private]
default:
    @just --list --unsorted --list-heading $'just RECIPE\n'

# Build everything and serve on 127.0.0.1:8080; flags go to `kvs serve`, try --help
[group('run')]
serve *FLAGS: _target
    cargo build --release
    exec ./target/release/kvs serve {{ FLAGS }}

# Run all tests; a filter picks some: just test book
[group('develop')]
test *FILTER: _target (_tool "curl")
    cargo test --release {{ FILTER }}

# Measure requests beside a plain hyper map, in one run
[group('develop')]
bench: _target (_tool "wrk")
    cargo bench --bench bench

# Format, lint and check the documentation, as CI does
[group('develop')]
lint: _target
    cargo fmt --all --check
    cargo clippy --release --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# The target that guests are compiled for
_target:
    @rustup target list --installed | grep -qx wasm32-wasip2 || { echo "adding the target wasm32-wasip2"; rustup target add wasm32-wasip2; }

# A tool from the system's packages
_tool NAME:
    @command -v {{ NAME }} >/dev/null || { \
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
            echo "installing {{ NAME }}"; apt-get update -qq && apt-get install -y -qq {{ NAME }} >/dev/null; \
        else echo "{{ NAME }} is missing; install it, for instance with: sudo apt-get install {{ NAME }}" >&2; exit 1; fi; }
