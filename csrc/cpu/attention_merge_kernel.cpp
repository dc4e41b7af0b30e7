// Attention over parts of the keys, merged by their log-sum-exps: one row of the result. Reads each part's
// row once, S * Hq * (D + 1) elements, and writes Hq * (D + 1). Parts are added in index order in float32.
#include <cmath>

#include "common/merge_weight.h"
#include "cpu/attention_item.h"
#include "cpu/attention_softmax.h"
#include "cpu/fp_environment.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

template <class T>
void merge_row_of(const MergeParams& params, int64_t row) {
  float outputs[kMaxHeadDim];
  for (int head = 0; head < params.num_heads; ++head) {
    const auto lse_of = [&](int part) {
      return params
          .lses[part * params.lse_part_stride + row * params.lse_row_stride + head * params.lse_head_stride];
    };
    float max = kMinusInfinity;
    for (int part = 0; part < params.num_parts; ++part) max = lse_of(part) > max ? lse_of(part) : max;
    double sum = 0.0;
    memset(outputs, 0, sizeof outputs);
    for (int part = 0; part < params.num_parts; ++part) {
      if (lse_of(part) == kMinusInfinity) continue;  // no keys: its output is not even read
      const float weight = merge_weight(lse_of(part), max);
      const T* in = static_cast<const T*>(params.outs) + part * params.part_stride + row * params.row_stride +
                    head * params.head_stride;
      sum += weight;
      for (int d = 0; d < params.head_dim; ++d) outputs[d] += weight * widen(in[d]);
    }
    const int64_t index = row * params.num_heads + head;
    write_output({max, static_cast<float>(sum), outputs}, params.head_dim, 1.0f,
                 static_cast<T*>(params.out) + index * params.head_dim);
    params.lse[index] = sum == 0.0 ? kMinusInfinity : static_cast<float>(max + std::log(sum));
  }
}

}  // namespace

void merge_row(const MergeParams& params, int64_t row) {
  const FpEnvironment environment;
  with_element_of(params.dtype, [&](auto element) { merge_row_of<decltype(element)>(params, row); });
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
