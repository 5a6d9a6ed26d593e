// dtm_fast_bench_limits: what this machine can do at most. Built for the benchmarks only, never shipped.
#include <pybind11/pybind11.h>

#include <chrono>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/cpu/cpu_features.h"
#include "../kernels/cpu/parallel_for.h"
#include "limits_features.h"
#include "peak_loops.h"

namespace py = pybind11;
using namespace dtm_fast;
using namespace dtm_fast::bench;

namespace {

struct Limit {
  const char* name;
  bool available;
  PeakLoop loop;
  int64_t ops;
};

std::vector<Limit> limits() {
  const CpuIsa isa = detected_cpu_isa();
  const bool avx512 = isa >= CpuIsa::kAvx512;
  return {
      {"fp32_fma", isa >= CpuIsa::kAvx2, avx512 ? fma_avx512 : fma_avx2,
       avx512 ? kFmaAvx512Ops : kFmaAvx2Ops},
      {"bf16_dot", has_avx512_bf16(), dot_bf16_avx512_bf16, kDotBf16Ops},
      {"int8_vnni", isa >= CpuIsa::kAvx512Vnni, dot_int8_avx512_vnni, kDotInt8Ops},
      {"bf16_amx", has_amx_bf16(), dot_bf16_amx, kAmxBf16Ops},
      {"int8_amx", isa >= CpuIsa::kAmx, dot_int8_amx, kAmxInt8Ops},
  };
}

Limit find(const std::string& name) {
  for (const Limit& limit : limits()) {
    if (limit.name == name) return limit;
  }
  throw std::invalid_argument(name + ": unknown limit");
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

volatile double consumed;  // what keeps the results alive

// Operations per second of all threads together, over one timed region.
double peak(const std::string& name, int threads, int64_t iterations) {
  const Limit limit = find(name);
  if (!limit.available) throw std::invalid_argument(name + ": this machine has no such instruction");
  std::vector<float> seed(1024);
  std::mt19937 random(1);
  for (float& each : seed) each = std::uniform_real_distribution<float>(0.5f, 0.99f)(random);
  std::vector<double> results(threads);
  const auto run = [&](int64_t task, int) { results[task] = limit.loop(iterations, seed.data()); };
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, threads, run);
  const double seconds = seconds_since(start);
  for (double each : results) consumed = each;
  return static_cast<double>(limit.ops) * iterations * threads / seconds;
}

// Bytes per second of all threads together, reading once `bytes` from `address` (aligned to 64).
double read_memory(std::uintptr_t address, int64_t bytes, int threads) {
  const CpuIsa isa = detected_cpu_isa();
  if (isa < CpuIsa::kAvx2) throw std::invalid_argument("read: this machine has no AVX2");
  const auto loop = isa >= CpuIsa::kAvx512 ? read_avx512 : read_avx2;
  const int64_t share = bytes / threads / 512 * 512;
  std::vector<uint64_t> results(threads);
  const auto run = [&](int64_t task, int) {
    results[task] = loop(reinterpret_cast<const char*>(address) + task * share, share);
  };
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, threads, run);
  const double seconds = seconds_since(start);
  for (uint64_t each : results) consumed = static_cast<double>(each);
  return static_cast<double>(share) * threads / seconds;
}

}  // namespace

PYBIND11_MODULE(dtm_fast_bench_limits, module) {
  module.def("names", [] {
    py::dict names;
    for (const Limit& limit : limits()) names[limit.name] = limit.available;
    return names;
  });
  module.def("operations", [](const std::string& name) { return find(name).ops; });
  module.def("peak", peak, py::arg("name"), py::arg("threads"), py::arg("iterations"),
             py::call_guard<py::gil_scoped_release>());
  module.def("read", read_memory, py::arg("address"), py::arg("bytes"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
}
