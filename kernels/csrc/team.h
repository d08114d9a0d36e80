// Several steps of work in one parallel region: passing from one to the next costs a tenth of waking the threads anew.
//
// A step is over when its work is done, not when every thread has been there: one that another process keeps off its core
// holds nobody up with work that it has not begun. Who waits for work that somebody has begun spins, and then sleeps: the
// system can put a thread that lacks a core onto one that sleeps, but not onto one that spins.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "common.h"

extern "C" int omp_get_num_threads() __attribute__((weak));

namespace shoal {

class Team {
    static constexpr int kSteps = 8;  // at most, in one region
    static constexpr int kSpins = 1 << 11;  // some 50 us

    struct Step {
        alignas(64) std::atomic<int> next{0};
        alignas(64) std::atomic<int> done{0};
        std::atomic<int> sleepers{0};

        // Until `count` are done. `done` is what a sleeper sleeps on: a change of it ends the call, or does not let it begin.
        void await(int count) {
            for (int spins = 0; spins < kSpins; spins++, _mm_pause())
                if (done.load(std::memory_order_acquire) == count) return;
            sleepers.fetch_add(1);
            for (int seen; (seen = done.load()) != count;) futex(FUTEX_WAIT_PRIVATE, seen);
        }
        void add(int finished, int count) {
            if (done.fetch_add(finished) + finished == count && sleepers.load()) futex(FUTEX_WAKE_PRIVATE, 1 << 30);
        }
        void futex(int operation, int value) { syscall(SYS_futex, &done, operation, value, nullptr, nullptr, 0); }
    };

public:
    // One thread's view; all threads take the same steps.
    class Member {
    public:
        Member(Step* steps, int size) : step(steps), size(size) {}

        // body(i) for every i below count: whoever is free takes the next few. Then waits for what others have taken.
        template <class Body>
        void each(long count, const Body& body) {
            const int all = count, chunk = std::max(1, all / (8 * size));
            for (int first; (first = step->next.fetch_add(chunk, std::memory_order_relaxed)) < all;) {
                const int end = std::min(first + chunk, all);
                for (long i = first; i < end; i++) body(i);
                step->add(end - first, all);
            }
            step->await(all);
            step++;
        }

    private:
        Step* step;
        const int size;
    };

    // work(member), once on each of torch's threads.
    template <class Work>
    static void run(const Work& work) {
        struct Shared {
            const Work& work;
            Step steps[kSteps];
        } shared{work};
        const auto enter = [](void* data) {
            Shared& all = *static_cast<Shared*>(data);
            Member member(all.steps, omp_get_num_threads ? omp_get_num_threads() : 1);
            all.work(member);
        };
        if (GOMP_parallel)
            GOMP_parallel(enter, &shared, 0, 0);
        else
            enter(&shared);
    }
};

}  // namespace shoal
