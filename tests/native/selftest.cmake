# conv_selftest: the kernels of the extension in a program of their own, without Python.
set(DISCO_CPU_SOURCES ${DISCO_SOURCES})
list(REMOVE_ITEM DISCO_CPU_SOURCES csrc/bindings.cpp)

add_executable(
  conv_selftest
  tests/native/check_conv.cpp
  tests/native/check_pack.cpp
  tests/native/conv_cases.cpp
  tests/native/conv_selftest.cpp
  tests/native/covering.cpp
  tests/native/grouped_cases.cpp
  tests/native/guarded.cpp
  tests/native/oracle.cpp
  ${DISCO_CPU_SOURCES})
target_include_directories(conv_selftest PRIVATE csrc tests/native)
target_compile_options(conv_selftest PRIVATE -Wall -Wextra)
target_compile_definitions(conv_selftest PRIVATE ${DISCO_DEFINITIONS})
find_package(OpenMP REQUIRED COMPONENTS CXX)
target_link_libraries(conv_selftest PRIVATE OpenMP::OpenMP_CXX)
