// A fiber: a stack of its own that one real thread switches to and from.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace idm {

// Either a fiber or, default-made, the place that switched to the first one.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;  // pages that are not touched cost nothing

  Fiber() = default;
  // Arranges that the next switch here calls entry(), on the stack that this fiber keeps. entry must never return.
  void start(void (*entry)());
  // Leaves `from`, which goes on when something switches back to it.
  static void change(Fiber& from, Fiber& to);
  // To be called first thing in entry(): tells the address sanitizer that the switch is done.
  static void arrived();

 private:
  struct Stack {
    Stack();
    ~Stack();
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;
    char* memory;
  };
  std::unique_ptr<Stack> stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
  void* fake_stack_ = nullptr;  // the address sanitizer's own
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace idm
