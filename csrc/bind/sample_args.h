// The arguments that sample, apply_logits and Sampler share: Python numbers, lists and arrays become
// RowParams and the flat lists behind them. Everything is checked here, before a kernel runs; errors name the
// argument and the row.
#pragma once
#include <cstddef>
#include <vector>

#include "bind/tensor.h"
#include "common/params.h"

namespace tokenstep::bind {

// The Python objects, borrowed. Each is one value for all rows or one per row; token sequences and dicts
// likewise.
struct RowArguments {
  nb::handle temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  nb::handle prompt_tokens, output_tokens, logit_bias;
  nb::handle seed, position, substream;
  Semantics semantics;
  nb::handle penalty_last_n;
};

// What the kernels see of these arguments: rows, and the lists that they point to.
struct RowInputs {
  struct Begin {  // of a row's lists
    size_t history = 0, bias = 0;
  };
  std::vector<RowParams> rows;  // the pointers are set at the end
  std::vector<Begin> begins;
  std::vector<int32_t> history_ids;
  std::vector<uint32_t> history_counts;  // beside the ids
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::vector<int32_t> window_tokens;  // of one row with penalty_last_n > 0: its last tokens, in order
  RowFieldsParams device_fields{};     // parameters in arrays that the host does not read

  void resize(size_t num_rows) {
    rows.resize(num_rows);
    begins.resize(num_rows);
  }
  void drop_history();
  void sort_histories();  // by id: device kernels search the lists
  void point_rows(int32_t* history_ids, uint32_t* history_counts, int32_t* bias_ids, float* bias_values);

  // Rows, then lists, in one piece of memory that the kernels find at `address`.
  size_t packed_bytes() const;
  void pack(void* memory, void* address);
};

// The arguments of a batch. Arrays that lie where the logits lie are left to the device (unless
// backend::kOnHost).
RowInputs read_rows(const char* op, const RowArguments& arguments, const Tensor& logits);

// Whose meaning the parameters have.
Semantics read_semantics(const char* op, nb::handle semantics);

// One row, as Sampler.admit takes it: plain values, one sequence of ids, one dict. Its position is not read:
// it is the number of output tokens.
RowInputs read_one_row(const char* op, const RowArguments& arguments, int vocab_size);

Tensor read_logits(const char* op, nb::handle logits);  // [B, V] on the module's device
// Logits, sizes and the bitmask, which lies where the logits lie.
SampleParams params_of(const char* op, const Tensor& logits, nb::handle bitmask, Semantics semantics);
int read_num_logprobs(const char* op, nb::handle logprobs);  // -1: None
LogprobsMode read_logprobs_mode(const char* op, nb::handle mode);

// Raises ValueError naming the first row that could not be sampled; nothing if there is none.
void raise_for_status(const char* op, const int32_t* status, int num_rows);

}  // namespace tokenstep::bind
