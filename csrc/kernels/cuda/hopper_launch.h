// Launches of the kernels of compute capability 9.0: persistent clusters of blocks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "launch.h"

namespace dtm_fast {

// The blocks of a cluster, where two share a tile of B: two save a third of the loads from L2, but an odd
// number of tiles of A leaves one block idle, which only a large number hides.
inline int cluster_blocks(int64_t tiles_a) { return tiles_a % 2 == 0 || tiles_a >= 16 ? 2 : 1; }

// The tiles that the busiest block computes.
inline int64_t tiles_of_a_block(int64_t tiles_a, int64_t tiles_b, int blocks) {
  const int64_t clusters = std::max(1, multiprocessors() / blocks);
  const int64_t tiles = (tiles_a + blocks - 1) / blocks * tiles_b;
  return (tiles + clusters - 1) / clusters;
}

// kernel(args...) by one block of threads on each multiprocessor, or fewer if there are fewer tiles.
// most_shared_bytes: the most that any launch of this kernel asks for. The limit belongs to the kernel, and
// another thread may launch it in between: set to what each launch needs, it would be too low for one of
// them. early: it may start while the kernel before it in the stream runs, and waits for that itself.
template <typename... Parameters, typename... Args>
void launch_clusters(void (*kernel)(Parameters...), const char* operation, int blocks, int64_t tiles,
                     int threads, int shared_bytes, int most_shared_bytes, bool early, cudaStream_t stream,
                     Args&&... args) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes),
             operation);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(blocks);
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  const int64_t clusters = std::min<int64_t>(std::max(1, multiprocessors() / blocks), tiles);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = early ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), operation);
  check_cuda(cudaGetLastError(), operation);
}

}  // namespace dtm_fast
