# The CUDA part of _C, where nvcc is found. The extension then needs no more libraries than before:
# CUDA's runtime is linked into it, and opens the driver's library when a kernel is launched.
#
# Environment: DISCO_KERNELS_SKIP_CUDA=1 leaves the part out, DISCO_KERNELS_FORCE_CUDA=1 makes it an
# error that it cannot be built. CUDAARCHS or CMAKE_CUDA_ARCHITECTURES name other architectures.

# Where the extension has no CUDA part, CuPy compiles these.
file(GLOB DISCO_DEVICE_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cuh)
install(FILES ${DISCO_DEVICE_SOURCES} DESTINATION disco_kernels/cuda/cuh)

function(disco_no_cuda reason)
  if("$ENV{DISCO_KERNELS_FORCE_CUDA}" STREQUAL "1")
    message(FATAL_ERROR "DISCO_KERNELS_FORCE_CUDA=1, but ${reason}")
  endif()
  message(STATUS "Without CUDA kernels: ${reason}")
endfunction()

if("$ENV{DISCO_KERNELS_SKIP_CUDA}" STREQUAL "1")
  disco_no_cuda("DISCO_KERNELS_SKIP_CUDA=1 leaves them out")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  disco_no_cuda("there is no nvcc that works (PATH, CUDACXX or CMAKE_CUDA_COMPILER may name one)")
  return()
endif()

# Compute capabilities 8.0 and 9.0 (which 8.6, 8.9 run, too), and PTX for what comes after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90")
endif()

# An nvcc too old for these architectures, or for this host compiler, shows here and not in the
# middle of the build.
set(DISCO_PROBE ${CMAKE_BINARY_DIR}/cuda_probe)
set(DISCO_CUDA_SETTINGS -DCMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER}
    -DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM})
if(CMAKE_CUDA_HOST_COMPILER)
  list(APPEND DISCO_CUDA_SETTINGS -DCMAKE_CUDA_HOST_COMPILER=${CMAKE_CUDA_HOST_COMPILER})
endif()
if(CMAKE_CUDA_ARCHITECTURES)
  string(REPLACE ";" "\\;" DISCO_ESCAPED "${CMAKE_CUDA_ARCHITECTURES}")
  list(APPEND DISCO_CUDA_SETTINGS "-DCMAKE_CUDA_ARCHITECTURES=${DISCO_ESCAPED}")
endif()
execute_process(
  COMMAND ${CMAKE_COMMAND} -G ${CMAKE_GENERATOR} -S ${CMAKE_SOURCE_DIR}/csrc/cuda/probe
          -B ${DISCO_PROBE} ${DISCO_CUDA_SETTINGS}
  RESULT_VARIABLE DISCO_CUDA_FAILED OUTPUT_VARIABLE DISCO_CUDA_SAID ERROR_VARIABLE DISCO_CUDA_SAID)
if(NOT DISCO_CUDA_FAILED)
  execute_process(
    COMMAND ${CMAKE_COMMAND} --build ${DISCO_PROBE}
    RESULT_VARIABLE DISCO_CUDA_FAILED OUTPUT_VARIABLE DISCO_CUDA_SAID
    ERROR_VARIABLE DISCO_CUDA_SAID)
endif()
if(DISCO_CUDA_FAILED)
  disco_no_cuda("${CMAKE_CUDA_COMPILER} does not compile csrc/cuda/probe:\n${DISCO_CUDA_SAID}")
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

add_library(disco_cuda OBJECT csrc/cuda/kernels.cu)
target_compile_options(disco_cuda PRIVATE "SHELL:-Xcompiler -Wall,-Wextra" --threads 0)
target_sources(_C PRIVATE $<TARGET_OBJECTS:disco_cuda>)
target_link_libraries(_C PRIVATE ${CMAKE_DL_LIBS})
target_compile_definitions(_C PRIVATE DISCO_HAVE_CUDA)
# It compiles nothing for CUDA itself.
set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES OFF)

# Instructions of compute capability 9.0 alone, which no later one has; the driver's function that
# they need is asked for in a way that is new in CUDA 12.5.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.5 AND CMAKE_CUDA_ARCHITECTURES MATCHES "90")
  add_library(disco_cuda_sm90 OBJECT csrc/cuda/conv2d_sm90.cu)
  set_target_properties(disco_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES OFF)
  target_include_directories(disco_cuda_sm90 PRIVATE csrc)
  target_compile_options(disco_cuda_sm90 PRIVATE
    "SHELL:-gencode arch=compute_90a,code=sm_90a" "SHELL:-Xcompiler -Wall,-Wextra")
  target_sources(_C PRIVATE $<TARGET_OBJECTS:disco_cuda_sm90>)
  target_compile_definitions(_C PRIVATE DISCO_HAVE_CUDA_SM90)
else()
  message(STATUS "Without the convolutions for compute capability 9.0: nvcc 12.5 or newer builds "
                 "them, this is ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()
