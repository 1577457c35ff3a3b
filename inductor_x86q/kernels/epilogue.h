// From the integer sums to the output.

// What a layer's numbers are, apart from its shape: they are data.
struct Scalars {
    float inverse_scale;  // of the output
    int32_t zero_point, low, high;  // of the output's integers
    float other_scale, other_zero_point;
    float first, second;  // of the activation
    int32_t x_zero_point;
};

// A layer's constants: per output channel the compensation of the input's zero point (int32), the scale and the bias, each
// `stride` apart, behind them the scalars, and at the next whole ALIGNMENT the packed weight.
template <class Epilogue>
X86Q_INLINE Scalars scalars(const int32_t* channels, const X86qArguments& arguments) {
    Scalars found = load<Scalars>(channels + 3 * arguments.channels);
    if (Epilogue::DYNAMIC) found.x_zero_point = *(const int32_t*)arguments.x_zero_points;
    return found;
}

X86Q_INLINE const int8_t* packed_weight(const int32_t* channels, int64_t stride) {
    constexpr int64_t ALIGNMENT = 64;
    const int64_t numbers = 3 * 4 * stride + (int64_t)sizeof(Scalars);
    return (const int8_t*)channels + (numbers + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

// Where the outputs of a block begin, and how far apart its pixels are.
template <class Epilogue>
struct Target {
    const int32_t* channels;  // numbers of the first channel
    int64_t channels_stride;
    const typename Epilogue::Other* other;
    int64_t other_pixel;
    typename Epilogue::Out* out;
    int64_t out_pixel;
    const float* x_scales;  // of the first pixel, where they are arguments
    int64_t x_scales_step;
    int count;   // how many channels are wanted
    int pixels;  // and pixels
};

// VECTORS vectors of integers as bytes, part 0 of each vector first, then part 1, ...; with the zero point added, and limited.
template <int VECTORS, bool SIGNED>
X86Q_INLINE Ints pack(const Ints* x, const Scalars& scalars) {
    const Ints zero_points = Ints{} + (int32_t)((scalars.zero_point & 0xFFFF) * 0x10001u);
    const Ints least = Ints{} + (int32_t)((scalars.low & 0xFF) * 0x1010101u);
    const Ints greatest = Ints{} + (int32_t)((scalars.high & 0xFF) * 0x1010101u);
    const Ints front = add_saturated_16(pack_32(x[0], x[VECTORS > 1 ? 1 : 0]), zero_points);
    const Ints back =
        VECTORS > 2 ? add_saturated_16(pack_32(x[VECTORS > 2 ? 2 : 0], x[VECTORS > 3 ? 3 : 0]), zero_points) : front;
    if constexpr (SIGNED) return maximum_signed_8(minimum_signed_8(pack_signed_16(front, back), greatest), least);
    return maximum_unsigned_8(minimum_unsigned_8(pack_unsigned_16(front, back), greatest), least);
}

// Vector i of a pixel's channels as floats: they lie one after the other; the vector takes them so if IN_A_ROW, else as
// `interleave` gives them.
template <bool IN_A_ROW, class T>
X86Q_INLINE Floats widen(const T* address, int i) {
    if constexpr (IN_A_ROW) {
        return widen(address + i * LANES);
    } else {
        T some[LANES];
        for (int part = 0; part < LANES / 4; ++part) std::memcpy(some + part * 4, address + part * 16 + i * 4, 4 * sizeof(T));
        return widen(some);
    }
}

// The values of a pixel's VECTORS vectors of channels: dequantized, biased, and with the other operand added.
template <class Epilogue, int VECTORS, bool IN_A_ROW>
X86Q_INLINE void dequantize(
    const Ints* sums, const Scalars& scalars, const Target<Epilogue>& to, int pixel, Floats* values) {
    const typename Epilogue::Other* other = to.other + pixel * to.other_pixel;
    typename Epilogue::Other some_other[VECTORS * LANES];
    if (Epilogue::HAS_OTHER && to.count < VECTORS * LANES) {
        std::memcpy(some_other, other, to.count * sizeof *other);
        other = some_other;
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        const int32_t* here = to.channels + i * LANES;
        Floats sum = __builtin_convertvector(sums[i], Floats);
        if constexpr (Epilogue::DYNAMIC) sum *= to.x_scales[pixel * to.x_scales_step];
        values[i] = multiply_add(
            sum, load<Floats>(here + to.channels_stride),
            load<Floats>(here + 2 * to.channels_stride));
        if constexpr (Epilogue::HAS_OTHER) {
            const Floats others = widen<IN_A_ROW>(other, i) - scalars.other_zero_point;
            values[i] = multiply_add(others, Floats{} + scalars.other_scale, values[i]);
        }
    }
}

// Stores a pixel's channels, quantized. They lie one after the other if IN_A_ROW, else as `interleave` gives them, which is
// how `pack` takes them.
template <class Epilogue, int VECTORS, bool IN_A_ROW>
X86Q_INLINE void quantize(const Floats* values, const Scalars& scalars, const Target<Epilogue>& to, int pixel) {
    typedef typename Epilogue::Out Out;
    constexpr int FULL = VECTORS * LANES;
    constexpr bool IS_INTEGER = std::is_integral_v<Out>;
    constexpr bool IS_BOUNDED = !Epilogue::DYNAMIC && (!Epilogue::HAS_OTHER || std::is_integral_v<typename Epilogue::Other>);
    Out* const out = to.out + pixel * to.out_pixel;
    Out some[FULL];
    [[maybe_unused]] Out* place = to.count < FULL ? some : out;
    Ints steps[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        Floats value = values[i];
        if constexpr (IS_INTEGER) {
            if constexpr (!Epilogue::IN_STEPS) value *= scalars.inverse_scale;
            // What only known numbers give has less than 2^30 steps; converting more than 2^31 would change its sign.
            if constexpr (!IS_BOUNDED) value = minimum(value, Floats{} + 0x1p30f);
            steps[i] = nearest(value);
        } else if constexpr (IN_A_ROW) {
            store_floats(place + i * LANES, value);
        } else {
            Out row[LANES];
            store_floats(row, value);
            for (int part = 0; part < LANES / 4; ++part) std::memcpy(place + part * 16 + i * 4, row + part * 4, 4 * sizeof(Out));
        }
    }
    if constexpr (IS_INTEGER) {
        const Ints packed = pack<VECTORS, std::is_signed_v<Out>>(steps, scalars);
        const Ints bytes = IN_A_ROW ? (Ints)parts_in_a_row((Integers)packed) : packed;
        if (to.count < FULL) {
            store_first(out, bytes, to.count);
        } else {
            std::memcpy(out, &bytes, FULL);
        }
    } else if (to.count < FULL) {
        std::memcpy(out, some, to.count * sizeof(Out));
    }
}

// The output of PIXELS neighbouring pixels from their sums on, of pixel `first` of the block and those behind it.
template <class Epilogue, int PIXELS, int VECTORS, bool IN_A_ROW>
X86Q_INLINE void finish(
    const Ints (*sums)[VECTORS], const Scalars& scalars, const Target<Epilogue>& to, int first) {
    Floats values[PIXELS * VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i)
        if (first + i < to.pixels) dequantize<Epilogue, VECTORS, IN_A_ROW>(sums[i], scalars, to, first + i, values + i * VECTORS);
    if constexpr (!Epilogue::IN_STEPS) Epilogue::activate(values, scalars);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i)
        if (first + i < to.pixels) quantize<Epilogue, VECTORS, IN_A_ROW>(values + i * VECTORS, scalars, to, first + i);
}

// All ROWS pixels of a block, as many together as it takes to hide how long an exponential takes.
template <class Epilogue, int ROWS, int VECTORS, bool IN_A_ROW>
X86Q_INLINE void finish_all(const Ints (&sums)[ROWS][VECTORS], const Scalars& scalars, const Target<Epilogue>& to) {
    constexpr int WANTED = Epilogue::EXPONENTIAL ? (EXPONENTIALS + VECTORS - 1) / VECTORS : 1;
    constexpr int TOGETHER = WANTED < ROWS ? WANTED : ROWS, WHOLE = ROWS / TOGETHER * TOGETHER;
#pragma GCC unroll 16
    for (int row = 0; row < WHOLE; row += TOGETHER)
        finish<Epilogue, TOGETHER, VECTORS, IN_A_ROW>(sums + row, scalars, to, row);
    if constexpr (WHOLE < ROWS)
        finish<Epilogue, ROWS - WHOLE, VECTORS, IN_A_ROW>(sums + WHOLE, scalars, to, WHOLE);
}
