#include "int8_linear.h"
#include "launch.h"
#include "mma.cuh"

namespace dtm_fast {
namespace {

// Every step rounded to float32 and none fused, as on the CPU.
struct Dequantize {
  const float *scale_x, *scale, *bias;

  using Row = float;
  struct Column {
    float scale, bias;
  };
  __device__ Row row(int64_t m) const { return scale_x[m]; }
  __device__ Column column(int64_t n) const { return {scale[n], bias != nullptr ? bias[n] : 0.0f}; }
  __device__ float value(int32_t sum, Row scale_of_row, const Column& column) const {
    const float product = __fmul_rn(__int2float_rn(sum), __fmul_rn(scale_of_row, column.scale));
    return bias != nullptr ? __fadd_rn(product, column.bias) : product;  // adding 0 would make 0 of -0
  }
};

template <typename Shape, bool kAlignedWeight>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    int8_mma_kernel(const Int8Linear args, int row_tiles, int col_tiles, bool wide) {
  extern __shared__ __align__(128) unsigned char shared[];
  const TilePlace place = place_of_tile(blockIdx.x, row_tiles, col_tiles);
  const int64_t first_row = static_cast<int64_t>(place.row) * Shape::kRows;
  const int64_t first_col = static_cast<int64_t>(place.col) * Shape::kCols;
  const Operand x = {reinterpret_cast<const char*>(args.qx), args.qx_stride, args.M, args.K};
  const Operand weight = {reinterpret_cast<const char*>(args.qweight), args.qweight_stride, args.N, args.K};
  int32_t sums[Shape::kRowFragments][Shape::kColFragments][4];
  wait_for_previous_kernels();  // the quantization
  multiply_tile<Shape, true, kAlignedWeight>(x, first_row, weight, first_col, shared, sums);
  const Results out = {args.type, args.y, args.M, args.N, wide};
  store_sums(sums, out, first_row + Shape::warp_row(), first_col + Shape::warp_col(),
             Dequantize{args.scale_x, args.scale, args.bias});
}

template <typename Shape, bool kAlignedWeight>
void launch(const Int8Linear& args, CUstream_st* stream) {
  const auto kernel = int8_mma_kernel<Shape, kAlignedWeight>;
  const int row_tiles = static_cast<int>(tiles_of(args.M, Shape::kRows));
  const int col_tiles = static_cast<int>(tiles_of(args.N, Shape::kCols));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(static_cast<int64_t>(row_tiles) * col_tiles));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  // Only code for compute capability 9.0 waits for the quantization; the PTX of 8.0, which later GPUs run,
  // does not.
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "int8_linear");
  config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args, row_tiles, col_tiles,
                                wide_results(args.y, args.type, args.N)),
             "int8_linear");
}

template <typename Shape>
void launch_shape(const Int8Linear& args, CUstream_st* stream) {
  is_aligned(args.qweight, args.qweight_stride, args.N, kChunkBytes) ? launch<Shape, true>(args, stream)
                                                                     : launch<Shape, false>(args, stream);
}

}  // namespace

void int8_mma(const Int8Linear& args, CUstream_st* stream) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t large_tiles = tiles_of(args.M, LargeMmaShape::kRows) * tiles_of(args.N, LargeMmaShape::kCols);
  args.M > SmallMmaShape::kRows&& large_tiles >= multiprocessors()
      ? launch_shape<LargeMmaShape>(args, stream)
      : launch_shape<SmallMmaShape>(args, stream);
}

}  // namespace dtm_fast
