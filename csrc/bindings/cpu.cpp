// dtm_fast._cpu: the CPU kernels, for tensors given as addresses, sizes and strides (in elements).
// The Python side has checked them. No arithmetic here; the GIL is released around every kernel.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "../kernels/cpu/apply_mask.h"
#include "../kernels/cpu/certificate_threats.h"
#include "../kernels/cpu/cpu_features.h"
#include "../kernels/cpu/int8_linear.h"
#include "../kernels/cpu/mask_bits.h"
#include "../kernels/cpu/masked_ladder.h"
#include "../kernels/cpu/masked_linear.h"
#include "../kernels/cpu/quantize_int8.h"
#include "../kernels/cpu/select_threatened.h"
#include "../kernels/cpu/sparse_linear.h"
#include "../kernels/cpu/sparse_pack.h"
#include "../kernels/cpu/token_divergence.h"
#include "bind.h"

namespace py = pybind11;
using namespace dtm_fast;

PYBIND11_MODULE(_cpu, module) {
  module.doc() =
      "CPU kernels of dtm_fast; isa: 1 = avx2, 2 = avx512, 3 = avx512_vnni, 4 = avx512_bf16, 5 = amx; type: "
      "0 = float32, 1 = "
      "bfloat16";
  module.attr("INT8_LINEAR_MAX_K") = kInt8LinearMaxK;

  bind_decoder_layer(module);
  bind_direct(module);

  module.def("detected_isa", [] { return static_cast<int>(detected_cpu_isa()); });

  module.def(
      "quantize_int8",
      [](int isa, int num_threads, Address x, int x_type, int64_t x_stride, int64_t M, int64_t K, Address qx,
         Address scale) {
        quantize_int8(
            CpuIsa(isa),
            {pointer<void>(x), FloatType(x_type), x_stride, M, K, pointer<int8_t>(qx), pointer<float>(scale)},
            num_threads);
      },
      ReleaseGil());

  module.def(
      "int8_linear",
      [](int isa, int num_threads, int type, Address x, int64_t x_stride, Address qweight,
         int64_t qweight_stride, Address scale_w, Address bias, int64_t M, int64_t N, int64_t K, Address y) {
        int8_linear(CpuIsa(isa),
                    {FloatType(type), pointer<void>(x), x_stride, pointer<int8_t>(qweight), qweight_stride,
                     pointer<float>(scale_w), pointer<float>(bias), M, N, K, pointer<void>(y)},
                    num_threads);
      },
      ReleaseGil());

  module.def(
      "pack_mask",
      [](int isa, int num_threads, Address mask, int64_t mask_stride, int64_t N, int64_t K, Address packed,
         int64_t packed_stride) {
        pack_mask(CpuIsa(isa),
                  {pointer<uint8_t>(mask), mask_stride, N, K, pointer<uint8_t>(packed), packed_stride},
                  num_threads);
      },
      ReleaseGil());

  module.def(
      "unpack_mask",
      [](int isa, int num_threads, Address packed, int64_t packed_stride, int64_t N, int64_t K, Address mask,
         int64_t mask_stride) {
        unpack_mask(CpuIsa(isa),
                    {pointer<uint8_t>(packed), packed_stride, N, K, pointer<uint8_t>(mask), mask_stride},
                    num_threads);
      },
      ReleaseGil());

  module.def(
      "apply_mask",
      [](int isa, int num_threads, int type, Address weight, int64_t weight_stride, Address mask,
         int64_t mask_stride, int64_t N, int64_t K, Address y) {
        apply_mask(CpuIsa(isa),
                   {FloatType(type), pointer<void>(weight), weight_stride, pointer<uint8_t>(mask),
                    mask_stride, N, K, pointer<void>(y)},
                   num_threads);
      },
      ReleaseGil());

  module.def(
      "masked_linear",
      [](int isa, int num_threads, int type, Address x, int64_t x_stride, Address weight,
         int64_t weight_stride, Address mask, int64_t mask_row_stride, int64_t mask_variant_stride,
         Address bias, int64_t V, int64_t M, int64_t N, int64_t K, Address y) {
        masked_linear(CpuIsa(isa),
                      {FloatType(type), pointer<void>(x), x_stride, pointer<void>(weight), weight_stride,
                       pointer<uint8_t>(mask), mask_row_stride, mask_variant_stride, pointer<float>(bias), V,
                       M, N, K, pointer<void>(y)},
                      num_threads);
      },
      ReleaseGil());

  module.def(
      "masked_ladder",
      [](int isa, int num_threads, int type, Address x, int64_t x_stride, Address weight,
         int64_t weight_stride, Address mask, int64_t mask_row_stride, int64_t mask_level_stride,
         Address bias, int64_t V, int64_t M, int64_t N, int64_t K, Address y) {
        masked_ladder(CpuIsa(isa),
                      {FloatType(type), pointer<void>(x), x_stride, pointer<void>(weight), weight_stride,
                       pointer<uint8_t>(mask), mask_row_stride, mask_level_stride, pointer<float>(bias), V, M,
                       N, K, pointer<void>(y)},
                      num_threads);
      },
      ReleaseGil());

  module.def(
      "sparse_order",
      [](int num_threads, Address mask, int64_t mask_stride, int64_t N, int64_t K, Address rows,
         Address steps) {
        sparse_order(
            {pointer<uint8_t>(mask), mask_stride, N, K, pointer<uint16_t>(rows), pointer<uint8_t>(steps)},
            num_threads);
      },
      ReleaseGil());

  module.def(
      "sparse_pack",
      [](int num_threads, int type, Address weight, int64_t weight_stride, Address mask, int64_t mask_stride,
         int64_t N, int64_t K, Address rows, Address steps, Address values, Address columns) {
        sparse_pack(
            {FloatType(type),
             pointer<void>(weight),
             weight_stride,
             {pointer<uint8_t>(mask), mask_stride, N, K, pointer<uint16_t>(rows), pointer<uint8_t>(steps)},
             pointer<float>(values),
             pointer<uint8_t>(columns)},
            num_threads);
      },
      ReleaseGil());

  module.def(
      "sparse_linear",
      [](int isa, int num_threads, int type, Address x, int64_t x_stride, Address values, int64_t value_steps,
         Address columns, int64_t column_words, Address rows, Address steps, int64_t N, int64_t K,
         Address bias, int64_t M, Address y) {
        sparse_linear(CpuIsa(isa),
                      {FloatType(type),
                       pointer<void>(x),
                       x_stride,
                       {pointer<float>(values), value_steps, pointer<uint8_t>(columns), column_words,
                        pointer<uint16_t>(rows), pointer<uint8_t>(steps), N, K},
                       pointer<float>(bias),
                       M,
                       pointer<void>(y)},
                      num_threads);
      },
      ReleaseGil());

  module.def(
      "token_divergence",
      [](int isa, int num_threads, int type, Address hidden, int64_t hidden_stride, Address lm_head,
         int64_t lm_head_stride, Address reference, int64_t T, int64_t V, int64_t D, Address mismatch,
         Address nll) {
        token_divergence(
            CpuIsa(isa),
            {FloatType(type), pointer<void>(hidden), hidden_stride, pointer<void>(lm_head), lm_head_stride,
             pointer<int64_t>(reference), T, V, D, pointer<uint8_t>(mismatch), pointer<float>(nll)},
            num_threads);
      },
      ReleaseGil());

  module.def(
      "certificate_threats",
      [](int isa, int num_threads, int type, Address hidden, int64_t hidden_stride, Address base,
         Address radius, int64_t P, int64_t D, int64_t R, float enlarged, float added, Address threats) {
        certificate_threats(CpuIsa(isa),
                            {FloatType(type), pointer<void>(hidden), hidden_stride, pointer<void>(base),
                             pointer<float>(radius), P, D, R, enlarged, added, pointer<int64_t>(threats)},
                            num_threads);
      },
      ReleaseGil());

  module.def(
      "select_threatened",
      [](Address threats, Address top, Address nearest, Address reference, int64_t P, int64_t K, int64_t V,
         int64_t least, int64_t most, Address positions, Address tokens, Address own) {
        const SelectedCounts counts =
            select_threatened({pointer<int64_t>(threats), pointer<int64_t>(top), pointer<int64_t>(nearest),
                               pointer<int64_t>(reference), P, K, V, least, most, pointer<int64_t>(positions),
                               pointer<int64_t>(tokens), pointer<int64_t>(own)});
        return std::pair(counts.positions, counts.tokens);
      },
      ReleaseGil());
}
