# One image for every node of a cluster: head, ingresses and replicas must have the same Python and Ray.
#   docker build -t shoal:0.1.0 .
# torch brings its own CUDA libraries; of the base come the driver's interface and what Triton's and our C++ kernels are
# compiled with at the first start.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONSAFEPATH=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY kernels kernels
COPY parallel parallel
COPY runtime runtime
COPY router router
COPY cluster cluster
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && pip install --no-cache-dir --constraint constraints.txt /wheels/*.whl

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --create-home shoal \
    && install --directory --owner shoal /opt/shoal
COPY --from=build /opt/venv /opt/venv
# `shoal.cluster.ray_env`'s settings of a node: Serve reads them wherever Ray starts.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONSAFEPATH=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0 \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=30 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/shoal/haproxy \
    RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=/tmp/shoal/haproxy.cfg \
    RAY_SERVE_HAPROXY_SOCKET_PATH=/tmp/shoal/admin.sock \
    RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=/tmp/shoal/metrics.sock \
    RAY_SERVE_HAPROXY_SERVER_STATE_BASE=/tmp/shoal \
    RAY_SERVE_HAPROXY_SERVER_STATE_FILE=/tmp/shoal/server-state \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600
USER 1000
WORKDIR /home/shoal
RUN python -c "from pathlib import Path; from shoal.cluster.ray_env import write_launcher; write_launcher(Path('/opt/shoal'))" \
    && chmod 755 /opt/shoal/haproxy
ENTRYPOINT ["shoal"]
CMD ["--help"]
