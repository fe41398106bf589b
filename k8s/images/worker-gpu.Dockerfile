# syntax=docker/dockerfile:1
# SGLang with the plugin, for NVIDIA GPUs.
#   docker build -f k8s/images/worker-gpu.Dockerfile -t vase-sgl-worker-gpu:0.1.0 .

# The -devel image: SGLang compiles some kernels at run time and needs nvcc for it.
# To pin by digest: --build-arg CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04@sha256:...
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
RUN pip install --constraint k8s/images/constraints-gpu.txt '.[gpu]' \
    && vase-sgl doctor --require worker

FROM ${CUDA_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vase-sgl-worker-gpu" \
      org.opencontainers.image.description="SGLang with a fixed KV-cache budget per request, for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# g++, ninja and Python's headers for kernels compiled at run time; libnuma for sglang-kernel. tini
# passes SIGTERM to the server alone, so that its children live until the last answer is out.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ libnuma1 libsndfile1 ninja-build python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 vase \
    && useradd --uid 10001 --gid 10001 --create-home vase
COPY --from=build /opt/vase-sgl /opt/vase-sgl
ENV PATH=/opt/vase-sgl/bin:$PATH \
    CUDA_HOME=/usr/local/cuda \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /home/vase
EXPOSE 30000
# Loading takes minutes, and SGLang takes up to 20 s to call itself unhealthy.
HEALTHCHECK --interval=30s --timeout=25s --start-period=30m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:30000/health', timeout=24)"]
ENTRYPOINT ["tini", "--", "vase-sgl"]
CMD ["worker", "--help"]
