// A program that LeakSanitizer must complain of. A machine may forbid it to stop a process and look for what
// is no longer referred to; then no leak would ever be found.
#include <cstdlib>

int main() {
  void* volatile lost = std::malloc(100);
  lost = nullptr;
  return lost == nullptr ? 0 : 1;
}
