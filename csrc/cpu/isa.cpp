#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/check.h"

namespace tokenstep::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

Isa parse(const char* name) {
  for (const Isa isa : kAll) {
    if (strcmp(name, name_of(isa)) != 0) continue;
    if (!supported(isa))
      raise<ValueError>("isa", "TOKENSTEP_ISA = '%s' is not supported by this CPU or build", name);
    return isa;
  }
  raise<ValueError>("isa", "TOKENSTEP_ISA = '%s', expected portable, avx2, avx512 or avx512_bf16", name);
}

Isa choose() {
  if (const char* forced = getenv("TOKENSTEP_ISA"); forced && *forced) return parse(forced);
  Isa best = Isa::kPortable;
  for (const Isa isa : kAll)
    if (supported(isa)) best = isa;
  return best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{choose()};
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kPortable:
      break;
  }
  return "portable";
}

// The compiler's CPU test also asks the operating system whether it saves the wide registers.
bool supported([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kPortable:
      break;
  }
#endif
  return isa == Isa::kPortable;
}

Isa active_isa() { return current().load(std::memory_order_relaxed); }
void set_isa(const char* name) { current().store(name && *name ? parse(name) : choose()); }

}  // namespace tokenstep::cpu
