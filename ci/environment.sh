# Sourced by the other scripts of this folder: makes their virtual environments, with torch.
# nvcc is searched on the path and in /usr/local/cuda.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || PATH=/usr/local/cuda/bin:$PATH

step() { printf '\n[%(%H:%M:%S)T] %s\n' -1 "$*"; }

# make_venv NAME: .venv-NAME with pip and torch. TOKENMILL_TORCH overrides the requirement. Each
# torch is unpacked once, into .venv-torch-*: other environments start as hard links to its files,
# which pip replaces and never modifies.
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

pip() { python -m pip "$@"; } # the environments have no pip script

# install_torch PYTHON REQUIREMENT. A wheel from PIP_FIND_LINKS (for example a CPU build) takes
# precedence over the index, whose newest torch for Linux pulls in gigabytes of CUDA.
install_torch() {
  "$1" -m pip install -q --no-index --no-deps "$2" 2>/dev/null || true
  "$1" -m pip install -q "$2"
}

# The workers share the cores: OpenMP threads must not spin while they wait.
run_tests() { OMP_WAIT_POLICY=passive python -m pytest -n auto --dist worksteal "$@"; }

cuda_wanted() { [ "${TOKENMILL_CUDA:-}" != 0 ] && command -v nvcc >/dev/null; }

# CUTLASS headers for the CUDA build, without the package's runtime requirements, unless
# TOKENMILL_CUTLASS is set.
cutlass_headers() {
  if cuda_wanted && [ -z "${TOKENMILL_CUTLASS:-}" ]; then
    [ -d out/cutlass/cutlass_library ] ||
      python -m pip install -q --no-deps --target out/cutlass "nvidia-cutlass>=4.2"
    export TOKENMILL_CUTLASS=$ROOT/out/cutlass/cutlass_library/source
  fi
}
