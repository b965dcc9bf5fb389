# Sourced by the scripts beside it: a virtual environment of their own, with torch in it.
# nvcc is taken from the path or from /usr/local/cuda.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || PATH=/usr/local/cuda/bin:$PATH

step() { printf '\n[%(%H:%M:%S)T] %s\n' -1 "$*"; }

# make_venv NAME: .venv-NAME with pip and torch. TOKENMILL_TORCH names another requirement. Each
# torch is unpacked once, into .venv-torch-*: the others begin with links to its files, which pip
# replaces and never changes.
make_venv() {
  local python=${PYTHON:-python3} torch=${TOKENMILL_TORCH:-torch>=2.10} base from to
  local folder='import sysconfig; print(sysconfig.get_path("purelib"))'
  VENV=$ROOT/.venv-$1
  step "virtual environment $VENV"
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    base=$ROOT/.venv-torch-$("$python" -c 'import platform; print(platform.python_version())')
    base+=-${torch//[^0-9.]/}
    if ! "$base/bin/python" -m pip --version >/dev/null 2>&1; then
      "$python" -m venv "$base"
      "$base/bin/python" -m pip install -q --upgrade pip
    fi
    install_torch "$base/bin/python" "$torch"
    "$python" -m venv --without-pip "$VENV"
    from=$("$base/bin/python" -c "$folder") to=$("$VENV/bin/python" -c "$folder")
    cp -Rlf "$from/." "$to" 2>/dev/null || cp -R --remove-destination "$from/." "$to"
  fi
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
  install_torch python "$torch"
  python -c 'import importlib.metadata as m; print("torch", m.version("torch"))'
}

pip() { python -m pip "$@"; } # the environments have no script of that name

# install_torch PYTHON REQUIREMENT. A wheel that PIP_FIND_LINKS offers (a CPU build, say) is taken
# before the index is asked, whose newest torch for Linux brings gigabytes of CUDA.
install_torch() {
  "$1" -m pip install -q --no-index --no-deps "$2" 2>/dev/null || true
  "$1" -m pip install -q "$2"
}

# The workers share the cores: a thread of OpenMP that spins while it waits takes those of others.
run_tests() { OMP_WAIT_POLICY=passive python -m pytest -n auto --dist worksteal "$@"; }

cuda_wanted() { [ "${TOKENMILL_CUDA:-}" != 0 ] && command -v nvcc >/dev/null; }

# Headers of CUTLASS for the CUDA half, without what that package wants at run time, unless
# TOKENMILL_CUTLASS points to some.
cutlass_headers() {
  if cuda_wanted && [ -z "${TOKENMILL_CUTLASS:-}" ]; then
    [ -d out/cutlass/cutlass_library ] ||
      python -m pip install -q --no-deps --target out/cutlass "nvidia-cutlass>=4.2"
    export TOKENMILL_CUTLASS=$ROOT/out/cutlass/cutlass_library/source
  fi
}
