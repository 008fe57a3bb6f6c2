// A parallel loop whose result cannot depend on the number of threads.
//
// The caller cuts the work into tasks by the problem's shape alone and gives each task its own output; this loop only
// decides who runs which task when. One pool per process, started on first use.
#pragma once

#include <cstdint>
#include <functional>

namespace lors {

// Runs body(task, worker) for task in [0, tasks); worker in [0, workers) identifies scratch memory. The first exception
// thrown by a body is rethrown here after all workers have stopped.
void parallel_for(int64_t tasks, int workers, const std::function<void(int64_t task, int worker)>& body);

}  // namespace lors
