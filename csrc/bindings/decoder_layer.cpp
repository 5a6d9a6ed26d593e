// The part of dtm_fast._cpu that runs decoder layers. No arithmetic here; the GIL is released around every
// kernel.
#include "../kernels/cpu/decoder_layer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../kernels/cpu/large_pages.h"
#include "bind.h"

namespace py = pybind11;

namespace dtm_fast {
namespace {

static_assert(sizeof(SequencePart) == 16 * sizeof(int64_t), "Python fills in rows of 16 int64");

int64_t copy_projections(const std::vector<Projection>& from, Projection* to, size_t most) {
  if (from.empty() || from.size() > most) throw std::invalid_argument("projections: too many or none");
  std::copy(from.begin(), from.end(), to);
  return static_cast<int64_t>(from.size());
}

}  // namespace

void bind_decoder_layer(py::module_& module) {
  py::class_<Projection>(module, "Projection")
      .def(py::init([](Address panels, Address change, Address panels_rest, Address change_rest, Address bias,
                       int64_t N, int64_t first) {
             return Projection{pointer<float>(panels),
                               pointer<float>(change),
                               pointer<float>(panels_rest),
                               pointer<float>(change_rest),
                               pointer<float>(bias),
                               N,
                               first};
           }),
           py::arg("panels"), py::arg("change"), py::arg("panels_rest"), py::arg("change_rest"),
           py::arg("bias"), py::arg("N"), py::arg("first"));

  py::class_<DecoderLayer>(module, "DecoderLayer")
      .def(py::init([](int arithmetic, int start, int64_t hidden, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, int64_t intermediate, float eps, float attention_scale,
                       Address attention_norm, Address mlp_norm, Address q_norm, Address k_norm,
                       Address cosine, Address sine, const std::vector<Projection>& attention_in,
                       const Projection& attention_out, const std::vector<Projection>& mlp_in,
                       const Projection& mlp_out) {
             DecoderLayer layer = {};
             layer.arithmetic = LayerArithmetic(arithmetic);
             layer.start = LayerStart(start);
             layer.hidden = hidden;
             layer.heads = heads;
             layer.kv_heads = kv_heads;
             layer.head_dim = head_dim;
             layer.intermediate = intermediate;
             layer.eps = eps;
             layer.attention_scale = attention_scale;
             layer.attention_norm = pointer<float>(attention_norm);
             layer.mlp_norm = pointer<float>(mlp_norm);
             layer.q_norm = pointer<float>(q_norm);
             layer.k_norm = pointer<float>(k_norm);
             layer.cosine = pointer<float>(cosine);
             layer.sine = pointer<float>(sine);
             layer.attention_ins = copy_projections(attention_in, layer.attention_in, 3);
             layer.attention_out = attention_out;
             layer.mlp_ins = copy_projections(mlp_in, layer.mlp_in, 2);
             layer.mlp_out = mlp_out;
             return layer;
           }),
           py::kw_only(), py::arg("arithmetic"), py::arg("start"), py::arg("hidden"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("intermediate"), py::arg("eps"),
           py::arg("attention_scale"), py::arg("attention_norm"), py::arg("mlp_norm"), py::arg("q_norm"),
           py::arg("k_norm"), py::arg("cosine"), py::arg("sine"), py::arg("attention_in"),
           py::arg("attention_out"), py::arg("mlp_in"), py::arg("mlp_out"));

  module.attr("MOST_HEAD_DIM") = kMostHeadDim;
  module.def("has_layer_arithmetic", [](int isa, int arithmetic) {
    return has_layer_arithmetic(CpuIsa(isa), LayerArithmetic(arithmetic));
  });
  module.def("packed_matrix_size", [](int arithmetic, int64_t N, int64_t K) {
    return packed_matrix_size(LayerArithmetic(arithmetic), N, K);
  });
  module.def(
      "populate_large_pages",
      [](int num_threads, Address data, int64_t bytes) {
        populate_large_pages(pointer<char>(data), bytes, num_threads);
      },
      ReleaseGil());
  module.def(
      "pack_matrix",
      [](int isa, int num_threads, int arithmetic, Address matrix, int64_t N, int64_t K, Address packed) {
        pack_matrix(CpuIsa(isa), LayerArithmetic(arithmetic), pointer<float>(matrix), N, K,
                    pointer<float>(packed), num_threads);
      },
      ReleaseGil());
  module.def(
      "decoder_layer",
      [](int isa, int num_threads, const DecoderLayer& layer, Address parts, int64_t count) {
        decoder_layer(CpuIsa(isa), layer, pointer<SequencePart>(parts), count, num_threads);
      },
      ReleaseGil());
}

}  // namespace dtm_fast
