#include "cpu/packed_matrix.h"

#include <cstring>

#include "common/numerics.h"

namespace tokenstep::cpu {
namespace {

template <class T>
T read(const uint8_t* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

float float_from_half(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  // The exponent is rebased by a product, exact for subnormal numbers too.
  const uint32_t finite = bits_of(float_from_bits(magnitude << 13) * 0x1p112f);
  return float_from_bits(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : finite));
}

// The values of one row's block into its lane: every kBytes of them, `stride` bytes from the last.
template <int kBytes>
void scatter(const uint8_t* from, int count, uint8_t* lane) {
  for (int i = 0; i < count; ++i) memcpy(lane + i * kTileRows * kBytes, from + i * kBytes, kBytes);
}

void scatter_nibbles(const uint8_t* from, uint8_t* lane) {
  for (int group = 0; group < 4; ++group) {
    const uint8_t* in = from + 4 * group;
    const uint8_t word[4] = {in[0], in[2], in[1], in[3]};
    memcpy(lane + group * kTileRows * 4, word, 4);
  }
}

}  // namespace

PackedMatrix::PackedMatrix(WeightFormat format, int64_t rows, int64_t columns, uint8_t* data)
    : format_(format), rows_(rows), columns_(columns), data_(data) {
  if (rows_ % kTileRows) memset(data_ + (tiles() - 1) * tile_bytes(), 0, static_cast<size_t>(tile_bytes()));
}

void PackedMatrix::pack(const uint8_t* source, int64_t first_row, int64_t count) {
  const int scales = scale_bytes(format_), block = block_bytes(format_);
  for (int64_t row = first_row; row < first_row + count; ++row) {
    const int64_t lane = row % kTileRows;
    uint8_t* out = data_ + row / kTileRows * tile_bytes();
    for (int64_t i = 0; i < blocks(); ++i, source += block, out += kTileRows * block) {
      scatter<2>(source, scales / 2, out + lane * 2);
      uint8_t* values = out + kTileRows * scales;
      if (has_nibbles(format_))
        scatter_nibbles(source + scales, values + lane * 4);
      else if (format_ == WeightFormat::kQ8_0)
        scatter<2>(source + scales, kBlockColumns / 2, values + lane * 2);
      else
        scatter<4>(source, kBlockColumns / 2, values + lane * 4);
    }
  }
}

void PackedMatrix::unpack(int64_t row, float* out) const {
  const int64_t lane = row % kTileRows;
  const uint8_t* in = tile(row / kTileRows);
  for (int64_t i = 0; i < blocks(); ++i, out += kBlockColumns, in += kTileRows * block_bytes(format_)) {
    const float scale = has_scales(format_) ? float_from_half(read<uint16_t>(in + lane * 2)) : 1.0f;
    const float minimum =
        has_minima(format_) ? float_from_half(read<uint16_t>(in + (kTileRows + lane) * 2)) : 0.0f;
    const uint8_t* values = in + kTileRows * scale_bytes(format_);
    for (int pair = 0; pair < kBlockColumns / 2; ++pair) {
      float* two = out + 2 * pair;
      if (format_ == WeightFormat::kBFloat16) {
        const uint32_t word = read<uint32_t>(values + (pair * kTileRows + lane) * 4);
        two[0] = float_from_bits(word << 16);
        two[1] = float_from_bits(word & 0xffff0000u);
      } else if (format_ == WeightFormat::kQ8_0) {
        const uint8_t* bytes = values + (pair * kTileRows + lane) * 2;
        for (int j = 0; j < 2; ++j) two[j] = scale * static_cast<float>(static_cast<int8_t>(bytes[j]));
      } else {
        const uint32_t word = read<uint32_t>(values + (word_of_pair(pair) * kTileRows + lane) * 4);
        for (int j = 0; j < 2; ++j) {
          const int q = static_cast<int>(word >> (16 * j + 4 * nibble_of_pair(pair)) & 15u);
          two[j] = has_minima(format_) ? scale * static_cast<float>(q) + minimum
                                       : scale * static_cast<float>(q - 8);
        }
      }
    }
  }
}

}  // namespace tokenstep::cpu
