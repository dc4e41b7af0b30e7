// Online softmax (Milakov and Gimelshein, arXiv 1805.02867) of one query row over its tiles, in powers of
// two: the rules that make weights of raw scores, and how two parts of a row are merged. For
// attention_kernel.cpp alone.
#pragma once
#include <cmath>

#include "common/params.h"
#include "cpu/attention_tile.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr double kLn2 = 0.693147180559945309;
constexpr float kLog2E = 1.44269504088896341f;

TOKENSTEP_VEC float exp2_scalar(float t) { return exp2(all(t))[0]; }

// What a raw score goes through, in this order: scale, softcap, ALiBi; log2(e) is folded into the constants.
struct ScoreRules {
  bool has_softcap;
  float factor;        // scale * log2(e), or scale / softcap before the tanh
  float softcap_log2;  // softcap * log2(e)

  ScoreRules(const AttentionParams& params, int kv_head)
      : has_softcap(params.softcap > 0.0f),
        factor(has_softcap ? params.scale / params.softcap : params.scale * kLog2E),
        softcap_log2(params.softcap * kLog2E) {
    if (params.batch.k_scale) factor *= params.batch.k_scale[kv_head];  // of a quantised cache
  }
};

// The keys of a tile that a row sees, as offsets in the tile: [begin, end), and where the row itself stands.
struct RowWindow {
  int begin, end;
  float first_distance;  // position of the tile's first key minus the query's: what ALiBi multiplies
  bool partial() const { return begin > 0 || end < kTileTokens; }
};

// Running maximum and sum of one row. The sum is kept in kSums parts: part i adds the weights of tokens i, i
// + kSums, ... of the chunk, whatever the width of a vector.
constexpr int kSums = 16;
struct RowState {
  float max;
  float sums[kSums];

  void clear() {
    max = kMinusInfinity;
    memset(sums, 0, sizeof sums);
  }
  float sum() const {  // by halves
    float x[kSums];
    memcpy(x, sums, sizeof sums);
    for (int width = kSums / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
  }
};

// Turns raw scores into weights relative to the row's new maximum; returns what older weights must be
// multiplied with.
template <class Tile>
TOKENSTEP_VEC float update_row(const ScoreRules& rules, const float* scores, const RowWindow& window,
                               float alibi_slope, RowState& state, typename Tile::Weight* weights) {
  Floats s[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) s[v] = load(scores + v * kLanes) * rules.factor;
  if (rules.has_softcap)
    for (int v = 0; v < kTileVectors; ++v) s[v] = tanh(s[v]) * rules.softcap_log2;
  if (alibi_slope != 0.0f)
    for (int v = 0; v < kTileVectors; ++v) {
      const Floats distance = __builtin_convertvector(iota(v * kLanes), Floats) + window.first_distance;
      s[v] = multiply_add(all(alibi_slope), distance, s[v]);
    }
  if (window.partial())
    for (int v = 0; v < kTileVectors; ++v) {
      const Ints token = iota(v * kLanes);
      s[v] = token >= window.begin ? s[v] : all(kMinusInfinity);
      s[v] = token < window.end ? s[v] : all(kMinusInfinity);
    }

  Floats top = s[0];
  for (int v = 1; v < kTileVectors; ++v) top = maximum(top, s[v]);
  const float tile_max = max_lane(top);
  const float old_max = state.max, new_max = tile_max > old_max ? tile_max : old_max;
  const float reference = new_max == kMinusInfinity ? 0.0f : new_max;
  const float alpha = new_max == old_max ? 1.0f : exp2_scalar(old_max - reference);

  constexpr int kSumVectors = kSums / kLanes;
  Floats sums[kSumVectors];
  for (int v = 0; v < kSumVectors; ++v) sums[v] = load(state.sums + v * kLanes) * alpha;
  for (int v = 0; v < kTileVectors; ++v) {
    const Floats weight = exp2(s[v] - reference);
    sums[v % kSumVectors] += weight;
    Tile::store_weights(weights + v * kLanes, weight);
  }
  for (int v = 0; v < kSumVectors; ++v) store(state.sums + v * kLanes, sums[v]);
  state.max = new_max;
  return alpha;
}

// Maximum, sum and weighted values of one row over some keys. sum == 0: no key yet.
struct RowPart {
  float max, sum;
  float* outputs;  // [head_dim], not yet divided by sum
};

// Adds a later part to an earlier one. An empty part changes no bit.
TOKENSTEP_VEC void merge_part(RowPart& total, const RowPart& part, int head_dim) {
  if (part.sum == 0.0f) return;
  if (total.sum == 0.0f) {
    total.max = part.max;
    total.sum = part.sum;
    memcpy(total.outputs, part.outputs, sizeof(float) * head_dim);
    return;
  }
  const float max = part.max > total.max ? part.max : total.max;
  const float keep = exp2_scalar(total.max - max), take = exp2_scalar(part.max - max);
  total.max = max;
  total.sum = total.sum * keep + part.sum * take;
  for (int d = 0; d < head_dim; ++d) total.outputs[d] = total.outputs[d] * keep + part.outputs[d] * take;
}

// A sink is one more score, without a value.
TOKENSTEP_VEC void add_sink(RowPart& row, float sink, int head_dim) {
  const float score = sink * kLog2E;
  if (score == kMinusInfinity) return;
  const float max = row.sum == 0.0f || score > row.max ? score : row.max;
  const float keep = row.sum == 0.0f ? 0.0f : exp2_scalar(row.max - max);
  row.sum = row.sum * keep + exp2_scalar(score - max);
  row.max = max;
  for (int d = 0; d < head_dim; ++d) row.outputs[d] *= keep;
}

inline float log_sum_exp(const RowPart& row) {
  if (row.sum == 0.0f) return kMinusInfinity;
  return static_cast<float>(static_cast<double>(row.max) * kLn2 + std::log(static_cast<double>(row.sum)));
}

// `scale`: of the values, 1 unless they are quantised.
template <class T>
void write_output(const RowPart& row, int head_dim, float scale, T* __restrict out) {
  const float divisor = row.sum == 0.0f ? 1.0f : row.sum;
  for (int d = 0; d < head_dim; ++d)
    narrow(row.outputs[d] / divisor * scale + 0.0f, out[d]);  // + 0: no negative zero
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
