#include "guarded.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>

namespace selftest {
namespace {

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

void check_call(bool good, const char* what) {
  if (!good) throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
}

template <typename Access>
bool is_fatal(Access access) {
  const pid_t child = fork();
  check_call(child >= 0, "fork");
  if (child == 0) {
    // A sanitizer would report at length what is wanted here.
    const int nowhere = open("/dev/null", O_WRONLY);
    if (nowhere >= 0) dup2(nowhere, STDERR_FILENO);
    access();
    _exit(0);
  }
  int status = 0;
  check_call(waitpid(child, &status, 0) == child, "waitpid");
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

}  // namespace

GuardedBytes::GuardedBytes(size_t size, Edge edge) {
  const size_t page = page_size();
  const size_t room = (size + page - 1) / page * page;
  mapped_size_ = room + 2 * page;
  void* mapped =
      mmap(nullptr, mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check_call(mapped != MAP_FAILED, "mmap");
  mapped_ = static_cast<char*>(mapped);
  check_call(mprotect(mapped_, page, PROT_NONE) == 0, "mprotect");
  check_call(mprotect(mapped_ + page + room, page, PROT_NONE) == 0, "mprotect");
  char* first = mapped_ + page + (edge == Edge::kEnd ? room - size : 0);
  data_ = size > 0 ? first : nullptr;
}

GuardedBytes::GuardedBytes(GuardedBytes&& other) noexcept
    : mapped_(other.mapped_), mapped_size_(other.mapped_size_), data_(other.data_) {
  other.mapped_ = nullptr;
}

GuardedBytes::~GuardedBytes() {
  if (mapped_ != nullptr) munmap(mapped_, mapped_size_);
}

void GuardedBytes::freeze() {
  const size_t page = page_size();
  if (mapped_size_ == 2 * page) return;
  check_call(mprotect(mapped_ + page, mapped_size_ - 2 * page, PROT_READ) == 0, "mprotect");
}

std::string unguarded() {
  const std::vector<float> page(page_size() / sizeof(float), 1.0f);
  const Guarded<float> begin(page, Edge::kBegin), end(page, Edge::kEnd);
  const Guarded<float> frozen = Guarded<float>::frozen(page, Edge::kEnd);
  volatile float* const before = begin.data() - 1;
  volatile float* const beyond = end.data() + page.size();
  volatile float* const inside = frozen.data();
  const auto read = [](volatile float* x) { return [x] { static_cast<void>(*x); }; };
  const auto write = [](volatile float* x) { return [x] { *x = 1.0f; }; };
  if (is_fatal(read(inside))) return "reading where it is allowed was fatal";
  if (!is_fatal(read(before))) return "reading before the begin went unnoticed";
  if (!is_fatal(write(before))) return "writing before the begin went unnoticed";
  if (!is_fatal(read(beyond))) return "reading beyond the end went unnoticed";
  if (!is_fatal(write(beyond))) return "writing beyond the end went unnoticed";
  if (!is_fatal(write(inside))) return "writing to a frozen input went unnoticed";
  return "";
}

}  // namespace selftest
