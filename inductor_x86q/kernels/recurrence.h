// The steps of a recurrent layer: the hidden state of the step before by int8 weights, gates, the next hidden state.
//
// What the input adds to the gates is computed before, for all steps. Each row's hidden state is rounded to 8 bits with a
// scale of its own, at each step. Threads share the hidden units and meet once a step: each of them rounds the whole state
// for itself. A `Kernel` says what decides the machine code: the `Cell`, the type of the output, and whether a sum of two
// products FITS_16 bits.
//
// Constants of a direction: of each vector of hidden units and each gate the compensation of the state's zero point (int32)
// and then, for all of them, the scales of the weight's rows; of each vector the bias of the product, where the cell has one;
// the weight as [vector][four bytes of the state][gate][lane][4].

// A state's integers are unsigned, around this.
constexpr int32_t MIDDLE = 128;

// A vector of hidden units, of which the last may be less than whole.
struct Units {
    int64_t first;
    int count;

    X86Q_INLINE Floats read(const float* from) const {
        return count == LANES ? load<Floats>(from + first) : (Floats)load_first(from + first, 4 * count);
    }
    X86Q_INLINE void write(float* to, Floats value) const {
        if (count == LANES)
            store(to + first, value);
        else
            store_first(to + first, (Ints)value, 4 * count);
    }
    // Integers from -128 to 255 as bytes.
    X86Q_INLINE void write(int8_t* to, Ints value) const {
        value &= 255;
        const Ints packed = pack_unsigned_16(pack_32(value, value), pack_32(value, value));
        const Ints bytes = (Ints)parts_in_a_row((Integers)packed);
        if (count == LANES)
            std::memcpy(to + first, &bytes, LANES);
        else
            store_first(to + first, bytes, count);
    }
};

// What a cell does with its gates, as the input and the product give them, and its states of the step before: gives the
// hidden state.
struct Lstm {
    static constexpr int GATES = 4;
    static constexpr bool HAS_CELL_STATE = true, HAS_BIAS = false;

    static X86Q_INLINE Floats next(const Floats (&x)[GATES], const Floats (&product)[GATES], Floats, Floats, Floats& cell) {
        Floats e[GATES] = {-(x[0] + product[0]), -(x[1] + product[1]), 2.0f * (x[2] + product[2]), -(x[3] + product[3])};
        exponentials(e);
        const Floats input = reciprocal(1.0f + e[0]), forget = reciprocal(1.0f + e[1]);
        const Floats candidate = 1.0f - 2.0f * reciprocal(1.0f + e[2]), output = reciprocal(1.0f + e[3]);
        cell = forget * cell + input * candidate;
        Floats last[1] = {2.0f * cell};
        exponentials(last);
        return output * (1.0f - 2.0f * reciprocal(1.0f + last[0]));
    }
};

struct Gru {
    static constexpr int GATES = 3;
    static constexpr bool HAS_CELL_STATE = false, HAS_BIAS = true;

    static X86Q_INLINE Floats next(
        const Floats (&x)[GATES], const Floats (&product)[GATES], Floats bias, Floats hidden, Floats&) {
        Floats e[2] = {-(x[0] + product[0]), -(x[1] + product[1])};
        exponentials(e);
        const Floats reset = reciprocal(1.0f + e[0]), update = reciprocal(1.0f + e[1]);
        Floats last[1] = {2.0f * (x[2] + reset * (product[2] + bias))};
        exponentials(last);
        const Floats candidate = 1.0f - 2.0f * reciprocal(1.0f + last[0]);
        return candidate + update * (hidden - candidate);
    }
};

struct RnnTanh {
    static constexpr int GATES = 1;
    static constexpr bool HAS_CELL_STATE = false, HAS_BIAS = false;

    static X86Q_INLINE Floats next(const Floats (&x)[GATES], const Floats (&product)[GATES], Floats, Floats, Floats&) {
        Floats e[1] = {2.0f * (x[0] + product[0])};
        exponentials(e);
        return 1.0f - 2.0f * reciprocal(1.0f + e[0]);
    }
};

struct RnnRelu {
    static constexpr int GATES = 1;
    static constexpr bool HAS_CELL_STATE = false, HAS_BIAS = false;

    static X86Q_INLINE Floats next(const Floats (&x)[GATES], const Floats (&product)[GATES], Floats, Floats, Floats&) {
        return maximum(x[0] + product[0], Floats{});
    }
};

// Rounds a row to bytes, which are filled up to whole fours of vectors; gives its scale.
inline float round_row(const float* from, int64_t size, uint8_t* to) {
    const auto part = [&](int64_t first) X86Q_LAMBDA {
        const int64_t left = size - first;
        return left <= 0 ? Floats{} : Units{first, left < LANES ? (int)left : LANES}.read(from);
    };
    Floats magnitudes{};
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats value = part(i);
        magnitudes = maximum(maximum(value, -value), magnitudes);
    }
    float largest = 0x1p-24f;  // of a row of zeros
    for (int lane = 0; lane < LANES; ++lane) largest = magnitudes[lane] > largest ? magnitudes[lane] : largest;
    const float inverse = 127.0f / largest;
    for (int64_t i = 0; i < size; i += 4 * LANES) {
        Ints x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) x[j] = nearest(part(i + j * LANES) * inverse) + MIDDLE;
        const Ints packed = pack_unsigned_16(pack_32(x[0], x[1]), pack_32(x[2], x[3]));
        store(to + i, (Ints)parts_in_a_row((Integers)packed));
    }
    return largest / 127.0f;
}

template <class Kernel>
struct Steps {
    typedef typename Kernel::Cell Cell;
    typedef typename Kernel::Out Out;
    static constexpr int GATES = Cell::GATES;

    const X86qRecurrence& sizes;
    const float *x, *hidden, *cell;  // the last two null for zeros
    const int8_t* constants;
    Out* out;       // null where nobody reads it; so are the states behind the last step
    float* states;
    float* between = nullptr;  // states between steps: two hidden ones in turns, one cell state

    int64_t vectors() const { return (sizes.hidden + LANES - 1) / LANES; }
    int64_t fours() const { return (sizes.hidden + 3) / 4; }
    int64_t row_bytes() const { return (sizes.hidden + 4 * LANES - 1) / (4 * LANES) * (4 * LANES); }
    int64_t of_direction() const {
        const int64_t numbers = (2 * GATES + Cell::HAS_BIAS) * 4 * LANES;
        return vectors() * (numbers + GATES * fours() * 4 * LANES);
    }
    int64_t state_size() const { return sizes.batch * sizes.hidden; }
    int64_t states_size() const { return sizes.directions * state_size(); }
    int64_t between_bytes() const { return (2 + Cell::HAS_CELL_STATE) * states_size() * (int64_t)sizeof(float); }

    // All steps of some directions, of which each thread of a team computes its share of the hidden units.
    void run(const Worker& team, int64_t first_direction, int64_t end_direction) const {
        const Scratch scratch(sizes.batch * (row_bytes() + (int64_t)sizeof(float)));
        uint8_t* const rounded = scratch.bytes;
        float* const scales = (float*)(rounded + sizes.batch * row_bytes());
        for (int64_t step = 0; step < sizes.steps; ++step) {
            for (int64_t direction = first_direction; direction < end_direction; ++direction) {
                const float* const first = hidden ? hidden + direction * state_size() : nullptr;
                const float* const before = step ? hidden_behind(direction, step - 1) : first;
                for (int64_t row = 0; before && row < sizes.batch; ++row)
                    scales[row] = round_row(before + row * sizes.hidden, sizes.hidden, rounded + row * row_bytes());
                team.share(vectors(), [&](int64_t first, int64_t end) {
                    for (int64_t vector = first; vector < end; ++vector)
                        compute(direction, step, vector, before, rounded, scales);
                });
            }
            team.meet();
        }
    }

private:
    int64_t time(int64_t direction, int64_t step) const { return direction ? sizes.steps - 1 - step : step; }
    // A step's hidden states lie where those of the step before the last did: who meets there has read these.
    float* hidden_behind(int64_t direction, int64_t step) const {
        return between + step % 2 * states_size() + direction * state_size();
    }
    X86Q_INLINE Ints rounded_output(Floats value) const {
        return quantized(value * sizes.inverse_scale, (int32_t)sizes.zero_point, (int32_t)sizes.low, (int32_t)sizes.high);
    }

    void compute(
        int64_t direction, int64_t step, int64_t vector, const float* before, const uint8_t* rounded,
        const float* scales) const {
        int64_t row = 0;
        const auto rows = [&](auto count) X86Q_LAMBDA {
            constexpr int ROWS = decltype(count)::value;
            for (; row + ROWS <= sizes.batch; row += ROWS)
                block<ROWS>(direction, step, vector, row, before, rounded, scales);
        };
        if constexpr (LANES == 16) rows(std::integral_constant<int, 4>());
        rows(std::integral_constant<int, 2>());
        rows(std::integral_constant<int, 1>());
    }

    template <int ROWS>
    void block(
        int64_t direction, int64_t step, int64_t vector, int64_t row, const float* before, const uint8_t* rounded,
        const float* scales) const {
        const int8_t* const own = constants + direction * of_direction();
        const int64_t all = vectors() * LANES, left = sizes.hidden - vector * LANES, bytes = row_bytes();
        const int32_t* const compensation = (const int32_t*)own + vector * GATES * LANES;
        const float* const factors = (const float*)compensation + GATES * all;
        const float* const bias = (const float*)own + 2 * GATES * all;
        const int8_t* weight = own + (2 * GATES + Cell::HAS_BIAS) * 4 * all + vector * GATES * fours() * 4 * LANES;
        const Units units = {vector * LANES, left < LANES ? (int)left : LANES};
        Ints sums[ROWS][GATES] = {};
        if (before) {
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
                for (int gate = 0; gate < GATES; ++gate) sums[i][gate] = load<Ints>(compensation + gate * LANES);
            const uint8_t* from = rounded + row * bytes;
            for (int64_t end = fours(), four = 0; four < end; ++four, from += 4, weight += GATES * 4 * LANES) {
                Ints b[GATES];
#pragma GCC unroll 4
                for (int gate = 0; gate < GATES; ++gate) b[gate] = load<Ints>(weight + gate * 4 * LANES);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; ++i) {
                    int32_t bytes_of_row;
                    std::memcpy(&bytes_of_row, from + i * bytes, 4);
                    const Ints a = Ints{} + bytes_of_row;
#pragma GCC unroll 4
                    for (int gate = 0; gate < GATES; ++gate)
                        sums[i][gate] = dot<Kernel::FITS_16>(sums[i][gate], a, b[gate]);
                }
            }
        }
        const float* gates = x + time(direction, step) * sizes.x_step + row * sizes.x_row + direction * GATES * sizes.hidden;
        const int64_t to = time(direction, step) * sizes.out_step + row * sizes.out_row + direction * sizes.hidden;
        const bool is_last = step + 1 == sizes.steps;
        for (int i = 0; i < ROWS; ++i, gates += sizes.x_row) {
            Floats given[GATES], product[GATES];
            const float scale = before ? scales[row + i] : 0.0f;
#pragma GCC unroll 4
            for (int gate = 0; gate < GATES; ++gate) {
                given[gate] = units.read(gates + gate * sizes.hidden);
                product[gate] =
                    __builtin_convertvector(sums[i][gate], Floats) * (load<Floats>(factors + gate * LANES) * scale);
            }
            Floats hidden_before{}, cell_state{}, of_product{};
            const int64_t of_row = direction * state_size() + (row + i) * sizes.hidden;
            float* const cells = between + 2 * states_size() + of_row;
            if constexpr (Cell::HAS_BIAS) {
                of_product = load<Floats>(bias + vector * LANES);
                if (before) hidden_before = units.read(before + (row + i) * sizes.hidden);
            }
            if constexpr (Cell::HAS_CELL_STATE) {
                if (step)
                    cell_state = units.read(cells);
                else if (cell)
                    cell_state = units.read(cell + of_row);
            }
            const Floats next = Cell::next(given, product, of_product, hidden_before, cell_state);
            units.write(hidden_behind(direction, step) + (row + i) * sizes.hidden, next);
            if constexpr (Cell::HAS_CELL_STATE) units.write(cells, cell_state);
            if (out) {
                if constexpr (std::is_integral_v<Out>)
                    units.write((int8_t*)out + to + i * sizes.out_row, rounded_output(next));
                else
                    units.write(out + to + i * sizes.out_row, next);
            }
            if (is_last && states) {
                units.write(states + of_row, next);
                if constexpr (Cell::HAS_CELL_STATE) units.write(states + states_size() + of_row, cell_state);
            }
        }
    }
};

// Two directions are two teams of threads where they divide evenly: these need not meet each other.
template <class Kernel>
inline void recurrence(Steps<Kernel> steps) {
    const Scratch scratch(steps.between_bytes());
    steps.between = (float*)scratch.bytes;
    on_threads(steps.sizes.threads, [&](const Worker& worker) {
        const int64_t directions = steps.sizes.directions;
        if (worker.count % directions == 0) {
            const int64_t team = worker.number % directions;
            steps.run(Worker{worker.number / directions, worker.count / directions}, team, team + 1);
        } else {
            steps.run(worker, 0, directions);
        }
    });
}
