#include "cuda/hadamard_gram.cuh"

#include <algorithm>

namespace nestopt::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxBlocks = 32768;  // many times what runs at once; more are taken in turns

template <class D, class G, int kGroup>
cudaError_t launch_groups(const HadamardGramTile& tile, cudaStream_t stream) {
  constexpr int kGroups = kBlock / kGroup;
  const int64_t blocks = std::min((tile.rows * tile.columns + kGroups - 1) / kGroups, kMaxBlocks);
  return launch(hadamard_sums_kernel<D, G, kGroup, kBlock>, static_cast<uint32_t>(blocks), kBlock, stream, tile);
}

}  // namespace

// Bytes per element of the panels: read both; 8 in float32, most of it from the second-level cache, where the matrix
// products have left it. Per entry of the Gram matrix: read and write it and its mirror image, 16 in float32. One
// multiplication and one addition per element, two additions where there is one position.
template <class D, class G>
cudaError_t add_hadamard_tile(const HadamardGramTile& tile, cudaStream_t stream) {
  if (tile.rows == 0 || tile.columns == 0) return cudaSuccess;
  if (tile.column_positions == 1) {
    const int64_t blocks = (tile.rows + kTile - 1) / kTile * ((tile.columns + kTile - 1) / kTile);
    return launch(hadamard_products_kernel<D, G>, static_cast<uint32_t>(std::min(blocks, kMaxBlocks)), kTileThreads,
                  stream, tile);
  }
  if (tile.row_positions * tile.column_positions <= 4096) return launch_groups<D, G, 32>(tile, stream);
  return launch_groups<D, G, kBlock>(tile, stream);
}

template cudaError_t add_hadamard_tile<float, float>(const HadamardGramTile&, cudaStream_t);
template cudaError_t add_hadamard_tile<float, double>(const HadamardGramTile&, cudaStream_t);
template cudaError_t add_hadamard_tile<double, double>(const HadamardGramTile&, cudaStream_t);

}  // namespace nestopt::cuda
