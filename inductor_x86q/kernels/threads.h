// Memory of a call's own, and how threads share its work.

struct Scratch {
    uint8_t* const bytes;
    explicit Scratch(int64_t size) : bytes(size ? (uint8_t*)std::malloc(size) : nullptr) {
        if (size && !bytes) throw std::bad_alloc();
    }
    ~Scratch() { std::free(bytes); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// One of the threads that share the work.
struct Worker {
    int64_t number, count;

    // Runs `body(first, end)` for its share of so many tasks, which are neighbours.
    template <class Body>
    void share(int64_t tasks, const Body& body) const {
        const int64_t first = tasks * number / count, end = tasks * (number + 1) / count;
        if (first < end) body(first, end);
    }

    // Waits for the others.
    void meet() const {
        if (count > 1) {
#pragma omp barrier
        }
    }
};

// Runs `body(worker)` on so many threads; 0: on as many as there are.
template <class Body>
inline void on_threads(int64_t threads, const Body& body) {
    if (threads == 1) return body(Worker{0, 1});
#pragma omp parallel num_threads(threads ? threads : omp_get_max_threads())
    body(Worker{omp_get_thread_num(), omp_get_num_threads()});
}
