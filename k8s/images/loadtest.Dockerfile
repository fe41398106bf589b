# syntax=docker/dockerfile:1
# Load tests from inside the cluster: loadtest/k8s/job.yaml.
#   docker build -f k8s/images/loadtest.Dockerfile -t vase-sgl-loadtest:0.1.0 .

# To pin by digest: --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
RUN python -m venv /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
# The lock's versions, of what load tests need of them; the folder beside, for it is no package, and
# readable for all, whatever the checkout's modes are.
RUN pip install --constraint requirements-cpu.txt '.[loadtest]' \
    && cp -r loadtest /opt/vase-sgl/loadtest \
    && chmod -R a+rX /opt/vase-sgl/loadtest \
    && python -m loadtest --version

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vase-sgl-loadtest" \
      org.opencontainers.image.description="Load tests of the gateway of vase_sgl, with Locust" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# tini as the first process: it passes SIGTERM on and reaps.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 vase \
    && useradd --uid 10001 --gid 10001 --create-home vase
COPY --from=build /opt/vase-sgl /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /opt/vase-sgl
# It ends by itself, and its exit status says how it went.
HEALTHCHECK NONE
ENTRYPOINT ["tini", "--", "python", "-m", "loadtest"]
CMD ["--help"]
