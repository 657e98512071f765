#include "common/cuda_on_cpu/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// swapcontext makes two system calls a switch; this is what a function call must keep, and no more.
extern "C" void idm_change_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl idm_change_stack
.hidden idm_change_stack
.type idm_change_stack, @function
idm_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size idm_change_stack, .-idm_change_stack
)");
#endif

namespace idm {
namespace {
Fiber* left = nullptr;  // whom the switch under way comes from, and whom it goes to
Fiber* entered = nullptr;
}  // namespace

Fiber::Stack::Stack() {
  void* pages = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, 4096, PROT_NONE);  // an overflow is a fault, not a neighbour's stack
  memory = static_cast<char*>(pages);
}

Fiber::Stack::~Stack() { munmap(memory, kStackBytes); }

void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = std::make_unique<Stack>();
  bottom_ = stack_->memory;
  size_ = kStackBytes;
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_->memory + 4096, kStackBytes - 4096);  // marks of the last block's frames
#endif
#if defined(__x86_64__)
  // As if entry had been called: the six registers, its address to return to, and a stack that is 8 off 16 there.
  auto top = reinterpret_cast<uintptr_t*>(stack_->memory + kStackBytes - 64);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_->memory;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(entered->fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::change(Fiber& from, Fiber& to) {
  left = &from;
  entered = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__)
  idm_change_stack(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
  arrived();
}

}  // namespace idm
