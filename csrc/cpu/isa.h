// Instruction sets of the CPU kernels, chosen at run time. Every kernel file is compiled once per set, in a
// namespace of its own (TOKENSTEP_ISA_NAMESPACE); TOKENSTEP_ISA in the environment forces one.
#pragma once

namespace tokenstep::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

const char* name_of(Isa isa);
bool supported(Isa isa);  // compiled in, and the CPU has it
// The best one, or what TOKENSTEP_ISA names: ValueError if that cannot run here. Ops ask first on the calling
// thread, before they write anything; the workers of a pool could not pass the error on.
Isa active_isa();
void set_isa(const char* name);  // for tests: the same bits are expected of every set

// Calls the variant of a kernel for the active instruction set:
//   TOKENSTEP_DISPATCH_ISA(sample_rows, params);
#if defined(__x86_64__)
#define TOKENSTEP_DECLARE_FOR_EACH_ISA(declaration) \
  namespace portable {                              \
  declaration;                                      \
  }                                                 \
  namespace avx2 {                                  \
  declaration;                                      \
  }                                                 \
  namespace avx512 {                                \
  declaration;                                      \
  }                                                 \
  namespace avx512_bf16 {                           \
  declaration;                                      \
  }
#define TOKENSTEP_DISPATCH_ISA(function, ...)                           \
  (::tokenstep::cpu::active_isa() == ::tokenstep::cpu::Isa::kAvx512Bf16 \
       ? ::tokenstep::cpu::avx512_bf16::function(__VA_ARGS__)           \
   : ::tokenstep::cpu::active_isa() == ::tokenstep::cpu::Isa::kAvx512   \
       ? ::tokenstep::cpu::avx512::function(__VA_ARGS__)                \
   : ::tokenstep::cpu::active_isa() == ::tokenstep::cpu::Isa::kAvx2     \
       ? ::tokenstep::cpu::avx2::function(__VA_ARGS__)                  \
       : ::tokenstep::cpu::portable::function(__VA_ARGS__))
#else
#define TOKENSTEP_DECLARE_FOR_EACH_ISA(declaration) \
  namespace portable {                              \
  declaration;                                      \
  }
#define TOKENSTEP_DISPATCH_ISA(function, ...) \
  (::tokenstep::cpu::active_isa(), ::tokenstep::cpu::portable::function(__VA_ARGS__))
#endif

}  // namespace tokenstep::cpu
