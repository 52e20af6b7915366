#!/usr/bin/env bash
# Runs tests on an emulated 64-bit ARM, with the wheels that such a machine gets, with NumPy and with the compiled
# products:
#
#     tools/aarch64.sh FOLDER [PYTEST ARGUMENTS: both ways, instead of the list below]
#
# FOLDER keeps Debian's arm64 Python and the wheels for the next time (300 MB). Needs Debian with qemu-user and
# gcc-aarch64-linux-gnu (which includes libc6-dev-arm64-cross). It is slow: some twenty times.
set -euo pipefail

# What TPILITE_NATIVE concerns runs without compiled code first. The rest does the same with and without: it tests
# NumPy's products, the compiled ones or both by themselves.
OF_ENGINES=(tests/engine/test_engine.py tests/engine/test_families.py tests/engine/test_gguf_models.py)
OTHERS=(tests/linear tests/native tests/model tests/net/test_group.py tests/weights/test_pager.py
    tests/engine/test_bits.py)

# Debian's arm64 Python, the wheels for it, and `python`, which starts it.
prepare() {
    local folder=$1 interpreter deb
    mkdir -p "$folder"/{apt/lists/partial,apt/archives/partial,sys}
    : > "$folder/apt/status"
    local apt=(apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt"
        -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" -o Debug::NoLocking=1)
    "${apt[@]}" update
    "${apt[@]}" install -y --no-install-recommends --download-only python3 libstdc++6
    for deb in "$folder"/apt/archives/*.deb; do dpkg-deb -x "$deb" "$folder/sys"; done
    interpreter=$(cd "$folder/sys/usr/bin" && printf '%s\n' python3.[0-9]* | head -1)
    python3 -m venv "$folder/pip"
    "$folder/pip/bin/pip" install -q --target "$folder/site" --only-binary=:all: \
        --python-version "${interpreter#python}" --platform manylinux_2_28_aarch64 \
        --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        numpy safetensors sentencepiece tiktoken msgpack tqdm 'pytest>=8' hypothesis jinja2
    # With this name as its own, Python starts others of its kind by the same way.
    # shellcheck disable=SC2016 # these are for the shell that starts it
    printf '#!/bin/sh\nexec qemu-aarch64 -L %s/sys -0 "$0" %s/sys/usr/bin/%s "$@"\n' \
        "$folder" "$folder" "$interpreter" > "$folder/python"
    chmod +x "$folder/python"
}

# The sources in a folder of their own, so that libraries of two processors do not lie side by side.
build() {
    local folder=$1 root=$2 suffix
    rm -rf "$folder/work"
    mkdir "$folder/work"
    tar -C "$root" -c --exclude='*.so' --exclude=.git --exclude=.venv --exclude=build . |
        tar -C "$folder/work" -x
    # Optional material of the tests, which they look for beside the sources.
    if [ -d "$root/../shared" ]; then ln -sfn "$(cd "$root/../shared" && pwd)" "$folder/shared"; fi
    cd "$folder/work"
    # The compiler is that of the tests too, which load what they build.
    export PYTHONPATH="$folder/work:$folder/site" CC=aarch64-linux-gnu-gcc
    suffix=$("$folder/python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    local flags=(-O3 -pthread -shared -fPIC)
    "$CC" "${flags[@]}" -o "tpilite/native/_products$suffix" tpilite/native/{products,blocks_avx512}.c
    "$CC" "${flags[@]}" -o "tpilite/native/_exchange$suffix" tpilite/native/exchange.c
}

# Runs the tests with (1) or without (0) compiled code.
run_tests() {
    local folder=$1 native=$2
    shift 2
    echo "TPILITE_NATIVE=$native"
    TPILITE_NATIVE=$native "$folder/python" -m pytest -q -p no:cacheprovider "$@"
}

main() {
    local folder root status=0
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
    root=$(cd "$(dirname "$0")/.." && pwd)
    [ -e "$folder/python" ] || prepare "$folder"
    build "$folder" "$root"
    if [ $# -gt 0 ]; then
        run_tests "$folder" 0 "$@" || status=1
        run_tests "$folder" 1 "$@" || status=1
    else
        run_tests "$folder" 0 "${OF_ENGINES[@]}" || status=1
        run_tests "$folder" 1 "${OF_ENGINES[@]}" "${OTHERS[@]}" || status=1
    fi
    return $status
}

# Bash reads a script while it runs it: all of it is read here, and whoever edits it then changes nothing.
main "$@"; exit
