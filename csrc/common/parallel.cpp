#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace lors {
namespace {

struct Job {
    const std::function<void(int64_t, int)>* body;
    int64_t tasks;
    int helpers;  // pool threads that take part
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;

    void run(int worker) {
        try {
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) (*body)(task, worker);
        } catch (...) {
            next.store(tasks);
            std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    }
};

class Pool {
  public:
    void run(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            start(job.helpers);
            job_ = &job;
            running_ = job.helpers;
            ++generation_;
        }
        wake_.notify_all();
        job.run(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return running_ == 0; });
        job_ = nullptr;
    }

    std::mutex owner;  // held for a whole job: one caller uses the pool at a time

  private:
    // More threads, until there are `count`; those that could be started stay.
    void start(int count) {
        while (static_cast<int>(threads_.size()) < count) {
            const int index = static_cast<int>(threads_.size());
            try {
                threads_.emplace_back([this, index] { serve(index); });
            } catch (const std::system_error& error) {
                throw std::runtime_error("threads: expected " + std::to_string(count + 1) + ", got " +
                                         std::to_string(index + 1) + ": " + error.what());
            }
        }
    }
    void serve(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= (job_ ? job_->helpers : 0)) continue;
            Job& job = *job_;
            lock.unlock();
            job.run(index + 1);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    Job* job_ = nullptr;
    uint64_t generation_ = 0;
    int running_ = 0;
};

// The pool is never destroyed: its threads sleep until the process ends, and joining them from a static destructor
// would race with the interpreter's own shutdown. A forked child has none of the threads, so it gets a new pool.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
    (void)registered;
    Pool* current = g_pool.load();
    if (!current) {
        Pool* fresh = new Pool;
        if (g_pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

}  // namespace

void parallel_for(int64_t tasks, int workers, const std::function<void(int64_t, int)>& body) {
    Job job;
    job.body = &body;
    job.tasks = tasks;
    job.helpers = static_cast<int>(std::min<int64_t>(workers, tasks)) - 1;
    if (job.helpers <= 0) {
        job.run(0);
    } else {
        Pool& shared = pool();
        // A second caller does its own work instead of waiting: the bits are the same either way.
        std::unique_lock<std::mutex> lock(shared.owner, std::try_to_lock);
        if (lock.owns_lock()) {
            shared.run(job);
        } else {
            job.run(0);
        }
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace lors
