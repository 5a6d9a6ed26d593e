// certificate_threats on a GPU against double precision and sets on the CPU.
// benchmarks/cuda/on_device.sh builds and runs it, also under compute-sanitizer.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "../kernels/cuda/certificate_threats.h"
#include "cuda_check.h"

using namespace dtm_fast;
using namespace dtm_fast::test;

namespace {

constexpr float kEnlarged = 1.0f + 0x1p-16f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kWordBits = 32;

int64_t class_of(int64_t threats) {
  int64_t found = 0;
  for (int64_t most = 16; threats > most; most *= 16) ++found;
  return found;
}

int64_t classes_up_to(int64_t nearest) { return nearest == 0 ? 0 : class_of(nearest) + 1; }

template <typename T>
class Case {
 public:
  int64_t P_, D_, R_, V_, stride_, offset_;
  std::vector<T> hidden_, base_;
  std::vector<float> radius_;
  std::vector<int64_t> top_, nearest_, reference_;
  std::vector<int64_t> threats_;  // what is expected
  float added_;

  Case(int64_t positions, int64_t depth, int64_t radii, int64_t vocabulary, int64_t stride, int64_t offset,
       Random& random)
      : P_(positions),
        D_(depth),
        R_(radii),
        V_(vocabulary),
        stride_(stride),
        offset_(offset),
        hidden_(static_cast<size_t>(positions == 0 ? 0 : (positions - 1) * stride + depth),
                from_float<T>(kNan)),
        added_(static_cast<float>(depth + 1) * 0x1p-100f) {
    for (int64_t p = 0; p < P_; ++p) {
      double square = 0.0;
      for (int64_t d = 0; d < D_; ++d) {
        const T base = from_float<T>(random.uniform());
        const T moved = from_float<T>(to_float(base) + 0.1f * random.uniform());
        base_.push_back(base);
        hidden_[static_cast<size_t>(p * stride_ + d)] = moved;
        const double difference = static_cast<double>(to_float(moved)) - static_cast<double>(to_float(base));
        square += difference * difference;
      }
      if (p % 7 == 3 && D_ > 0) {
        hidden_[static_cast<size_t>(p * stride_ + p % D_)] = from_float<T>(p % 2 == 0 ? kInfinity : kNan);
        square = kNan;
      }
      // Radii that are not the bound's last bits away from it; the first of them below it.
      const double bound = std::sqrt(square) * static_cast<double>(kEnlarged) + static_cast<double>(added_);
      const int64_t below = random.integer(0, p % 3 == 0 ? 0 : static_cast<int>(R_));
      for (int64_t r = 0; r < R_; ++r) {
        const double factor = r < below ? 1.0 - 0x1p-20 : 1.0 + 0x1p-20;
        radius_.push_back(std::isnan(square) ? (r % 2 == 0 ? kInfinity : 1.0f)
                                             : static_cast<float>(bound * factor));
      }
      int64_t threats = std::isnan(square) ? R_ : below;
      if (p % 11 == 5 && threats < R_) {
        radius_.back() = kNan;
        ++threats;
      }
      threats_.push_back(threats);
      top_.push_back(random.integer(0, static_cast<int>(V_) - 1));
      reference_.push_back(p % 2 == 0 ? top_.back() : random.integer(0, static_cast<int>(V_) - 1));
      for (int64_t r = 0; r + 1 < R_; ++r) nearest_.push_back(random.integer(0, static_cast<int>(V_) - 1));
    }
  }

  CertificateThreats args(const DeviceBuffer<T>& hidden, const DeviceBuffer<T>& base,
                          const DeviceBuffer<float>& radius, const DeviceBuffer<int64_t>& threats) const {
    return {float_type<T>(), hidden.data(), stride_,       base.data(), radius.data(), P_, D_, R_,
            kEnlarged,       added_,        threats.data()};
  }

  void check() const {
    if (left_out()) return;
    const DeviceBuffer<T> hidden(hidden_, offset_), base(base_, offset_);
    const DeviceBuffer<float> radius(radius_);
    const DeviceBuffer<int64_t> top(top_), nearest(nearest_), reference(reference_);
    DeviceBuffer<int64_t> threats(P_);
    const Stream stream;
    certificate_threats_cuda(args(hidden, base, radius, threats), nullptr, stream);
    expect_threats(threats, "alone");
    threats.poison();

    const int64_t words = (V_ + kWordBits - 1) / kWordBits, classes = classes_up_to(R_ - 1);
    const int64_t begin = R_ + 1 + kThreatClasses;
    DeviceBuffer<uint8_t> mismatch(P_);
    DeviceBuffer<int32_t> counts(begin + classes * words);
    const ThreatMarks marks = {top.data(),      nearest.data(), reference.data(), V_,
                               mismatch.data(), counts.data(),  counts.size()};
    certificate_threats_cuda(args(hidden, base, radius, threats), &marks, stream);
    expect_threats(threats, "with marks");
    const std::vector<int32_t> counted = counts.host();
    const std::vector<uint8_t> mismatches = mismatch.host();

    std::vector<int32_t> expected(counted.size(), 0);
    std::vector<std::set<int64_t>> tokens(static_cast<size_t>(kThreatClasses));
    bool right = true;
    for (int64_t p = 0; p < P_; ++p) {
      const int64_t count = threats_[static_cast<size_t>(p)];
      const int64_t own = top_[static_cast<size_t>(p)], wanted = reference_[static_cast<size_t>(p)];
      right = right && mismatches[static_cast<size_t>(p)] == (own != wanted ? 1 : 0);
      if (count > 0) ++expected[static_cast<size_t>(count)];
      if (count == 0 || count == R_) continue;
      std::set<int64_t>& of_class = tokens[static_cast<size_t>(class_of(count))];
      of_class.insert({own, wanted});
      for (int64_t i = 0; i < count; ++i) of_class.insert(nearest_[static_cast<size_t>(p * (R_ - 1) + i)]);
    }
    for (int64_t i = 0; i < classes; ++i) {
      expected[static_cast<size_t>(R_ + 1 + i)] = static_cast<int32_t>(tokens[static_cast<size_t>(i)].size());
      for (int64_t token : tokens[static_cast<size_t>(i)]) {
        int32_t& word = expected[static_cast<size_t>(begin + i * words + token / kWordBits)];
        word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1u << (token % kWordBits));
      }
    }
    expect(right && counted == expected, "P %lld, R %lld, V %lld: the marks", static_cast<long long>(P_),
           static_cast<long long>(R_), static_cast<long long>(V_));

    for (int64_t first = 0; first < classes; ++first)
      for (int64_t last = first; last < classes; ++last)
        check_selection(first, last, tokens, counts.data() + begin + first * words, threats, reference);
  }

 private:
  void expect_threats(const DeviceBuffer<int64_t>& threats, const char* how) const {
    expect(threats.host() == threats_, "%d bytes, P %lld, D %lld, R %lld, stride %lld, offset %lld, %s",
           static_cast<int>(sizeof(T)), static_cast<long long>(P_), static_cast<long long>(D_),
           static_cast<long long>(R_), static_cast<long long>(stride_), static_cast<long long>(offset_), how);
  }

  void check_selection(int64_t first, int64_t last, const std::vector<std::set<int64_t>>& tokens,
                       const int32_t* bits, const DeviceBuffer<int64_t>& threats,
                       const DeviceBuffer<int64_t>& reference) const {
    std::set<int64_t> all;
    int64_t most_tokens = 3;  // some more than there are
    for (int64_t i = first; i <= last; ++i) {
      all.insert(tokens[static_cast<size_t>(i)].begin(), tokens[static_cast<size_t>(i)].end());
      most_tokens += static_cast<int64_t>(tokens[static_cast<size_t>(i)].size());
    }
    std::vector<int64_t> ids(all.begin(), all.end()), positions, among;
    for (int64_t p = 0; p < P_; ++p) {
      const int64_t count = threats_[static_cast<size_t>(p)];
      if (count == 0 || count == R_ || class_of(count) < first || class_of(count) > last) continue;
      positions.push_back(p);
      among.push_back(std::lower_bound(ids.begin(), ids.end(), reference_[static_cast<size_t>(p)]) -
                      ids.begin());
    }
    ids.resize(static_cast<size_t>(most_tokens), ids.empty() ? 0 : ids.back());
    int64_t least = 1, most = 16;
    for (int64_t i = 0; i < first; ++i) least = i == 0 ? 17 : (least - 1) * 16 + 1;
    for (int64_t i = 0; i < last; ++i) most *= 16;

    const auto rows = static_cast<int64_t>(positions.size());
    DeviceBuffer<int64_t> found_positions(rows), found_among(rows), found_ids(most_tokens);
    DeviceBuffer<int32_t> before((V_ + kWordBits - 1) / kWordBits);
    const Stream stream;
    select_threatened_cuda({threats.data(), reference.data(), P_, V_, least, std::min(most, R_ - 1),
                            reinterpret_cast<const uint32_t*>(bits), last - first + 1, before.data(), rows,
                            most_tokens, found_positions.data(), found_among.data(), found_ids.data()},
                           stream);
    expect(found_positions.host() == positions && found_among.host() == among && found_ids.host() == ids,
           "P %lld, R %lld, V %lld: classes %lld to %lld", static_cast<long long>(P_),
           static_cast<long long>(R_), static_cast<long long>(V_), static_cast<long long>(first),
           static_cast<long long>(last));
  }
};

template <typename T>
void check_all() {
  Random random(1);
  for (const int64_t positions : {0, 1, 33, 1025, 2500})
    for (const int64_t depth : {0, 1, 8, 33, 64, 520})
      for (const int64_t radii : {1, 5, 129, 300}) {
        if (positions > 1000 && radii == 300 && depth != 8) continue;  // to be quick
        const int64_t vocabulary = radii == 300 ? 40000 : radii + 3;
        Case<T>(positions, depth, radii, vocabulary, depth, 0, random).check();
        if (positions <= 33) {
          Case<T>(positions, depth, radii, vocabulary, depth + 16, 0, random).check();
          Case<T>(positions, depth, radii, vocabulary, depth + 3, 1, random).check();
        }
      }
}

}  // namespace

int main() {
  check_all<uint16_t>();
  check_all<float>();
  return finish();
}
