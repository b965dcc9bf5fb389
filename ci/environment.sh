# Sourced by the scripts beside it: a virtual environment of their own, with torch in it.
# nvcc is taken from the path or from /usr/local/cuda.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] || PATH=/usr/local/cuda/bin:$PATH

step() { printf '\n[%(%H:%M:%S)T] %s\n' -1 "$*"; }

# make_venv NAME: .venv-NAME with pip and torch. TOKENMILL_TORCH names another requirement.
make_venv() {
  local torch=${TOKENMILL_TORCH:-torch>=2.10}
  VENV=$ROOT/.venv-$1
  step "virtual environment $VENV"
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
  python -m pip install -q --upgrade pip
  step "$torch"
  # A wheel that PIP_FIND_LINKS offers (a CPU build, say) is taken before the index is asked, whose
  # newest torch for Linux brings gigabytes of CUDA.
  python -m pip install -q --no-index --no-deps "$torch" 2>/dev/null || true
  python -m pip install -q "$torch"
  python -c 'import importlib.metadata as m; print("torch", m.version("torch"))'
}

# The workers share the cores: a thread of OpenMP that spins while it waits takes those of others.
run_tests() { OMP_WAIT_POLICY=passive python -m pytest -n auto --dist worksteal "$@"; }

cuda_wanted() { [ "${TOKENMILL_CPU_ONLY:-}" != 1 ] && command -v nvcc >/dev/null; }

# Headers of CUTLASS for the CUDA half, without what that package wants at run time, unless
# TOKENMILL_CUTLASS points to some.
cutlass_headers() {
  if cuda_wanted && [ -z "${TOKENMILL_CUTLASS:-}" ]; then
    [ -d out/cutlass/cutlass_library ] ||
      python -m pip install -q --no-deps --target out/cutlass "nvidia-cutlass>=4.2"
    export TOKENMILL_CUTLASS=$ROOT/out/cutlass/cutlass_library/source
  fi
}
