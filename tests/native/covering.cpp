#include "covering.h"

#include <stdexcept>

#include "random.h"

namespace selftest {
namespace {

constexpr size_t kOpen = static_cast<size_t>(-1);

struct Pair {
  size_t a, i, b, j;
};

// Which pairs a set holds, addressed by the positions of their values among all values.
class PairSet {
 public:
  explicit PairSet(const Axes& axes) {
    for (const size_t size : axes) {
      first_.push_back(total_);
      total_ += size;
    }
    member_.assign(total_ * total_, false);
  }

  bool has(const Pair& p) const { return member_[at(p)]; }
  size_t size() const { return size_; }
  void set(const Pair& p, bool member) {
    if (member_[at(p)] == member) return;
    member_[at(p)] = member;
    size_ += member ? size_t{1} : static_cast<size_t>(-1);
  }

 private:
  size_t at(const Pair& p) const { return (first_[p.a] + p.i) * total_ + first_[p.b] + p.j; }

  std::vector<size_t> first_;
  std::vector<bool> member_;
  size_t total_ = 0, size_ = 0;
};

Pair ordered(size_t a, size_t i, size_t b, size_t j) {
  return a < b ? Pair{a, i, b, j} : Pair{b, j, a, i};
}

template <typename Visit>
void for_each_pair(const Choice& choice, Visit visit) {
  for (size_t a = 0; a < choice.size(); ++a) {
    for (size_t b = a + 1; b < choice.size(); ++b) visit(Pair{a, choice[a], b, choice[b]});
  }
}

// The value of `axis` that covers most of what is missing beside what is chosen.
size_t best_value(const Axes& axes, const Choice& chosen, size_t axis, const PairSet& missing,
                  const Allowed& allowed, Random& random) {
  std::vector<size_t> best;
  size_t most = 0;
  for (size_t value = 0; value < axes[axis]; ++value) {
    size_t gain = 0;
    bool fits = true;
    for (size_t other = 0; other < axes.size() && fits; ++other) {
      if (chosen[other] == kOpen) continue;
      const Pair p = ordered(other, chosen[other], axis, value);
      fits = allowed(p.a, p.i, p.b, p.j);
      gain += missing.has(p) ? 1 : 0;
    }
    if (!fits || (gain < most && !best.empty())) continue;
    if (gain > most) best.clear();
    most = gain;
    best.push_back(value);
  }
  if (best.empty()) throw std::logic_error("no value is allowed beside those chosen");
  return best[random.below(best.size())];
}

}  // namespace

Covering pairwise(const Axes& axes, const Allowed& allowed, uint32_t seed) {
  Random random(seed);
  PairSet missing(axes);
  std::vector<Pair> order;
  for (size_t a = 0; a < axes.size(); ++a) {
    for (size_t b = a + 1; b < axes.size(); ++b) {
      for (size_t i = 0; i < axes[a]; ++i) {
        for (size_t j = 0; j < axes[b]; ++j) {
          if (!allowed(a, i, b, j)) continue;
          order.push_back({a, i, b, j});
          missing.set(order.back(), true);
        }
      }
    }
  }
  random.shuffle(order);
  Covering covering = {{}, order.size(), 0};
  for (const Pair& pair : order) {
    if (!missing.has(pair)) continue;
    Choice chosen(axes.size(), kOpen);
    chosen[pair.a] = pair.i;
    chosen[pair.b] = pair.j;
    std::vector<size_t> rest;
    for (size_t axis = 0; axis < axes.size(); ++axis) {
      if (chosen[axis] == kOpen) rest.push_back(axis);
    }
    random.shuffle(rest);
    for (const size_t axis : rest) {
      chosen[axis] = best_value(axes, chosen, axis, missing, allowed, random);
    }
    for_each_pair(chosen, [&](const Pair& p) { missing.set(p, false); });
    covering.choices.push_back(std::move(chosen));
  }
  PairSet covered(axes);
  for (const Choice& choice : covering.choices) {
    for_each_pair(choice, [&](const Pair& p) { covered.set(p, true); });
  }
  covering.pairs_covered = covered.size();
  return covering;
}

}  // namespace selftest
