#!/bin/sh
# Builds static binaries, for `just dist` and the Dockerfile:
#
#   deploy/build.sh guest GUEST        the default guest, compiled
#   deploy/build.sh full GUEST FILE    kvs with a compiler, and with that guest in it
#   deploy/build.sh small GUEST FILE   kvs without
set -eu
what=$1 guest=$2
cd "$(dirname "$0")/.."
target=$(uname -m)-unknown-linux-musl

# Whole programs are optimized, which needs them whole.
export CARGO_INCREMENTAL=0
# No path of this machine is in what is built, nor in the guest.
flags="--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo"
export CARGO_TARGET_WASM32_WASIP2_RUSTFLAGS="$flags"
# Addresses that are set at the start take two bits each; nothing unwinds.
flags="$flags -Clink-arg=-Wl,-z,pack-relative-relocs -Cforce-unwind-tables=no"
export "CARGO_TARGET_$(echo "$target" | tr a-z- A-Z_)_RUSTFLAGS=$flags"

export "CFLAGS_$(echo "$target" | tr - _)=-fno-asynchronous-unwind-tables -fno-unwind-tables"

build() {
    cargo rustc --locked --package kvs --bin kvs --profile dist --target "$target" "$@" -- -Clink-arg=-Wl,-T,deploy/static.ld
}

case $what in
guest)
    build
    "target/$target/dist/kvs" compile --output "$guest"
    exit
    ;;
full) COMPILED_GUEST=$guest build ;;
small) COMPILED_GUEST=$guest build --no-default-features ;;
esac
mkdir -p "$(dirname "$3")"
strip -o "$3" "target/$target/dist/kvs"
