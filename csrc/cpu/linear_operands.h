// Packed weights as operands of the two arithmetics of linear: pairs of bfloat16 for the CPU's own dot
// product (vdpbf16ps), and float32 elsewhere. Integers of at most 8 bits are exact in both, and so are their
// products with bfloat16. For linear_kernel.cpp alone.
#pragma once
#include "cpu/packed_matrix.h"
#include "cpu/vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kPairs = kBlockColumns / 2;

TOKENSTEP_VEC uint32_t load_word(const void* from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

// ---- float32 ----------------------------------------------------------------------------------------------
struct FloatArithmetic {
  using Element = float;                               // of x
  static constexpr int kVectors = kTileRows / kLanes;  // that a tile's rows are
  // Rows of x that are multiplied together: their sums stay in registers.
  static constexpr int kMaxRows = kLanes == 16 ? 6 : kLanes == 8 ? 4 : 2;
  static constexpr bool is_operand(WeightFormat) { return false; }  // as it is packed
  struct Operand {
    Floats first, second;  // the columns of a pair
  };

  TOKENSTEP_VEC Floats multiply(const Operand& w, const Element* x, Floats sum) {
    return multiply_add(w.second, all(x[1]), multiply_add(w.first, all(x[0]), sum));
  }

  template <WeightFormat kFormat>
  TOKENSTEP_VEC Operand operand(const uint8_t* values, int pair, int vector) {
    if constexpr (kFormat == WeightFormat::kQ8_0) {
      int16_t bytes __attribute__((vector_size(kLanes * 2)));
      memcpy(&bytes, values + (pair * kTileRows + vector * kLanes) * 2, sizeof bytes);
      const Ints both = __builtin_convertvector(bytes, Ints);
      return {__builtin_convertvector(both << 24 >> 24, Floats), __builtin_convertvector(both >> 8, Floats)};
    } else if constexpr (kFormat == WeightFormat::kBFloat16) {
      Ints both;
      memcpy(&both, values + (pair * kTileRows + vector * kLanes) * 4, sizeof both);
      return {floats_of(both << 16), floats_of(both & static_cast<int32_t>(0xffff0000u))};
    } else {
      Ints both;
      memcpy(&both, values + (word_of_pair(pair) * kTileRows + vector * kLanes) * 4, sizeof both);
      constexpr int kZero = kFormat == WeightFormat::kQ4_0 ? 8 : 0;
      const auto nibble = [&](int i) {
        return __builtin_convertvector((both >> 4 * i & 15) - kZero, Floats);
      };
      return {nibble(nibble_of_pair(pair)), nibble(4 + nibble_of_pair(pair))};
    }
  }
};

// ---- pairs of bfloat16 ------------------------------------------------------------------------------------
#if defined(__AVX512BF16__)
struct BFloatArithmetic {
  using Element = BFloat;
  using Operand = __m512i;
  static constexpr int kVectors = 1;
  static constexpr int kMaxRows = 8;
  static constexpr bool is_operand(WeightFormat format) { return format == WeightFormat::kBFloat16; }

  TOKENSTEP_VEC Floats multiply(Operand w, const Element* x, Floats sum) {
    const __m512i both = _mm512_set1_epi32(static_cast<int>(load_word(x)));
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(both)));
  }

  template <WeightFormat kFormat>
  TOKENSTEP_VEC Operand operand(const uint8_t* values, int pair, int) {
    if constexpr (kFormat == WeightFormat::kBFloat16) {
      return _mm512_load_si512(values + pair * kTileRows * 4);
    } else if constexpr (kFormat == WeightFormat::kQ8_0) {
      const auto floats = [&](int half) {
        const auto* bytes = reinterpret_cast<const __m128i*>(values + pair * kTileRows * 2) + half;
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(bytes)));
      };
      return reinterpret_cast<Operand>(_mm512_cvtne2ps_pbh(floats(1), floats(0)));
    } else {
      const __m512i words = _mm512_loadu_si512(values + word_of_pair(pair) * kTileRows * 4);
      // A table of both halves of 32 entries: what is above the nibble in a 16-bit index doesn't matter.
      return _mm512_permutexvar_epi16(
          _mm512_srli_epi16(words, static_cast<unsigned>(4 * nibble_of_pair(pair))), table<kFormat>());
    }
  }

 private:
  template <WeightFormat kFormat>
  TOKENSTEP_VEC __m512i table() {
    uint16_t entries __attribute__((vector_size(64)));
    for (int i = 0; i < 32; ++i) {
      const int q = i % 16 - (kFormat == WeightFormat::kQ4_0 ? 8 : 0);
      entries[i] = static_cast<uint16_t>(tokenstep::bits_of(static_cast<float>(q)) >> 16);
    }
    return reinterpret_cast<__m512i>(entries);
  }
};
#endif

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
