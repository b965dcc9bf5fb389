# CMake toolchain of ci/aarch64: cross-compiles for Linux on AArch64, with the CPython headers of
# the Debian at TOKENMILL_AARCH64_ROOT.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(debian $ENV{TOKENMILL_AARCH64_ROOT}/usr/include)
file(GLOB Python_INCLUDE_DIR ${debian}/python3.*)
string(REGEX REPLACE ".*/python3[.]" "" minor "${Python_INCLUDE_DIR}")
set(PYTHON_MODULE_EXTENSION .cpython-3${minor}-aarch64-linux-gnu.so)
# For pyconfig.h, searched after the compiler's own headers.
set(CMAKE_CXX_FLAGS_INIT "-idirafter ${debian}")
