// Rotary position embedding of one head (Su et al., RoFormer, arXiv 2104.09864), as append_kv and
// paged_attention share it: in float32, product by product and each rounded, then rounded once to the
// tensor's type. The bits are the same on every instruction set, and those of x * cos + rotate_half(x) * sin
// in float32. For *_kernel.cpp files alone.
#pragma once
#include "common/params.h"
#include "cpu/vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

// out[0 ... head_dim - 1]: the head as floats that its type can hold. `out` must not overlap `in`.
template <class T>
void load_head(const T* __restrict in, int head_dim, float* __restrict out) {
  for (int i = 0; i < head_dim; ++i) out[i] = widen(in[i]);
}

template <class T>
void store_head(const float* __restrict in, int head_dim, T* __restrict out) {
  for (int i = 0; i < head_dim; ++i) narrow(in[i], out[i]);
}

inline void rotate_head(const RopeParams& rope, int64_t position, float* __restrict head) {
  const int half = rope.rotary_dim / 2;
  const float* __restrict cos = rope.cos + position * half;
  const float* __restrict sin = rope.sin + position * half;
  const auto rotate = [&](int i, float& first, float& second) {
    const float a = first, b = second;
    first = sub(mul(a, cos[i]), mul(b, sin[i]));
    second = add(mul(b, cos[i]), mul(a, sin[i]));
  };
  if (rope.interleaved) {
    for (int i = 0; i < half; ++i) rotate(i, head[2 * i], head[2 * i + 1]);
  } else {
    for (int i = 0; i < half; ++i) rotate(i, head[i], head[i + half]);
  }
}

// The rotated head, rounded to T.
template <class T>
void load_rotated_head(const T* in, int head_dim, const RopeParams& rope, int64_t position, float* out) {
  load_head(in, head_dim, out);
  if (!rope.cos) return;
  rotate_head(rope, position, out);
  for (int i = 0; i < rope.rotary_dim; ++i) {
    T rounded;
    narrow(out[i], rounded);
    out[i] = widen(rounded);
  }
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
