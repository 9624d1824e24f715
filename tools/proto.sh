#!/bin/sh
# Writes the stubs of every .proto into the tree given as $1 (default: libs), with PYTHON's protoc.
set -eu
out=${1:-libs}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
protos=$(cd proto && find leasehold -name '*.proto' | LC_ALL=C sort)
# Only files that declare a service get gRPC stubs; etcd's own layout has no *_service.proto.
services=$(cd proto && find leasehold -name '*.proto' -exec grep -l '^service ' {} + | LC_ALL=C sort)
# shellcheck disable=SC2086 -- file names here have no blanks
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I proto --python_out="$out" --mypy_out="quiet:$out" $protos
# shellcheck disable=SC2086
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I proto --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" $services
