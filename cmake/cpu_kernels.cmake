# Every kernel file is compiled once per instruction set, in a namespace of its own (see csrc/cpu/isa.h).
set(TOKENSTEP_CPU_KERNELS)
file(GLOB TOKENSTEP_CPU_KERNELS CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/*_kernel.cpp)

set(TOKENSTEP_ISAS portable)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND TOKENSTEP_ISAS avx2 avx512 avx512_bf16)
endif()
set(TOKENSTEP_FLAGS_portable "")
set(TOKENSTEP_FLAGS_avx2 -march=x86-64-v3)
set(TOKENSTEP_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
set(TOKENSTEP_FLAGS_avx512_bf16 ${TOKENSTEP_FLAGS_avx512} -mavx512bf16)

# Left to itself, GCC makes vectors of the addresses of neighbouring rows, and then takes them out one by one.
set_source_files_properties(csrc/cpu/attention_kernel.cpp PROPERTIES COMPILE_OPTIONS -fno-tree-slp-vectorize)

set(TOKENSTEP_CPU_KERNEL_OBJECTS)
if(TOKENSTEP_CPU_KERNELS)
  foreach(isa IN LISTS TOKENSTEP_ISAS)
    add_library(tokenstep_cpu_${isa} OBJECT ${TOKENSTEP_CPU_KERNELS})
    target_link_libraries(tokenstep_cpu_${isa} PRIVATE tokenstep_options)
    target_compile_definitions(tokenstep_cpu_${isa} PRIVATE TOKENSTEP_ISA_NAMESPACE=${isa})
    target_compile_options(tokenstep_cpu_${isa} PRIVATE ${TOKENSTEP_FLAGS_${isa}})
    list(APPEND TOKENSTEP_CPU_KERNEL_OBJECTS $<TARGET_OBJECTS:tokenstep_cpu_${isa}>)
  endforeach()
endif()
