FROM rust:1.95-bookworm AS builder
WORKDIR /build
COPY . .
# What --version shows beside the number: docker build --build-arg STANDPIPE_COMMIT=$(git rev-parse --short=12 HEAD)
ARG STANDPIPE_COMMIT=""
# The cache mounts keep the registry and the compiled dependencies between builds, also when Cargo.lock changes: only
# what changed is compiled again. They are no part of the image, so the binary is copied out in the same step.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/build/target,sharing=locked \
    cargo build --locked --release --package standpipe --features kafka \
    && install -D target/release/standpipe /out/standpipe

# The same Debian release as the builder: the binary needs its glibc or a newer one.
FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="standpipe" \
      org.opencontainers.image.description="AT Protocol firehose into a Redis stream and PostgreSQL" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
# The certificate authorities, for sslmode=verify-full and the like; the builder's image has them already.
COPY --from=builder /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=builder /out/standpipe /usr/local/bin/standpipe
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/standpipe/
# A number, so that "run as non-root" rules can check it without reading /etc/passwd. It writes no file.
USER 10001:10001
# On the default address, 127.0.0.1, nobody outside of the container could read metrics or health.
ENV HTTP_ADDR=0.0.0.0:9464
EXPOSE 9464
# SIGTERM starts the drain; give it longer than DRAIN_TIMEOUT (25s) before the kill: docker stop -t 40.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["standpipe", "healthcheck"]
ENTRYPOINT ["standpipe"]
CMD ["run"]
