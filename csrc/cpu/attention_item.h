// The unit of work of paged attention on the CPU, and the kernel that does it, one variant per instruction
// set.
#pragma once
#include <cstddef>

#include "common/params.h"
#include "cpu/isa.h"

namespace tokenstep::cpu {

constexpr int kMaxItemRows = 64;  // query rows (KV heads x positions x q heads of each) of one item

// Consecutive positions of one sequence, and q heads of one or several KV heads, over consecutive chunks of
// the sequence's keys.
struct AttentionItem {
  int64_t first_row;       // of q and out
  int64_t first_position;  // of that row in its sequence
  int num_positions;
  int sequence;
  int kv_head, num_kv_heads;
  int first_head;
  int heads_per_kv_head;  // the whole group, or with a single KV head some of it
  int64_t chunk_begin, chunk_end;

  // Set if these rows' chunks are spread over items: each leaves its part, and the last to arrive merges them
  // in order.
  float* parts = nullptr;       // [num_parts][part_floats()]
  int32_t* arrivals = nullptr;  // zero at first
  int num_parts = 0, part = 0;

  int rows_per_kv_head() const { return num_positions * heads_per_kv_head; }
  int num_rows() const { return num_kv_heads * rows_per_kv_head(); }

  // Rows are ordered by KV head, position, q head.
  struct Row {
    int position;  // counted from first_position
    int head;      // of all q heads
  };
  Row row(int index) const {
    const int within = index % rows_per_kv_head();
    return {within / heads_per_kv_head,
            first_head + index / rows_per_kv_head() * heads_per_kv_head + within % heads_per_kv_head};
  }
};

constexpr int64_t part_floats(int num_rows, int head_dim) { return int64_t{num_rows} * (head_dim + 2); }

// `next`: the item that this thread does afterwards, if it is known; its first keys are fetched early.
TOKENSTEP_DECLARE_FOR_EACH_ISA(void attend(const AttentionParams& params, const AttentionItem& item,
                                           const AttentionItem* next, void* scratch))
TOKENSTEP_DECLARE_FOR_EACH_ISA(std::size_t attention_scratch_bytes())  // per thread, aligned to 64
TOKENSTEP_DECLARE_FOR_EACH_ISA(void merge_row(const MergeParams& params, int64_t row))

}  // namespace tokenstep::cpu
