# A weak function compiled for one instruction set may be the copy that the linker keeps for all of
# them, and then fault on an older machine. Everything that a cpu*.cpp emits must be local or in the
# namespace of its instruction set.
#   cmake -DNM=nm -DISA=avx2 -DOBJECTS=a.o;b.o -P isa_symbols.cmake
cmake_policy(VERSION 3.26)
execute_process(COMMAND ${NM} -C ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" ";" lines "${symbols}")
list(FILTER lines INCLUDE REGEX " W ")
list(FILTER lines EXCLUDE REGEX "tokenmill::${ISA}::")
if(lines)
  list(JOIN lines "\n  " text)
  message(FATAL_ERROR "weak symbols outside tokenmill::${ISA}, make them inline or out of line:\n"
                      "  ${text}")
endif()
