#!/bin/sh
# Generates the gRPC code in vase_sgl/rpc/v1 from proto/vase/v1. PYTHON names the interpreter that
# has grpcio-tools and mypy-protobuf; OUT is the folder that holds vase_sgl/ (default: the checkout).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-.}
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
# The mapping makes the import path of the generated code vase_sgl.rpc.v1.
protoc() {
    "$python" -m grpc_tools.protoc \
        -Ivase_sgl/rpc/v1=proto/vase/v1 \
        --plugin=protoc-gen-mypy="$scripts/protoc-gen-mypy" \
        --plugin=protoc-gen-mypy_grpc="$scripts/protoc-gen-mypy_grpc" \
        --python_out="$out" --mypy_out=quiet:"$out" "$@"
}
protoc --grpc_python_out="$out" --mypy_grpc_out=quiet:"$out" vase_sgl/rpc/v1/gateway.proto
protoc vase_sgl/rpc/v1/status.proto
