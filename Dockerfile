# kvs in an image with nothing else in it:
#
#   docker build -t kvs .                        the full flavour, which compiles guests
#   docker build -t kvs:small --target small .   the small one, whose guests come compiled
#
# `just image` does so with docker, podman or buildah.

ARG RUST=docker.io/library/rust:1.95-bookworm

FROM ${RUST} AS tools
RUN command -v musl-gcc && command -v cmake || { \
        apt-get update && apt-get install --yes --no-install-recommends cmake musl-tools && rm -rf /var/lib/apt/lists/*; }
RUN rustup target add wasm32-wasip2 "$(uname -m)-unknown-linux-musl"
WORKDIR /src

# Dependencies are a layer of their own, which stays until they change: they are built for a program that does nothing.
FROM tools AS dependencies
COPY Cargo.toml Cargo.lock ./
COPY guest/counters/Cargo.toml guest/counters/
COPY guest/default/Cargo.toml guest/default/
COPY guest/extension/Cargo.toml guest/extension/
COPY guest/kit/Cargo.toml guest/kit/
COPY guest/kvs/Cargo.toml guest/kvs/
COPY guest/locks/Cargo.toml guest/locks/
COPY guest/schema/Cargo.toml guest/schema/
COPY guest/template/Cargo.toml guest/template/
COPY host/Cargo.toml host/
COPY host/client/Cargo.toml host/client/
COPY host/metrics/Cargo.toml host/metrics/
COPY host/runtime/Cargo.toml host/runtime/
COPY host/txlog/Cargo.toml host/txlog/
COPY tests/Cargo.toml tests/
COPY tests/guests/brittle/Cargo.toml tests/guests/brittle/
COPY tests/guests/faulty/Cargo.toml tests/guests/faulty/
COPY tests/guests/single/Cargo.toml tests/guests/single/
COPY tests/guests/unruly/Cargo.toml tests/guests/unruly/
COPY deploy/build.sh deploy/static.ld deploy/
RUN for package in guest/* tests/guests/* host host/client host/metrics host/runtime host/txlog; do mkdir -p "$package/src" && touch "$package/src/lib.rs"; done \
    && mkdir -p host/examples/documents tests/bench tests/delivered tests/e2e && touch tests/lib.rs \
    && for program in host/build host/examples/documents/main host/src/main tests/bench/main tests/delivered/main tests/e2e/main; do \
        echo 'fn main() {}' > "$program.rs"; done \
    && deploy/build.sh guest /dev/null

FROM dependencies AS guest
COPY . .
# Newer than what was built of the program that does nothing, or of others.
RUN find . -path ./target -prune -o -name '*.rs' -exec touch {} + \
    && deploy/build.sh guest /guest.cwasm
# Whom `kvs get https://…` trusts, and a directory that belongs to the user below.
RUN install -D -m 644 /etc/ssl/certs/ca-certificates.crt /out/etc/ssl/certs/ca-certificates.crt \
    && install -d -o 65532 -g 65532 /out/data

FROM guest AS build-full
RUN touch host/build.rs host/src/*.rs && deploy/build.sh full /guest.cwasm /out/kvs

FROM guest AS build-small
RUN touch host/build.rs host/src/*.rs && deploy/build.sh small /guest.cwasm /out/kvs

FROM scratch AS image
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kvs" \
    org.opencontainers.image.description="A key-value store whose logic is a WebAssembly component" \
    org.opencontainers.image.licenses="Apache-2.0 OR MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
ENV KVS_LISTEN=0.0.0.0:8080 KVS_DATA_DIR=/data
USER 65532:65532
EXPOSE 8080
# It is ready when the log is replayed.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD ["/kvs", "health"]
ENTRYPOINT ["/kvs"]
CMD ["serve"]

FROM image AS small
COPY --from=build-small /out/ /
VOLUME /data

FROM image AS full
COPY --from=build-full /out/ /
VOLUME /data
