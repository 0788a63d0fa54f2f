// Runs the kernels that cut sequences and put them together again (csrc/cuda/wkv_segments.h) on the emulated device, in
// the order of an op, for test_wkv_segments.py:
//   segments KIND PROBLEM RESULT
// KIND: list      the work list alone
//       op        a summary op: list, summaries, scan to each sequence's result
//       cuts      what an op's own kernel needs: list, summaries, scan to the states at the cuts
//       scan      list, scan in place of given segment states
//       reduce    list, second-stage sums
// PROBLEM: one line of numbers (see read_problem), a line per array, an empty line, then the bytes of all arrays. An
// array's line: NAME DTYPE BYTES BATCH_STRIDE TOKEN_STRIDE HEAD_STRIDE.
// RESULT: the bytes of the arrays whose names start with "out_". What each launch read and wrote is printed.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "block.h"
#include "cuda/wkv_instances.h"
#include "cuda/wkv_segments.h"
#include "device.h"
#include "report.h"

namespace {

using emulator::fail;
using namespace rwkv;

struct Array {
  std::string name;
  int64_t bytes = 0;
  View view;
};

struct Problem {
  WkvShape shape;
  WorkSchedule work;
  int adjoint = 0;
  std::vector<Array> arrays;

  View view(const std::string& name) const {
    for (const Array& array : arrays)
      if (array.name == name) return array.view;
    return {};
  }
  template <class T = void>
  T* data(const std::string& name) const {
    return static_cast<T*>(view(name).data);
  }
};

Problem read_problem(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Problem problem;
  WkvShape& shape = problem.shape;
  std::string line;
  std::getline(file, line);
  int order = 0;
  std::istringstream numbers(line);
  numbers >> shape.batch >> shape.tokens >> shape.heads >> shape.head_size >> shape.sequences >> shape.constant_decay >>
      shape.fp64 >> problem.adjoint >> problem.work.segment_tokens >> problem.work.items >> order;
  emulator::set_thread_order(order ? emulator::ThreadOrder::kDescending : emulator::ThreadOrder::kAscending, 0);
  while (std::getline(file, line) && !line.empty()) {
    Array array;
    int dtype = 0;
    std::istringstream words(line);
    words >> array.name >> dtype >> array.bytes >> array.view.batch_stride >> array.view.token_stride >>
        array.view.head_stride;
    array.view.dtype = Dtype(dtype % 4);
    if (posix_memalign(&array.view.data, 256, array.bytes)) fail("no memory for ", array.name);
    if (array.name == "cu_seqlens") shape.cu_seqlens = array.view.data, shape.cu_seqlens_int64 = dtype / 4;
    problem.arrays.push_back(array);
  }
  for (const Array& array : problem.arrays)
    if (!file.read(static_cast<char*>(array.view.data), array.bytes)) fail(path, " ends too early");
  return problem;
}

int run_list(Problem& problem) {
  if (!problem.shape.cu_seqlens) return 0;
  auto* list = problem.data<WorkItem>("out_list");
  problem.work.list = list;
  return run_wkv_work_list({problem.shape, problem.work.segment_tokens, problem.work.items, list}, nullptr);
}

int run_summary(const Problem& problem, bool is_op) {
  SummaryTask task;
  task.op.shape = problem.shape, task.work = problem.work;
  task.op.k = problem.view("k"), task.op.v = problem.view("v"), task.op.w = problem.view("w");
  task.op.adjoint = problem.adjoint;
  if (is_op) task.op.state = problem.data("out_state"), task.op.decay = problem.data("out_decay");
  task.segment_states = problem.data("out_segment_states");
  task.segment_decays = problem.data("segment_decays");
  return with_chunk_instance(problem.shape, task.op.k.dtype, task.op.w.dtype,
                             [&](auto instance) { return instance.run(task, nullptr); });
}

int run_scan(const Problem& problem, bool is_op) {
  ScanTask task;
  task.shape = problem.shape, task.work = problem.work;
  task.adjoint = problem.adjoint;
  task.segment_states = problem.data("out_segment_states"), task.segment_decays = problem.data("segment_decays");
  task.initial = problem.data("initial");
  if (is_op) task.final_state = problem.data("out_state"), task.final_decay = problem.data("out_decay");
  return problem.shape.fp64 ? run_wkv_scan<double>(task, nullptr) : run_wkv_scan<float>(task, nullptr);
}

int run_reduce(const Problem& problem) {
  const ReduceTask task = {problem.shape,           problem.work,           problem.data("du_partial"),
                           problem.data("dw_partial"), problem.view("out_du"), problem.view("out_dw")};
  return problem.shape.fp64 ? run_wkv_reduce<double>(task, nullptr) : run_wkv_reduce<float>(task, nullptr);
}

int run(const std::string& kind, Problem& problem) {
  if (const int error = run_list(problem)) return error;
  if (kind == "list") return 0;
  if (kind == "reduce") return run_reduce(problem);
  if (kind == "scan") return run_scan(problem, false);
  const bool is_op = kind == "op";
  if (const int error = run_summary(problem, is_op)) return error;
  return problem.data("segment_decays") ? run_scan(problem, is_op) : 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) fail("usage: segments KIND PROBLEM RESULT");
  Problem problem = read_problem(arguments[2]);
  if (const int error = run(arguments[1], problem)) fail("error ", error);
  std::ofstream file(arguments[3], std::ios::binary);
  for (const Array& array : problem.arrays)
    if (array.name.starts_with("out_")) file.write(static_cast<const char*>(array.view.data), array.bytes);
  for (const emulator::Launch& launch : emulator::launches())
    std::cout << launch.bytes_read << ' ' << launch.bytes_written << ' ' << launch.kernel << '\n';
}
