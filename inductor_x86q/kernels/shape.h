// The sizes of a layer, what follows from them, and how threads share its work.

struct Shape : X86qArguments {
    int64_t out_d, out_h, out_w, padded_d, padded_h, padded_w;
    int64_t read_image, read_plane, read_row, read_pixel;  // strides of what is read: of the copy, where there is one

    explicit Shape(const X86qArguments& arguments) : X86qArguments(arguments) {
        padded_d = d + 2 * pad_d;
        padded_h = h + 2 * pad_h;
        padded_w = w + 2 * pad_w;
        out_d = outputs(padded_d, kernel_d, dilation_d, stride_d);
        out_h = outputs(padded_h, kernel_h, dilation_h, stride_h);
        out_w = outputs(padded_w, kernel_w, dilation_w, stride_w);
        read_pixel = is_copied ? c : x_pixel;
        read_row = is_copied ? padded_w * c : x_row;
        read_plane = is_copied ? padded_h * read_row : x_plane;
        read_image = is_copied ? padded_d * read_plane : x_image;
    }

    static int64_t outputs(int64_t size, int64_t kernel, int64_t dilation, int64_t stride) {
        return (size - dilation * (kernel - 1) - 1) / stride + 1;
    }
};

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
