// Program: native calls recorded once and run one after the other without Python in between.
//
// `Ops::def(name, f)` binds f twice: as the function `_C.name(...)`, and as `Program.name(...)`, which takes the same
// arguments and records the call. Arguments are kept as they were parsed, by value; a tensor is an address, so who
// records keeps the tensors (packed weights and statistics too) alive and in place for as long as the program may run.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace idm {

class Program {
 public:
  // By convention a last parameter of type int is the number of threads: `run` may say another than was recorded.
  template <class... Args>
  void add(const char* op, void (*f)(Args...), std::decay_t<Args>... args) {
    if (running_ != 0) throw std::invalid_argument("program: calls must be recorded before it runs, got a call while it runs");
    calls_.push_back({op, [f, kept = std::tuple<std::decay_t<Args>...>(std::move(args)...)](int threads) {
                        invoke(f, kept, threads, std::index_sequence_for<Args...>{});
                      }});
  }

  // Every call in order, `repeats` times. threads: 0 for what each call was recorded with. An exception of a call ends
  // the run and is raised again as ValueError (a broken contract; that call wrote nothing) or RuntimeError, with the
  // call's index and name. Runs without the GIL; Ctrl-C is asked for between repeats.
  void run(int64_t repeats, int threads) {
    if (repeats < 0) throw std::invalid_argument("program: repeats must be >= 0, got " + std::to_string(repeats));
    const Running guard(running_);
    auto asked = std::chrono::steady_clock::now();
    for (int64_t turn = 0; turn < repeats; ++turn) {
      if (turn > 0) check_signals(asked);
      for (size_t i = 0; i < calls_.size(); ++i) run_one(i, threads);
    }
  }

  size_t size() const { return calls_.size(); }
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const Call& call : calls_) found.push_back(call.op);
    return found;
  }

 private:
  struct Call {
    std::string op;
    std::function<void(int threads)> run;
  };

  struct Running {
    explicit Running(std::atomic<int>& count) : count(count) { ++count; }
    ~Running() { --count; }
    std::atomic<int>& count;
  };

  template <class F, class Kept, size_t... I>
  static void invoke(F f, const Kept& kept, int threads, std::index_sequence<I...>) {
    f(argument<I>(kept, threads)...);
  }

  template <size_t I, class Kept>
  static decltype(auto) argument(const Kept& kept, int threads) {
    constexpr bool kLast = I + 1 == std::tuple_size_v<Kept>;
    if constexpr (kLast && std::is_same_v<std::tuple_element_t<I, Kept>, int>)
      return static_cast<int>(threads > 0 ? threads : std::get<I>(kept));  // a value: without the cast, a reference to ours
    else
      return std::get<I>(kept);
  }

  void run_one(size_t i, int threads) const {
    try {
      calls_[i].run(threads);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(place(i) + error.what());
    } catch (const std::exception& error) {
      throw std::runtime_error(place(i) + error.what());
    }
  }

  std::string place(size_t i) const { return "program: call " + std::to_string(i) + " (" + calls_[i].op + "): "; }

  // At most ten times a second: the GIL may be far away.
  static void check_signals(std::chrono::steady_clock::time_point& asked) {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked < std::chrono::milliseconds(100)) return;
    asked = now;
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }

  std::vector<Call> calls_;
  std::atomic<int> running_{0};
};

// One line binds an operation both ways.
class Ops {
 public:
  explicit Ops(pybind11::module_& m) : module_(m), program_(m, "Program", "Native calls, recorded and run without Python.") {
    namespace py = pybind11;
    program_.def(py::init<>())
        .def("run", &Program::run, py::call_guard<py::gil_scoped_release>(), py::arg("repeats") = 1, py::arg("threads") = 0)
        .def("__len__", &Program::size)
        .def_property_readonly("names", &Program::names);
  }

  template <class... Args>
  void def(const char* name, void (*f)(Args...)) {
    module_.def(name, f, pybind11::call_guard<pybind11::gil_scoped_release>());
    program_.def(name, [name, f](Program& self, std::decay_t<Args>... args) { self.add(name, f, std::move(args)...); });
  }

 private:
  pybind11::module_& module_;
  pybind11::class_<Program> program_;
};

}  // namespace idm
