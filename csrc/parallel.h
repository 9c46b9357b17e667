// parallel_for: tasks handed to plain threads that live for one call (so a forked process is never left
// with a pool whose threads are gone).
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace llava_fast {

// Runs task(i, state) for i in [0, count) on up to `threads` threads, this one included, each with its own State;
// rethrows the first error.
template <class State, class Task>
void parallel_for(int count, int threads, const Task& task) {
  std::atomic<int> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    try {
      State state;
      for (int i; (i = next.fetch_add(1)) < count;) task(i, state);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads && i < count; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are available: those that started share the work.
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace llava_fast
