// Eight neighbours of a row: what one thread loads, computes and stores. Rows have a multiple of eight
// elements.
#pragma once
#include <type_traits>

#include "cuda/ptx.cuh"

namespace tokenstep::cuda {

constexpr int kPieceElements = 8;

template <class T>
struct Piece {
  T element[kPieceElements];
};

// Whether every piece of rows at these strides, in elements, begins at a multiple of its own size, up to 16
// bytes.
template <class T, class... Strides>
bool has_aligned_pieces(const void* data, Strides... strides) {
  constexpr int64_t kBytes = sizeof(Piece<T>) < 16 ? sizeof(Piece<T>) : 16;
  const auto fits = [](int64_t bytes) { return bytes % kBytes == 0; };
  return fits(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data))) &&
         (fits(strides * static_cast<int64_t>(sizeof(T))) && ...);
}

// In words of 16 bytes, or of 8 for elements of one byte, where `aligned`; else element by element.
template <class T>
__device__ __forceinline__ Piece<T> load_piece(const T* row, bool aligned) {
  using Word = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  Piece<T> piece;
  if (aligned) {
    Word words[sizeof piece / sizeof(Word)];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof piece / sizeof(Word)); ++i)
      words[i] = reinterpret_cast<const Word*>(row)[i];
    memcpy(&piece, words, sizeof piece);
  } else {
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) piece.element[i] = row[i];
  }
  return piece;
}

template <class T>
__device__ __forceinline__ void store_piece(T* row, const Piece<T>& piece, bool aligned) {
  using Word = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  if (aligned) {
    Word words[sizeof piece / sizeof(Word)];
    memcpy(words, &piece, sizeof piece);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof piece / sizeof(Word)); ++i)
      reinterpret_cast<Word*>(row)[i] = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) row[i] = piece.element[i];
  }
}

}  // namespace tokenstep::cuda
