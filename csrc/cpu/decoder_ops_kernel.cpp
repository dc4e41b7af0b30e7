// RMSNorm, gate and soft cap, a row at a time, in vectors of float32. What is left of a row behind
// its last whole vector goes through one that is filled up with zeros, and is computed like the rest.
#include <cmath>
#include <cstddef>

#include "cpu/decoder_ops.h"
#include "cpu/fp_environment.h"
#include "cpu/vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

template <class T>
TOKENSTEP_VEC Floats load_within(const T* row, int at, int size) {
  if (at + kLanes <= size) return load(row + at);
  T part[kLanes] = {};
  memcpy(part, row + at, sizeof(T) * static_cast<size_t>(size - at));
  return load(part);
}

template <class T>
TOKENSTEP_VEC void store_within(T* row, int at, int size, Floats v) {
  if (at + kLanes <= size) return store(row + at, v);
  T part[kLanes];
  store(part, v);
  memcpy(row + at, part, sizeof(T) * static_cast<size_t>(size - at));
}

// Partial sum j has the squares of elements j, j + 64, j + 128, ..., and the 64 are added in halves, whatever
// the width of a vector.
template <class T>
float sum_of_squares(const T* row, int size) {
  constexpr int kPartials = 64, kVectors = kPartials / kLanes;
  Floats sums[kVectors] = {};
  int at = 0;
  for (; at + kPartials <= size; at += kPartials)
    for (int i = 0; i < kVectors; ++i) {
      const Floats v = load(row + at + i * kLanes);
      sums[i] = multiply_add(v, v, sums[i]);
    }
  for (int i = 0; at < size; at += kLanes, ++i) {
    const Floats v = load_within(row, at, size);
    sums[i] = multiply_add(v, v, sums[i]);
  }
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  float lanes[kLanes];
  store(lanes, sums[0]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T, class W>
void norm_row(const T* x, const W* weight, int size, float eps, T* out) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, size) / static_cast<float>(size) + eps);
  for (int at = 0; at < size; at += kLanes)
    store_within(out, at, size, load_within(x, at, size) * scale * load_within(weight, at, size));
}

template <class T, class W>
void norm_rows(const RmsNormParams& params, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(params.x);
  const auto* weight = static_cast<const W*>(params.weight);
  auto* out = static_cast<T*>(params.out);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t head = 0; head < params.num_heads; ++head)
      norm_row(x + row * params.x_row_stride + head * params.x_head_stride, weight + head * params.size,
               params.size, params.eps, out + (row * params.num_heads + head) * params.size);
}

// 1 / (1 + e^-z), without overflow and to a few ulp on both sides.
TOKENSTEP_VEC Floats sigmoid(Floats z) {
  const Floats magnitude = floats_of(bits_of(z) & 0x7fffffff);
  const Floats e = exp2(magnitude * -1.442695040888963f);
  const Floats denominator = 1.0f + e;
  return (z < 0.0f ? e : all(1.0f)) / denominator;
}

// x / 2 (1 + tanh(u)) is x / (1 + e^-2u): nothing cancels where tanh is near -1.
TOKENSTEP_VEC Floats activate(Activation activation, Floats x) {
  if (activation == Activation::kSilu) return x * sigmoid(x);
  constexpr float kTwiceRootTwoOverPi = 1.5957691216057308f;
  return x * sigmoid(kTwiceRootTwoOverPi * (x + 0.044715f * (x * x * x)));
}

template <class T>
void gate_row(Activation activation, const T* gate, const T* up, int size, T* out) {
  for (int at = 0; at < size; at += kLanes)
    store_within(out, at, size,
                 activate(activation, load_within(gate, at, size)) * load_within(up, at, size));
}

}  // namespace

void rms_norm_rows(const RmsNormParams& params, int64_t begin, int64_t end) {
  const FpEnvironment environment;
  with_element_of(params.dtype, [&](auto element) {
    using T = decltype(element);
    if (params.weight_dtype == DType::kFloat32)
      norm_rows<T, float>(params, begin, end);
    else
      norm_rows<T, T>(params, begin, end);
  });
}

void gate_rows(const GateParams& params, int64_t begin, int64_t end) {
  const FpEnvironment environment;
  with_element_of(params.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t row = begin; row < end; ++row) {
      const auto* gate = static_cast<const T*>(params.gate_up) + row * params.row_stride;
      gate_row(params.activation, gate, gate + params.size, params.size,
               static_cast<T*>(params.out) + row * params.size);
    }
  });
}

void soft_cap_rows(const SoftCapParams& params, int64_t begin, int64_t end) {
  const FpEnvironment environment;
  const Floats cap = all(params.cap);
  with_element_of(params.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) {
      auto* row = static_cast<decltype(element)*>(params.x) + i * params.row_stride;
      for (int at = 0; at < params.size; at += kLanes)
        store_within(row, at, params.size, cap * tanh(load_within(row, at, params.size) / cap));
    }
  });
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
