// The append kernel, one variant per instruction set.
#pragma once
#include "common/params.h"
#include "cpu/isa.h"

namespace tokenstep::cpu {

// Appends `count` new rows from `first_row` on, of one sequence whose first of them has `first_position`.
TOKENSTEP_DECLARE_FOR_EACH_ISA(void append_rows(const PagedBatch& batch, int sequence, int64_t first_position,
                                                int64_t first_row, int count))

}  // namespace tokenstep::cpu
