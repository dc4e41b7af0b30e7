// The floor of every memory-bound CPU kernel: one pass over the bytes that keeps only their maximum.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace tokenstep::cpu {

// Largest int32 among `count` of them; `data` aligned to 4 bytes.
TOKENSTEP_DECLARE_FOR_EACH_ISA(int32_t read_max(const int32_t* data, int64_t count))

}  // namespace tokenstep::cpu
