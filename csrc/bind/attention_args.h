// The arguments that paged_attention and append_kv share: Python objects become a PagedBatch. Everything that
// the host can know is checked here, before anything is written.
#pragma once
#include <vector>

#include "bind/tensor.h"
#include "common/params.h"

namespace tokenstep::bind {

// Reads the arrays of one call, and keeps what their producers lent until the op has run: memory that an
// exporter made for this one request lives as long as its capsule.
class TensorReader {
 public:
  explicit TensorReader(const char* op) : op_(op) {}

  const char* op() const { return op_; }
  Tensor read(const char* argument, nb::handle source);
  // Its elements must also be distinct: no axis of stride 0.
  Tensor read_to_write(const char* argument, nb::handle source);

 private:
  Tensor keep(Tensor tensor);

  const char* op_;
  std::vector<nb::ndarray<nb::ro>> kept_;
};

// The Python objects, borrowed.
struct BatchArguments {
  nb::handle k_cache, v_cache, block_table, seq_lens, k, v, rope, query_start, k_scale, v_scale;
};

// `first` is q or k: the tensor whose dtype, device and rows the others must match. max_query_len is the
// caller's to set; query_start is checked against it by check_query_start.
PagedBatch read_batch(TensorReader& reader, const BatchArguments& arguments, const Tensor& first);
void read_queries(const Tensor& q, PagedBatch& batch);
void check_query_start(const char* op, const PagedBatch& batch);  // where the host may look

// float32 [num_heads]; null for None.
const float* read_per_head(TensorReader& reader, const char* argument, nb::handle source, const Tensor& q);

void check_head_dim(const Tensor& tensor);        // of the last axis
void refuse_other_devices(const Tensor& tensor);  // than the module's
int32_t size32(const Tensor& tensor, int axis);   // a size that the kernels' integers can hold

// Numbers of Python. `fallback` stands for None.
float read_float(const char* op, const char* argument, nb::handle source, float fallback);
int32_t read_positive_int(const char* op, const char* argument, nb::handle source);
bool read_bool(const char* op, const char* argument, nb::handle source);

}  // namespace tokenstep::bind
