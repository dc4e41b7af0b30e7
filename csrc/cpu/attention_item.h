// The unit of work of paged attention on the CPU, and the kernel that does it, one variant per instruction
// set.
#pragma once
#include <cstddef>

#include "common/params.h"
#include "cpu/isa.h"

namespace tokenstep::cpu {

constexpr int kMaxItemRows = 64;  // query rows (positions x heads) that share one pass over keys and values

// Some q heads of one KV head, at consecutive positions of one sequence, over consecutive chunks of its keys.
struct AttentionItem {
  int64_t first_row;       // of q and out
  int64_t first_position;  // of that row in its sequence
  int num_positions;
  int sequence;
  int first_head, num_heads;  // q heads, all of the group of kv_head
  int kv_head;
  int64_t chunk_begin, chunk_end;

  // Set if these rows' chunks are spread over items: each leaves its part, and the last to arrive merges them
  // in order.
  float* parts = nullptr;       // [num_parts][part_floats()]
  int32_t* arrivals = nullptr;  // zero at first
  int num_parts = 0, part = 0;

  int num_rows() const { return num_positions * num_heads; }
};

constexpr int64_t part_floats(int num_rows, int head_dim) { return int64_t{num_rows} * (head_dim + 2); }

TOKENSTEP_DECLARE_FOR_EACH_ISA(void attend(const AttentionParams& params, const AttentionItem& item,
                                           void* scratch))
TOKENSTEP_DECLARE_FOR_EACH_ISA(std::size_t attention_scratch_bytes())  // per thread, aligned to 64
TOKENSTEP_DECLARE_FOR_EACH_ISA(void merge_row(const MergeParams& params, int64_t row))

}  // namespace tokenstep::cpu
