# syntax=docker/dockerfile:1
# The gateway and the command line: neither torch nor SGLang.
#   docker build -f k8s/images/gateway.Dockerfile -t vase-sgl-gateway:0.1.0 .

# To pin by digest: --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
RUN python -m venv /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
# The lock's versions, of what the gateway needs of them.
RUN pip install --constraint requirements-cpu.txt '.[gateway]' \
    && install -m 0755 k8s/images/vase_grpc_health.py /opt/vase-sgl/bin/vase-grpc-health \
    && sed -i '1s|.*|#!/opt/vase-sgl/bin/python|' /opt/vase-sgl/bin/vase-grpc-health \
    && vase-sgl doctor --require gateway

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vase-sgl-gateway" \
      org.opencontainers.image.description="Gateway of vase_sgl: tenants, seeds, audit records, replay" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# tini as the first process: it passes SIGTERM on and reaps.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 vase \
    && useradd --uid 10001 --gid 10001 --create-home vase \
    && install -d -o vase -g vase /var/lib/vase-sgl
COPY --from=build /opt/vase-sgl /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/vase-sgl
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s CMD ["vase-grpc-health"]
ENTRYPOINT ["tini", "--", "vase-sgl"]
CMD ["serve", "--help"]
