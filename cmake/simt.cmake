# The emulator and the CUDA kernels in it (see csrc/simt/launch.h): for the tests, so off unless asked for, and built for
# the machine that builds it. Kernels are compiled by the C++ compiler with the instrumentation of -fsanitize=thread;
# its library is not linked, csrc/simt/instrument.cpp takes its place.
option(TOKENSTEP_SIMT "Build the module that runs the CUDA kernels on the CPU, for the tests" OFF)
if(NOT TOKENSTEP_SIMT)
  return()
endif()

file(GLOB TOKENSTEP_SIMT_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/simt/*.cpp)
# CUDA sources are compiled as they are, through a file each that includes one: a source has one language.
set(TOKENSTEP_SIMT_KERNELS tests/simt/faults.cpp tests/simt/testing.cpp)
foreach(source IN LISTS TOKENSTEP_CUDA_SOURCES)
  get_filename_component(name ${source} NAME_WE)
  if(NOT name STREQUAL "runtime")  # csrc/simt has its own
    file(CONFIGURE OUTPUT simt/${name}.cpp CONTENT "#include \"cuda/${name}.cu\"\n")
    list(APPEND TOKENSTEP_SIMT_KERNELS ${CMAKE_CURRENT_BINARY_DIR}/simt/${name}.cpp)
  endif()
endforeach()

add_library(tokenstep_simt OBJECT ${TOKENSTEP_SIMT_SOURCES})
target_link_libraries(tokenstep_simt PRIVATE tokenstep_options)

# The emulator comes first: of an inline function that both emit, the linker keeps the first copy, and that one must not
# be instrumented.
nanobind_add_module(_C_simt NOSTRIP NB_DOMAIN tokenstep_simt ${TOKENSTEP_NANOBIND}
                    $<TARGET_OBJECTS:tokenstep_simt> csrc/bind/module_simt.cpp csrc/bind/backend_device.cpp
                    csrc/bind/device_testing.cpp ${TOKENSTEP_BINDINGS} ${TOKENSTEP_SIMT_KERNELS})
target_link_libraries(_C_simt PRIVATE tokenstep_options ${CMAKE_DL_LIBS})
target_include_directories(_C_simt PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_compile_definitions(_C_simt PRIVATE TOKENSTEP_SIMT)
# Loads that the source has not must not appear, and loops must not become calls of memset, which nobody would see.
set(TOKENSTEP_SIMT_KERNEL_OPTIONS
    -O1 -g1 -march=native -Wno-unknown-pragmas -fsanitize=thread --param=tsan-distinguish-volatile=1
    --param=tsan-instrument-func-entry-exit=0 -fno-hoist-adjacent-loads -fno-tree-loop-distribute-patterns)
set_source_files_properties(${TOKENSTEP_SIMT_KERNELS} PROPERTIES COMPILE_OPTIONS "${TOKENSTEP_SIMT_KERNEL_OPTIONS}")
install(TARGETS _C_simt LIBRARY DESTINATION tokenstep)
