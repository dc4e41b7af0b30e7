// The token history of a row: a list of unique ids and, per id, how often it occurred. A Sampler's slot keeps
// dense counts by token id that are only ever touched at the ids of the list. Loops take (first, step), so
// that one thread, or the threads of a block, can share them.
#pragma once
#include <cstdint>

#include "common/numerics.h"
#include "common/params.h"

namespace tokenstep {

// Occurrences of one token: how often in the output (low 31 bits), and whether in the prompt. Where penalties
// count prompt and output together (RowParams::penalty_last_n), the prompt's tokens are counted like the
// output's.
constexpr uint32_t kInPrompt = 0x80000000u;
constexpr uint32_t kOutputCountMask = 0x7fffffffu;

// Occurrences of entry i of the list.
TOKENSTEP_INLINE uint32_t occurrences(const RowParams& row, int32_t i) {
  return row.history_counts[row.history_capacity > 0 ? row.history_ids[i] : i];
}

// A sampled token joins the history, and the row moves on by one position.
TOKENSTEP_INLINE void record_token(RowParams& row, int32_t token) {
  ++row.position;
  if (row.history_capacity <= 0) return;
  uint32_t& count = row.history_counts[token];
  if (count == 0 && row.history_size < row.history_capacity) row.history_ids[row.history_size++] = token;
  ++count;
}

// Does the history forget what is older than a window of tokens? Only of a Sampler's slot; the history of a
// call holds what its window holds.
TOKENSTEP_INLINE bool has_window(const RowParams& row) { return row.window != nullptr; }

// A sampled token joins the history of a row with a window, and the oldest token leaves it. The list holds
// the ids of the window alone: the last of them takes the place of one that is gone.
TOKENSTEP_INLINE void record_token_in_window(RowParams& row, int32_t token) {
  ++row.position;
  int32_t* const places = row.window + row.penalty_last_n;
  const int32_t oldest = row.window[row.window_at];
  row.window[row.window_at] = token;
  row.window_at = row.window_at + 1 < row.penalty_last_n ? row.window_at + 1 : 0;
  if (oldest == token) return;
  if (oldest >= 0 && --row.history_counts[oldest] == 0 && row.history_size > 0) {
    const int32_t last = row.history_ids[--row.history_size];
    row.history_ids[places[oldest]] = last;
    places[last] = places[oldest];
  }
  if (row.history_counts[token]++ == 0 && row.history_size < row.history_capacity) {
    places[token] = row.history_size;
    row.history_ids[row.history_size++] = token;
  }
}

// Makes the dense counts of a slot zero again.
TOKENSTEP_INLINE void clear_history(const RowParams& slot, int32_t first, int32_t step) {
  if (slot.history_capacity <= 0) return;
  for (int32_t i = first; i < slot.history_size; i += step) slot.history_counts[slot.history_ids[i]] = 0;
}

// Copies an update's lists to those of its slot, whose dense counts are zero.
TOKENSTEP_INLINE void fill_lists(const SlotUpdate& update, int32_t first, int32_t step) {
  const RowParams& row = update.row;
  for (int32_t i = first; i < row.history_size; i += step) {
    row.history_ids[i] = update.history_ids[i];
    row.history_counts[update.history_ids[i]] = update.history_counts[i];
    if (has_window(row)) row.window[row.penalty_last_n + update.history_ids[i]] = i;
  }
  if (has_window(row))
    for (int32_t i = first; i < row.penalty_last_n; i += step)
      row.window[i] = i < update.window_size ? update.window_tokens[i] : -1;
  for (int32_t i = first; i < row.bias_size; i += step) {
    row.bias_ids[i] = update.bias_ids[i];
    row.bias_values[i] = update.bias_values[i];
  }
}

// What a slot holds that no request has been admitted to: parameters out of range, a row of it is not
// sampled.
TOKENSTEP_INLINE RowParams vacant_row() {
  RowParams row;
  row.temperature = -1.0f;
  return row;
}

}  // namespace tokenstep
