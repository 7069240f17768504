# conv_selftest: the kernels of the extension in a program of their own, without Python.
set(DISCO_CPU_SOURCES ${DISCO_SOURCES})
list(REMOVE_ITEM DISCO_CPU_SOURCES csrc/bindings.cpp)

# Compiled as for the extension, so that a compiler's cache has both in one.
add_library(selftest_kernels OBJECT ${DISCO_CPU_SOURCES})
add_executable(
  conv_selftest
  tests/native/check_conv.cpp
  tests/native/check_pack.cpp
  tests/native/conv_cases.cpp
  tests/native/conv_selftest.cpp
  tests/native/covering.cpp
  tests/native/grouped_cases.cpp
  tests/native/guarded.cpp
  tests/native/oracle.cpp)
find_package(OpenMP REQUIRED COMPONENTS CXX)
foreach(target selftest_kernels conv_selftest)
  target_include_directories(${target} PRIVATE csrc)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  target_compile_definitions(${target} PRIVATE ${DISCO_DEFINITIONS})
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
endforeach()
target_include_directories(conv_selftest PRIVATE tests/native)
target_link_libraries(conv_selftest PRIVATE selftest_kernels)
