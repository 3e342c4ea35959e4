# Stands in for prom/prometheus:v2.55.1.
FROM debian:bookworm-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends prometheus busybox-static >/dev/null \
    && rm -rf /var/lib/apt/lists/* /etc/prometheus/* \
    && ln -s /bin/busybox /bin/wget \
    && install -d -o nobody -g nogroup /prometheus
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
EXPOSE 9090
ENTRYPOINT ["prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
