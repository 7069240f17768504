// The convolution as its callers see it.

#include "conv2d.h"

#include <cmath>

#include "conv2d_plan.h"
#include "fused_pack.h"
#include "staging.h"
#include "widen.h"

namespace disco {

int64_t Node::num_in_channels() const {
  int64_t count = 0;
  for (const Segment& segment : segments) count += static_cast<int64_t>(segment.channels.size());
  return count;
}

namespace {

// Each at most 255 * 127, and no sum of them is above 2^31 - 1.
constexpr int64_t kMostQuadInputs = 65536;

// Pixels that do not look at their neighbours are one row of one image wherever they lie at equal
// distances: a tile of a row is planned in a fraction of the time, and tokens would be rows of one
// pixel.
class OneRow {
 public:
  OneRow(const Conv2dGeometry& geometry, const Conv2dCall& call)
      : batch_(call.batch), h_(call.in_h), w_(call.in_w) {
    equal_ = geometry.taps() == 1 && geometry.stride_h == 1 && geometry.stride_w == 1 &&
             geometry.padding_h == 0 && geometry.padding_w == 0 && batch_ * h_ * w_ > 0;
  }

  static void apply(const Conv2dGeometry& geometry, Conv2dCall& call) {
    Conv2dCall row = call;
    OneRow pixels(geometry, call);
    for (SourceView& source : row.sources) {
      pixels.take(source.stride_n, source.stride_h, source.stride_w);
    }
    pixels.take(row.out.stride_n, row.out.stride_h, row.out.stride_w);
    if (row.residual != nullptr) {
      pixels.take(row.residual_stride_n, row.residual_stride_h, row.residual_stride_w);
    }
    if (!pixels.equal_) return;
    row.in_w = call.batch * call.in_h * call.in_w;
    row.batch = row.in_h = 1;
    call = std::move(row);
  }

 private:
  // A dimension of one has no stride that counts.
  void take(int64_t stride_n, int64_t stride_h, int64_t& stride_w) {
    if (w_ == 1) stride_w = h_ == 1 ? stride_n : stride_h;
    equal_ &= h_ == 1 || stride_h == w_ * stride_w;
    equal_ &= batch_ == 1 || stride_n == h_ * w_ * stride_w;
  }

  int64_t batch_, h_, w_;
  bool equal_;
};

// What of a call writes messages, or nullptr.
std::unique_ptr<FusedMessages> messages_of(const FusedPack* pack, const ConvPlan& plan) {
  if (plan.call.messages.empty()) return nullptr;
  if (pack == nullptr) refuse("messages are given, and the convolution has no list of channels");
  return std::make_unique<FusedMessages>(*pack, plan);
}

// The call with nothing to widen in sources that its part of the sum does not read.
Conv2dCall without_unread(const std::vector<Node>& nodes, Conv2dCall call) {
  std::vector<bool> is_read(call.sources.size(), false);
  for (const Node& node : nodes) {
    for (size_t s = 0; s < node.segments.size(); ++s) {
      const size_t source = static_cast<size_t>(node.segments[s].source);
      if (call.reads(static_cast<int64_t>(s)) && source < is_read.size()) is_read[source] = true;
    }
  }
  for (size_t s = 0; s < is_read.size(); ++s) {
    if (!is_read[s]) call.sources[s].type = WireType::kFloat32;
  }
  return call;
}

void run_and_pack(ConvPlan& plan, const FusedPack* pack) {
  const std::unique_ptr<FusedMessages> messages = messages_of(pack, plan);
  plan.messages = messages.get();
  run_plan(plan);
  if (messages != nullptr) messages->finish(plan.call.num_threads);
}

}  // namespace

Conv2d::Conv2d(const Conv2dGeometry& geometry, std::vector<Node> nodes, Activation activation,
               const std::vector<std::vector<int32_t>>& messages)
    : geometry_(geometry), nodes_(std::move(nodes)), activation_(activation) {
  check_window(geometry);
  if (is_winograd(geometry.algorithm) &&
      (geometry.kernel_h != 3 || geometry.kernel_w != 3 || geometry.stride_h != 1 ||
       geometry.stride_w != 1 || geometry.dilation_h != 1 || geometry.dilation_w != 1)) {
    refuse("Winograd is for kernels of 3 x 3 with stride and dilation 1");
  }
  if (geometry.algorithm == Algorithm::kQuads) {
    const auto [scale, zero_point] = geometry.input;
    if (!(scale > 0.0f) || !std::isfinite(scale) || !std::isfinite(1.0f / scale)) {
      refuse("the scale of 8-bit inputs must be a positive number with an inverse, given " +
             std::to_string(scale));
    }
    if (zero_point < 0 || zero_point > 255) {
      refuse("the zero point of 8-bit inputs must be 0 to 255, given " +
             std::to_string(zero_point));
    }
    for (const Node& node : nodes_) {
      if (node.num_in_channels() * geometry.taps() > kMostQuadInputs) {
        refuse("8-bit products of more than " + std::to_string(kMostQuadInputs) +
               " inputs of an output do not fit into 32 bits");
      }
    }
  }
  check_activation(activation);
  if (!messages.empty())
    pack_ = std::make_shared<const FusedPack>(nodes_, geometry.dtype, messages);
}

bool Conv2d::in_wire_type(const Conv2dCall& call) const {
  for (const SourceView& source : call.sources) {
    if (source.type == WireType::kFloat32) continue;
    if (geometry_.dtype != kFloat32) {
      refuse("segments in a wire type are widened to float32, and the convolution is in bfloat16");
    }
    return true;
  }
  return false;
}

void Conv2d::run(const Conv2dCall& call) const {
  const Conv2dCall read = call.in_parts() ? without_unread(nodes_, call) : call;
  if (!in_wire_type(read)) {
    run_wide(read);
    return;
  }
  WidenedCall widened(read);
  widened.widen();
  run_wide(widened.call());
}

void Conv2d::run_wide(Conv2dCall call) const {
  OneRow::apply(geometry_, call);
  if (StagedCall::needed(geometry_, nodes_, call)) {
    StagedCall staged(geometry_, nodes_, call);
    ConvPlan plan(staged.geometry(), staged.nodes(), activation_, staged.call());
    plan.staged = &staged;
    staged.copy(!plan.gathers_by_item, !plan.by_panels);
    run_and_pack(plan, pack_.get());
  } else {
    ConvPlan plan(geometry_, nodes_, activation_, call);
    run_and_pack(plan, pack_.get());
  }
}

BoundConv2d::BoundConv2d(const Conv2d& conv2d, Conv2dCall call)
    : conv2d_(conv2d), given_(std::move(call)), call_(given_) {
  plan();
}

BoundConv2d::~BoundConv2d() = default;

void BoundConv2d::plan() {
  plan_.reset();
  const int32_t num_threads = call_.num_threads;
  call_ = given_.in_parts() ? without_unread(conv2d_.nodes_, given_) : given_;
  call_.num_threads = num_threads;
  if (conv2d_.in_wire_type(call_)) {
    widened_ = std::make_unique<WidenedCall>(call_);
    call_ = widened_->call();
  }
  OneRow::apply(conv2d_.geometry_, call_);
  if (StagedCall::needed(conv2d_.geometry_, conv2d_.nodes_, call_)) {
    staged_ = std::make_unique<StagedCall>(conv2d_.geometry_, conv2d_.nodes_, call_);
    plan_ = std::make_unique<ConvPlan>(staged_->geometry(), staged_->nodes(), conv2d_.activation_,
                                       staged_->call());
    plan_->staged = staged_.get();
  } else {
    plan_ =
        std::make_unique<ConvPlan>(conv2d_.geometry_, conv2d_.nodes_, conv2d_.activation_, call_);
  }
  messages_ = messages_of(conv2d_.pack_.get(), *plan_);
  plan_->messages = messages_.get();
}

void BoundConv2d::run(int32_t num_threads) {
  const bool moved = (staged_ != nullptr && staged_->memory_moved()) ||
                     (widened_ != nullptr && widened_->memory_moved());
  if (moved || num_threads != call_.num_threads) {
    call_.num_threads = num_threads;
    plan();
  }
  if (widened_ != nullptr) widened_->widen();
  if (staged_ != nullptr) staged_->copy(!plan_->gathers_by_item, !plan_->by_panels);
  run_plan(*plan_);
  if (messages_ != nullptr) messages_->finish(num_threads);
}

}  // namespace disco
