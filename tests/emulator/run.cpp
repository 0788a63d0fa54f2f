// Runs one op through the entry points of csrc/cuda/wkv_launch.h on the emulated device, or on a GPU:
//   run PROBLEM RESULT
// PROBLEM is a text header, one setting or tensor a line, then the bytes of all input tensors in the header's order:
//   op forward | backward | summary | adjoint_summary | step
//   shape BATCH TOKENS HEADS HEAD_SIZE SEQUENCES CHUNKS
//   constant_decay 0 | 1        fp64 0 | 1
//   kernel auto | chunk | recurrent        segment_tokens COUNT (0: as planned)
//   order ascending | descending | random SEED        multiprocessors COUNT        most_shared_bytes COUNT
//   tensor NAME DTYPE in | out | inout BYTES REMAINDER BATCH_STRIDE TOKEN_STRIDE HEAD_STRIDE
//   end
// An array lies at REMAINDER bytes after a multiple of 256, alone in an allocation that ends with its last byte; what
// is only written starts as NaN. RESULT gets the bytes of all out and inout tensors in order. Launches are printed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/wkv_launch.h"
#ifdef __CUDACC__  // the same program for a GPU
#include "device_kernels/on_device.h"
#else
#include "block.h"
#include "device.h"
#include "host_memory.h"
#include "report.h"
#endif

namespace {

using emulator::allocate;
using emulator::fail;
using namespace rwkv;

constexpr int kLaunchErrorExit = 71;

struct Array {
  std::string name;
  bool in = false, out = false;
  int64_t bytes = 0;
  bool int64 = false;
  View view;
};

Dtype dtype_named(const std::string& name) {
  static const std::map<std::string, Dtype> dtypes = {{"float32", Dtype::kFloat32},   {"float64", Dtype::kFloat64},
                                                      {"bfloat16", Dtype::kBFloat16}, {"float16", Dtype::kFloat16},
                                                      {"int64", Dtype::kFloat64},     {"int32", Dtype::kFloat32}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) fail("unknown dtype ", name);
  return found->second;
}

struct Problem {
  std::string op;
  WkvShape shape;
  WkvForced forced;
  std::vector<Array> arrays;

  const Array* find(const std::string& name) const {
    for (const Array& array : arrays)
      if (array.name == name) return &array;
    return nullptr;
  }
  View view(const std::string& name) const {
    const Array* array = find(name);
    return array ? array->view : View{};
  }
  template <class T = void>
  T* data(const std::string& name) const {
    return static_cast<T*>(view(name).data);
  }
};

void read_setting(Problem& problem, const std::string& line) {
  std::istringstream words(line);
  std::string name;
  words >> name;
  WkvShape& shape = problem.shape;
  if (name == "op") {
    words >> problem.op;
  } else if (name == "shape") {
    words >> shape.batch >> shape.tokens >> shape.heads >> shape.head_size >> shape.sequences >> shape.chunks;
  } else if (name == "constant_decay") {
    words >> shape.constant_decay;
  } else if (name == "fp64") {
    words >> shape.fp64;
  } else if (name == "kernel") {
    std::string kernel;
    words >> kernel;
    if (kernel == "chunk") problem.forced.kernel = WkvKernel::kChunk;
    if (kernel == "recurrent") problem.forced.kernel = WkvKernel::kRecurrent;
  } else if (name == "segment_tokens") {
    words >> problem.forced.segment_tokens;
  } else if (name == "multiprocessors") {
    words >> emulator::device().multiprocessors;
  } else if (name == "most_shared_bytes") {
    words >> emulator::device().most_shared_bytes;
  } else if (name == "order") {
    std::string order;
    uint64_t seed = 0;
    words >> order;
    if (order == "random") words >> seed;
    emulator::set_thread_order(order == "descending" ? emulator::ThreadOrder::kDescending
                               : order == "random"   ? emulator::ThreadOrder::kRandom
                                                     : emulator::ThreadOrder::kAscending,
                               seed);
  } else if (name == "tensor") {
    Array array;
    std::string dtype, use;
    int64_t remainder = 0;
    words >> array.name >> dtype >> use >> array.bytes >> remainder >> array.view.batch_stride >>
        array.view.token_stride >> array.view.head_stride;
    array.in = use != "out", array.out = use != "in";
    array.int64 = dtype == "int64";
    array.view.dtype = dtype_named(dtype);
    array.view.data = allocate(array.bytes, remainder);
    problem.arrays.push_back(array);
  } else {
    fail("unknown setting: ", line);
  }
  if (!words) fail("incomplete setting: ", line);
}

Problem read_problem(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read ", path);
  Problem problem;
  std::string line;
  while (std::getline(file, line) && line != "end") read_setting(problem, line);
  for (const Array& array : problem.arrays)
    if (array.in) {
      std::vector<char> bytes(array.bytes);
      if (!file.read(bytes.data(), array.bytes)) fail(path, " ends too early");
      emulator::write_array(array.view.data, bytes.data(), array.bytes);
    }
  if (const Array* cu_seqlens = problem.find("cu_seqlens")) {
    problem.shape.cu_seqlens = cu_seqlens->view.data;
    problem.shape.cu_seqlens_int64 = cu_seqlens->int64;
  }
  return problem;
}

WkvForwardParams forward_params(const Problem& problem) {
  WkvForwardParams p;
  p.shape = problem.shape;
  p.r = problem.view("r"), p.k = problem.view("k"), p.v = problem.view("v");
  p.w = problem.view("w"), p.u = problem.view("u"), p.y = problem.view("y");
  p.state = problem.data("state");
  p.state_out = problem.data("state_out");
  p.chunk_states = problem.data("chunk_states");
  p.scores = problem.data("scores");
  return p;
}

WkvBackwardParams backward_params(const Problem& problem) {
  WkvBackwardParams p;
  p.shape = problem.shape;
  p.r = problem.view("r"), p.k = problem.view("k"), p.v = problem.view("v");
  p.w = problem.view("w"), p.u = problem.view("u"), p.dy = problem.view("dy");
  p.dr = problem.view("dr"), p.dk = problem.view("dk"), p.dv = problem.view("dv"), p.du = problem.view("du");
  (p.shape.constant_decay ? p.dw_sum : p.dw) = problem.view("dw");
  p.dstate_out = problem.data("dstate_out");
  p.chunk_states = problem.data("chunk_states");
  p.scores = problem.data("scores");
  p.dstate = problem.data("dstate");
  return p;
}

WkvSummaryParams summary_params(const Problem& problem, bool adjoint) {
  WkvSummaryParams p;
  p.shape = problem.shape;
  p.adjoint = adjoint;
  p.k = problem.view(adjoint ? "r" : "k"), p.v = problem.view(adjoint ? "dy" : "v"), p.w = problem.view("w");
  p.decay = problem.data("decay");
  p.state = problem.data("state");
  return p;
}

WkvStepParams step_params(const Problem& problem) {
  WkvStepParams p;
  p.shape = problem.shape;
  p.r = problem.view("r"), p.k = problem.view("k"), p.v = problem.view("v");
  p.w = problem.view("w"), p.u = problem.view("u"), p.y = problem.view("y");
  p.state = problem.data("state");
  p.slots = problem.data<const int64_t>("slots");
  return p;
}

template <class Params>
int plan_and_launch(const Params& params, const WkvForced& forced,
                    int (*plan_op)(const Params&, const WkvForced&, WkvPlan&),
                    int (*launch_op)(const Params&, const WkvPlan&, void*, void*)) {
  WkvPlan plan;
  if (const int error = plan_op(params, forced, plan)) return error;
  const char* kernel = plan.kernel == WkvKernel::kChunk ? "chunk" : "recurrent";
  std::cout << "plan " << kernel << " " << plan.segment_tokens << " " << plan.items << " " << plan.workspace_bytes
            << std::endl;
  void* workspace = allocate(plan.workspace_bytes);
  const int error = launch_op(params, plan, workspace, nullptr);
  emulator::release(workspace);
  return error;
}

int run(const Problem& problem) {
  if (problem.op == "forward")
    return plan_and_launch(forward_params(problem), problem.forced, plan_wkv_forward, launch_wkv_forward);
  if (problem.op == "backward")
    return plan_and_launch(backward_params(problem), problem.forced, plan_wkv_backward, launch_wkv_backward);
  if (problem.op == "summary" || problem.op == "adjoint_summary")
    return plan_and_launch(summary_params(problem, problem.op == "adjoint_summary"), problem.forced, plan_wkv_summary,
                           launch_wkv_summary);
  if (problem.op == "step") return launch_wkv_step(step_params(problem), nullptr);
  fail("unknown op ", problem.op);
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::cerr << "usage: run PROBLEM RESULT\n";
    return 2;
  }
  const Problem problem = read_problem(words[1]);
  if (const int error = run(problem)) {
    std::cerr << "launch error " << error << "\n";
    return kLaunchErrorExit;
  }
  std::ofstream result(words[2], std::ios::binary);
  for (const Array& array : problem.arrays)
    if (array.out) {
      std::vector<char> bytes(array.bytes);
      emulator::read_array(bytes.data(), array.view.data, array.bytes);
      result.write(bytes.data(), array.bytes);
    }
  for (const emulator::Launch& launch : emulator::launches())
    std::cout << "launch " << launch.blocks << " " << launch.threads << " " << launch.shared_bytes << " "
              << launch.bytes_read << " " << launch.distinct_bytes_read << " " << launch.bytes_written << " "
              << launch.kernel << "\n";
  return result ? 0 : 2;
}
