// A small libFuzzer for compilers without one: finds inputs that reach new edges of the target, keeps one that kills it.
//
//   TARGET [-runs=N] [-max_total_time=SECONDS] [-max_len=BYTES] [-seed=N] [-artifact_prefix=PATH] CORPUS...
//
// as libFuzzer has them: all files of the folders CORPUS are run first; what then finds a new edge goes to the first
// folder. The target is compiled with -fsanitize-coverage=trace-pc. It runs in a process of its own: whatever ends that
// (a sanitizer, a signal, an input that takes longer than a minute), the last input is written to PATH and the exit
// status is 1.
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kEdges = 1 << 16;
constexpr unsigned kSecondsPerInput = 60;
uint8_t edge_counts[kEdges];  // how often this input took each edge, by a hash of its two ends
uintptr_t last_block = 0;

struct Options {
  uint64_t runs = UINT64_MAX;
  double seconds = 0;  // no limit
  size_t max_length = 4096;
  uint64_t seed = 1;
  std::string artifact_prefix = "crash-";
  std::vector<std::string> folders;
};

// The input that runs now, where the parent process sees it.
struct Current {
  uint64_t size;
  uint8_t bytes[1 << 20];
};

Options read_options(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == argument.npos ? "" : argument.substr(equals + 1);
    if (argument[0] != '-') {
      options.folders.push_back(argument);
    } else if (name == "-runs") {
      options.runs = std::stoull(value);
    } else if (name == "-max_total_time") {
      options.seconds = std::stod(value);
    } else if (name == "-max_len") {
      options.max_length = std::min(std::stoul(value), sizeof Current::bytes);
    } else if (name == "-seed") {
      options.seed = std::stoull(value);
    } else if (name == "-artifact_prefix") {
      options.artifact_prefix = value;
    } else {
      std::fprintf(stderr, "unknown option %s\n", argument.c_str());
      std::exit(2);
    }
  }
  return options;
}

std::vector<Bytes> read_corpus(const Options& options) {
  std::vector<std::string> paths;
  for (const std::string& folder : options.folders) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Bytes> corpus;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

void write_file(const std::string& path, const uint8_t* bytes, size_t size) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes), static_cast<std::streamsize>(size));
}

std::string name_of(const uint8_t* bytes, size_t size) {
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
  for (size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001B3;
  char name[17];
  std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(hash));
  return name;
}

class Fuzzer {
 public:
  Fuzzer(const Options& options, Current& current) : options_(options), current_(current), random_(options.seed) {}

  int run() {
    for (Bytes& input : read_corpus(options_)) {
      try_input(input);
      corpus_.push_back(std::move(input));
    }
    const uint64_t given = corpus_.size();
    while (runs_ < options_.runs && !is_over()) {
      Bytes input = corpus_.empty() ? Bytes() : corpus_[pick(corpus_.size())];
      for (size_t steps = 1 + pick(1 + pick(8)); steps > 0; --steps) mutate(input);
      input.resize(std::min(input.size(), options_.max_length));
      if (!try_input(input)) continue;
      if (!options_.folders.empty()) {
        write_file(options_.folders[0] + "/" + name_of(input.data(), input.size()), input.data(), input.size());
      }
      corpus_.push_back(std::move(input));
    }
    std::printf("Done %llu runs in %.0f second(s), %zu inputs, %llu of them new, %zu edges\n",
                static_cast<unsigned long long>(runs_), elapsed(), corpus_.size(),
                static_cast<unsigned long long>(corpus_.size() - given), edges_);
    return 0;
  }

 private:
  // Runs the target; whether it took an edge that no input before took, or took it much more often.
  bool try_input(const Bytes& input) {
    // A block of its own, of just that size, so that AddressSanitizer sees what is read behind it.
    const Bytes copy(input);
    current_.size = std::min(copy.size(), sizeof current_.bytes);
    std::copy_n(copy.begin(), current_.size, current_.bytes);
    if (runs_ % 64 == 0) alarm(kSecondsPerInput);
    std::memset(edge_counts, 0, sizeof edge_counts);
    last_block = 0;
    LLVMFuzzerTestOneInput(copy.data(), copy.size());
    ++runs_;
    bool is_new = false;
    for (size_t i = 0; i < kEdges; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, edge_counts + i, 8);
      if (eight == 0) continue;
      for (size_t edge = i; edge < i + 8; ++edge) {
        if (edge_counts[edge] == 0) continue;
        const uint8_t often = static_cast<uint8_t>(1u << (31 - __builtin_clz(edge_counts[edge])));
        edges_ += seen_[edge] == 0;
        is_new |= (often & ~seen_[edge]) != 0;
        seen_[edge] |= often;
      }
    }
    return is_new;
  }

  void mutate(Bytes& input) {
    const size_t size = input.size();
    const size_t at = pick(size + 1), length = std::min(1 + pick(1 + pick(size + 1)), size - at);
    const auto begin = input.begin() + static_cast<std::ptrdiff_t>(at);
    const auto end = begin + static_cast<std::ptrdiff_t>(length);
    switch (pick(8)) {
      case 0:
        if (at < size) *begin ^= static_cast<uint8_t>(1u << pick(8));
        break;
      case 1:
        if (at < size) *begin = static_cast<uint8_t>(pick(256));
        break;
      case 2:
        if (at < size) *begin = static_cast<uint8_t>(*begin + pick(16) - 8);
        break;
      case 3:
        input.erase(begin, end);
        break;
      case 4: {
        Bytes bytes(1 + pick(8));
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(pick(256));
        input.insert(begin, bytes.begin(), bytes.end());
        break;
      }
      case 5: {  // a part, several times: runs
        const Bytes part(begin, end);
        for (size_t times = pick(1 + pick(40)); times > 0 && input.size() < options_.max_length; --times) {
          input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), part.begin(), part.end());
        }
        break;
      }
      default: {  // a part of another input, put in or written over
        if (corpus_.empty()) break;
        const Bytes& other = corpus_[pick(corpus_.size())];
        const size_t from = pick(other.size() + 1), count = pick(1 + pick(other.size() - from + 1));
        const auto first = other.begin() + static_cast<std::ptrdiff_t>(from);
        if (pick(2) == 0) input.erase(begin, begin + static_cast<std::ptrdiff_t>(std::min(count, size - at)));
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), first, first + static_cast<std::ptrdiff_t>(count));
      }
    }
  }

  size_t pick(size_t count) { return static_cast<size_t>(random_() % count); }
  double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  }
  bool is_over() const { return options_.seconds > 0 && runs_ % 16 == 0 && elapsed() >= options_.seconds; }

  const Options& options_;
  Current& current_;
  std::mt19937_64 random_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  std::vector<Bytes> corpus_;
  uint64_t runs_ = 0;
  uint8_t seen_[kEdges] = {};  // for each edge the counts, rounded down to powers of two, as bits
  size_t edges_ = 0;
};

}  // namespace

// Called by the compiled target at the start of every basic block.
extern "C" void __sanitizer_cov_trace_pc() {
  const auto block = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const uintptr_t hash = (block ^ last_block * 31) * 0x9E3779B97F4A7C15;
  uint8_t& count = edge_counts[hash >> 48];
  count = static_cast<uint8_t>(count + (count < 255));
  last_block = block;
}

int main(int count, char** arguments) {
  const Options options = read_options(count, arguments);
  void* shared = mmap(nullptr, sizeof(Current), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) {
    std::perror("mmap");
    return 2;
  }
  auto& current = *static_cast<Current*>(shared);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) {
    std::perror("fork");
    return 2;
  }
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    return std::make_unique<Fuzzer>(options, current)->run();
  }
  signal(SIGINT, SIG_IGN);  // Ctrl-C ends the child, and this with it
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGINT) return 130;
  const std::string path = options.artifact_prefix + name_of(current.bytes, current.size);
  write_file(path, current.bytes, current.size);
  std::fprintf(stderr, "the target ended with %s %d; its input of %llu bytes is in %s\n",
               WIFSIGNALED(status) ? "signal" : "status", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
               static_cast<unsigned long long>(current.size), path.c_str());
  return 1;
}
