# The linker may keep one instruction set's copy of a weak function for all instruction sets, which
# then faults on an older machine. Every symbol of a cpu*.cpp must be local or in the namespace of its
# instruction set.
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
