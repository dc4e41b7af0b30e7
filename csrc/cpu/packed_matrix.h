// Weight matrices as the CPU multiplies them: tiles of 16 rows, a vector lane a row, so that scales are read
// as vectors and no sum goes across lanes. Quantised blocks keep their bits; only their order changes.
//
// A tile is one stream of bytes, block of 32 columns by block. Of a block first the scales (float16: one a
// row, for Q4_1 also a minimum a row), then the values:
//   bfloat16  16 pairs of columns, each a pair a row
//   Q4_0/1    4 words of 32 bits a row: GGUF's, with the middle two of four bytes swapped, so that the two
//   columns of
//             a pair are the same nibble of a word's two halves (word_of_pair, nibble_of_pair)
//   Q8_0      16 pairs of columns, each two bytes a row
#pragma once
#include <cstddef>
#include <cstdint>

namespace tokenstep::cpu {

enum class WeightFormat { kBFloat16, kQ4_0, kQ4_1, kQ8_0 };

constexpr int kTileRows = 16;
constexpr int kBlockColumns = 32;

constexpr const char* name_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4_0:
      return "q4_0";
    case WeightFormat::kQ4_1:
      return "q4_1";
    case WeightFormat::kQ8_0:
      return "q8_0";
    case WeightFormat::kBFloat16:
      break;
  }
  return "bfloat16";
}

constexpr bool has_scales(WeightFormat format) { return format != WeightFormat::kBFloat16; }
constexpr bool has_minima(WeightFormat format) { return format == WeightFormat::kQ4_1; }
constexpr bool has_nibbles(WeightFormat format) {
  return format == WeightFormat::kQ4_0 || format == WeightFormat::kQ4_1;
}
// Bytes of a block of one row: its values, and the scales before them in GGUF.
constexpr int value_bytes(WeightFormat format) {
  return format == WeightFormat::kBFloat16 ? 64 : has_nibbles(format) ? 16 : 32;
}
constexpr int scale_bytes(WeightFormat format) {
  return 2 * (int{has_scales(format)} + int{has_minima(format)});
}
constexpr int block_bytes(WeightFormat format) { return scale_bytes(format) + value_bytes(format); }

// Where columns 2 pair and 2 pair + 1 of a block are: GGUF has columns 0-15 in low nibbles, 16-31 in high
// ones.
constexpr int word_of_pair(int pair) { return pair % 8 / 2; }
constexpr int nibble_of_pair(int pair) { return 2 * (pair % 2) + pair / 8; }

// Bytes of a packed matrix.
constexpr int64_t packed_bytes(WeightFormat format, int64_t rows, int64_t columns) {
  return (rows + kTileRows - 1) / kTileRows * kTileRows * (columns / kBlockColumns) * block_bytes(format);
}

class PackedMatrix {
 public:
  static constexpr int kAlignment = 64;  // a cache line, and the widest vector

  // In memory of the caller's, bytes() of it from an aligned address. columns: a multiple of 32. Rows that
  // fill up the last tile become zeros; all others are to be packed.
  PackedMatrix(WeightFormat format, int64_t rows, int64_t columns, uint8_t* data);

  // Rows first_row .. first_row + count of the matrix from as many rows of `source`, row_bytes() each:
  // bfloat16 values, or GGUF's blocks. Threads may pack different rows at once.
  void pack(const uint8_t* source, int64_t first_row, int64_t count);
  // The numbers of a row: scale * q (+ minimum) in float32, rounded once.
  void unpack(int64_t row, float* out) const;

  WeightFormat format() const { return format_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t blocks() const { return columns_ / kBlockColumns; }
  int64_t tiles() const { return (rows_ + kTileRows - 1) / kTileRows; }
  int64_t row_bytes() const { return blocks() * block_bytes(format_); }
  int64_t tile_bytes() const { return kTileRows * row_bytes(); }
  int64_t bytes() const { return packed_bytes(format_, rows_, columns_); }
  const uint8_t* tile(int64_t index) const { return data_ + index * tile_bytes(); }

 private:
  WeightFormat format_;
  int64_t rows_, columns_;
  uint8_t* data_;
};

}  // namespace tokenstep::cpu
