# Stands in for rust:1.95-bookworm: a C compiler and this machine's Rust, with CARGO_HOME where that image has it.
FROM debian:bookworm-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends gcc libc6-dev ca-certificates git >/dev/null \
    && rm -rf /var/lib/apt/lists/*
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/toolchain/bin:$PATH
COPY --from=toolchain bin /usr/local/toolchain/bin
COPY --from=toolchain lib /usr/local/toolchain/lib
COPY --from=certificates ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
