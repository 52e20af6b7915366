#!/usr/bin/env bash
# Runs tests on an emulated 64-bit ARM, with the wheels that such a machine gets, with NumPy and with the compiled
# products:
#
#     tools/aarch64.sh FOLDER [PYTEST ARGUMENTS]
#
# FOLDER keeps Debian's arm64 Python and the wheels for the next time (300 MB). Needs Debian with qemu-user and
# gcc-aarch64-linux-gnu (which includes libc6-dev-arm64-cross). It is slow: some twenty times.
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
root=$(cd "$(dirname "$0")/.." && pwd)
tests=("$@")
[ $# -gt 0 ] || tests=(tests/linear tests/native/test_products.py tests/model tests/net/test_group.py
    tests/engine/test_bits.py tests/engine/test_engine.py tests/weights/test_pager.py)

if [ ! -e "$folder/python" ]; then
    mkdir -p "$folder"/{apt/lists/partial,apt/archives/partial,sys}
    : > "$folder/apt/status"
    apt=(apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt"
        -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" -o Debug::NoLocking=1)
    "${apt[@]}" update
    "${apt[@]}" install -y --no-install-recommends --download-only python3 libstdc++6
    for deb in "$folder"/apt/archives/*.deb; do dpkg-deb -x "$deb" "$folder/sys"; done
    interpreter=$(cd "$folder/sys/usr/bin" && ls python3.[0-9]* | head -1)
    python3 -m venv "$folder/pip"
    "$folder/pip/bin/pip" install -q --target "$folder/site" --only-binary=:all: \
        --python-version "${interpreter#python}" --platform manylinux_2_28_aarch64 \
        --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        numpy safetensors sentencepiece tiktoken msgpack tqdm 'pytest>=8' hypothesis jinja2
    # With this name as its own, Python starts others of its kind by the same way.
    printf '#!/bin/sh\nexec qemu-aarch64 -L %s/sys -0 "$0" %s/sys/usr/bin/%s "$@"\n' \
        "$folder" "$folder" "$interpreter" > "$folder/python"
    chmod +x "$folder/python"
fi

# A copy of the sources, so that libraries of two processors do not lie side by side.
rm -rf "$folder/work"
mkdir "$folder/work"
tar -C "$root" -c --exclude='*.so' --exclude=.git --exclude=.venv --exclude=build . | tar -C "$folder/work" -x
cd "$folder/work"
export PYTHONPATH="$folder/work:$folder/site" CC=aarch64-linux-gnu-gcc
suffix=$("$folder/python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
for name in products exchange; do
    "$CC" -O3 -pthread -shared -fPIC -o "tpilite/native/_$name$suffix" "tpilite/native/$name.c"
done
status=0
for native in 0 1; do
    echo "TPILITE_NATIVE=$native"
    TPILITE_NATIVE=$native "$folder/python" -m pytest -q -p no:cacheprovider "${tests[@]}" || status=1
done
exit $status
