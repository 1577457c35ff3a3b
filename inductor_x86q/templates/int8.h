// int8 convolution for x86, written into the generated code of every kernel that uses it.
//
// All shapes are compile-time constants of a struct (`Shape`), so that each instance is a kernel for one layer. Only
// `dot` knows the instruction set; everything else is the compiler's vectors of LANES 32-bit numbers.
#ifndef INDUCTOR_X86Q_INT8_H
#define INDUCTOR_X86Q_INT8_H

#include <immintrin.h>
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

namespace inductor_x86q {

#define INDUCTOR_X86Q_INLINE inline __attribute__((always_inline))
#define INDUCTOR_X86Q_LAMBDA __attribute__((always_inline))

constexpr int LANES = INDUCTOR_X86Q_LANES;  // 8 or 16, defined where this is included
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <class Vector>
INDUCTOR_X86Q_INLINE Vector load(const void* address) {
    Vector value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class Vector>
INDUCTOR_X86Q_INLINE void store(void* address, Vector value) {
    std::memcpy(address, &value, sizeof value);
}

// --- four products a lane -----------------------------------------------------------------------------------------

// sum + Σ a[4·lane + i]·b[4·lane + i], a unsigned and b signed. FITS_16 promises that the sum of two products fits in
// 16 bits, as it does where activations or weights keep 7 bits.
template <bool FITS_16>
INDUCTOR_X86Q_INLINE __m256i dot_256(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    if constexpr (FITS_16) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
    } else {
        const __m256i even = _mm256_madd_epi16(
            _mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
        return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
    }
#endif
}

template <bool FITS_16>
INDUCTOR_X86Q_INLINE Ints dot(Ints sum, Ints a, Ints b) {
#if INDUCTOR_X86Q_LANES == 8
    return (Ints)dot_256<FITS_16>((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else  // the wide kernels on a CPU without wide registers, for tests
    struct Halves { __m256i part[2]; };
    Halves s = load<Halves>(&sum), x = load<Halves>(&a), y = load<Halves>(&b);
    for (int i = 0; i < 2; ++i) s.part[i] = dot_256<FITS_16>(s.part[i], x.part[i], y.part[i]);
    return load<Ints>(&s);
#endif
}

// --- from the integer sum to the output ---------------------------------------------------------------------------

INDUCTOR_X86Q_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
INDUCTOR_X86Q_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// To the nearest integer, ties to even, of |x| < 2^22: adding 1.5·2^23 leaves the integer in the lowest bits.
INDUCTOR_X86Q_INLINE Ints nearest(Floats x) { return (Ints)(x + 12582912.0f) - 0x4B400000; }

// e^x to about 1e-7 of its value: 2^n·p(x − n·ln 2), the polynomial is that of Cephes' expf.
INDUCTOR_X86Q_INLINE Floats exponential(Floats x) {
    x = minimum(maximum(x, Floats{} - 87.0f), Floats{} + 88.0f);
    const Ints n = nearest(x * 1.44269504f);
    const Floats whole = __builtin_convertvector(n, Floats), r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (Floats)((n + 127) << 23);
}

// The lowest byte of each lane.
INDUCTOR_X86Q_INLINE Bytes narrow(Ints x) {
#if INDUCTOR_X86Q_LANES == 8
    const __m256i gathered = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0C080400));
    return (Bytes)_mm256_castsi256_si128(
        _mm256_permutevar8x32_epi32(gathered, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4)))[0];
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

// LANES bytes as integers. Compilers take a conversion of so short vectors apart, hence the instructions by name.
INDUCTOR_X86Q_INLINE Ints extend(const uint8_t* address) {
#if INDUCTOR_X86Q_LANES == 8
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)address));
#else
    return __builtin_convertvector(load<Bytes>(address), Ints);
#endif
}

INDUCTOR_X86Q_INLINE Ints extend(const int8_t* address) {
    return (extend((const uint8_t*)address) ^ 128) - 128;
}

template <class T>
INDUCTOR_X86Q_INLINE Floats widen(const T* address) {
    if constexpr (std::is_same_v<T, float>) {
        return load<Floats>(address);
    } else {
        return __builtin_convertvector(extend(address), Floats);
    }
}

// What a layer's numbers are, apart from its shape: they are data, so that layers of one shape share a kernel.
struct Scalars {
    float inverse_scale, zero_point;  // of the output
    float other_scale, other_zero_point;
    float first, second;  // of the activation
    int32_t x_zero_point;
};

// Per output channel the compensation of the input's zero point (int32), the scale and the bias, STRIDE apart, and
// behind them the scalars.
template <int STRIDE>
INDUCTOR_X86Q_INLINE Scalars scalars(const int32_t* channels) { return load<Scalars>(channels + 3 * STRIDE); }

// The output of `lanes` channels: dequantized, biased, with the other operand added, activated and quantized.
template <int STRIDE, class Epilogue>
INDUCTOR_X86Q_INLINE void finish(
    Ints sum, const int32_t* channels, const Scalars& scalars, const typename Epilogue::Other* other,
    typename Epilogue::Out* out, int lanes) {
    Floats value = __builtin_convertvector(sum + load<Ints>(channels), Floats) * load<Floats>(channels + STRIDE);
    value += load<Floats>(channels + 2 * STRIDE);
    if constexpr (Epilogue::HAS_OTHER) {
        typename Epilogue::Other some[LANES] = {};
        if (lanes < LANES) std::memcpy(some, other, lanes * sizeof some[0]);
        value += (widen(lanes < LANES ? some : other) - scalars.other_zero_point) * scalars.other_scale;
    }
    value = Epilogue::activation(value, scalars.first, scalars.second);
    typedef typename Epilogue::Out Out;
    std::conditional_t<std::is_same_v<Out, float>, Floats, Bytes> result;
    if constexpr (std::is_same_v<Out, float>) {
        result = value;
    } else {
        const float low = (std::is_signed_v<Out> ? -128 : 0) - scalars.zero_point;
        const Floats limited = minimum(maximum(value * scalars.inverse_scale, Floats{} + low), Floats{} + (low + 255));
        result = narrow(nearest(limited) + (int32_t)scalars.zero_point);
    }
    if (lanes < LANES) {
        std::memcpy(out, &result, lanes * sizeof(Out));
    } else {
        store(out, result);
    }
}

// --- convolution as a matrix product over runs of contiguous bytes --------------------------------------------------

template <class Shape>
INDUCTOR_X86Q_INLINE Ints broadcast(const uint8_t* address, int bytes) {
    uint32_t four = 0;
    std::memcpy(&four, address, bytes);
    if constexpr (Shape::SIGNED) four ^= 0x80808080u;  // s8 as u8; the zero point moves along
    return Ints{} + (int32_t)four;
}

// ROWS output pixels by COLUMNS vectors of output channels. A pixel's inputs are RUNS runs of RUN bytes; run r starts
// at Shape::run(r) from the pixel's base. Weights lie as [vector][run][four bytes of the run][lane][4].
template <class Shape, int ROWS, int COLUMNS>
INDUCTOR_X86Q_INLINE void multiply(const uint8_t* const* bases, const int8_t* weight, Ints (&sums)[ROWS][COLUMNS]) {
    constexpr int FOURS = (Shape::RUN + 3) / 4, WHOLE = Shape::RUN / 4, REST = Shape::RUN % 4;
    constexpr int64_t VECTOR = (int64_t)Shape::RUNS * FOURS * 4 * LANES;
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) sums[row][column] = Ints{};
    const auto step = [&](const int8_t* here, int64_t offset, int bytes) INDUCTOR_X86Q_LAMBDA {
        Ints b[COLUMNS];
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) b[column] = load<Ints>(here + column * VECTOR);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Ints a = broadcast<Shape>(bases[row] + offset, bytes);
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column)
                sums[row][column] = dot<Shape::FITS_16>(sums[row][column], a, b[column]);
        }
    };
#pragma GCC unroll 1
    for (int run = 0; run < Shape::RUNS; ++run) {
        const int64_t start = Shape::run(run);
        const int8_t* here = weight + (int64_t)run * FOURS * 4 * LANES;
#pragma GCC unroll 1
        for (int four = 0; four < WHOLE; ++four) step(here + four * 4 * LANES, start + four * 4, 4);
        if constexpr (REST != 0) step(here + WHOLE * 4 * LANES, start + WHOLE * 4, REST);
    }
}

struct Scratch {
    uint8_t* const bytes;
    explicit Scratch(int64_t size) : bytes(size ? (uint8_t*)std::malloc(size) : nullptr) {
        if (size && !bytes) throw std::bad_alloc();
    }
    ~Scratch() { std::free(bytes); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// The image with the zero point around it, pixels without gaps.
template <class Shape>
INDUCTOR_X86Q_INLINE void pad_row(const uint8_t* x, uint8_t* padded, int64_t row, int zero_point) {
    constexpr int64_t WIDTH = Shape::PADDED_WIDTH * Shape::C;
    uint8_t* to = padded + row * WIDTH;
    const int64_t image = row / Shape::PADDED_HEIGHT, h = row % Shape::PADDED_HEIGHT - Shape::PAD_H;
    if (h < 0 || h >= Shape::H) {
        std::memset(to, zero_point, WIDTH);
        return;
    }
    std::memset(to, zero_point, Shape::PAD_W * Shape::C);
    const uint8_t* from = x + image * Shape::X_IMAGE + h * Shape::X_ROW;
    uint8_t* inner = to + Shape::PAD_W * Shape::C;
    if constexpr (Shape::X_PIXEL == Shape::C) {
        std::memcpy(inner, from, Shape::W * Shape::C);
    } else {
        for (int64_t w = 0; w < Shape::W; ++w) std::memcpy(inner + w * Shape::C, from + w * Shape::X_PIXEL, Shape::C);
    }
    inner += Shape::W * Shape::C;
    std::memset(inner, zero_point, to + WIDTH - inner);
}

template <class Shape, class Epilogue>
inline void block(
    const uint8_t* x, const int8_t* weight, const int32_t* channels, const typename Epilogue::Other* other,
    typename Epilogue::Out* out, const Scalars& numbers, int64_t task) {
    constexpr int ROWS = Shape::ROWS, COLUMNS = Shape::COLUMNS, GROUP_VECTORS = Shape::VECTORS / Shape::GROUPS;
    constexpr int64_t PIXELS = (int64_t)Shape::N * Shape::OUT_H * Shape::OUT_W, BLOCKS = (PIXELS + ROWS - 1) / ROWS;
    constexpr int PANELS = (GROUP_VECTORS + COLUMNS - 1) / COLUMNS, GROUP_OUT = Shape::OUT_C / Shape::GROUPS;
    constexpr int64_t VECTOR = (int64_t)Shape::RUNS * ((Shape::RUN + 3) / 4) * 4 * LANES;
    const int group = task / BLOCKS / PANELS, panel = task / BLOCKS % PANELS;
    // The last panel and the last block begin earlier and compute some outputs twice, instead of being smaller.
    const int column0 = panel * COLUMNS + COLUMNS > GROUP_VECTORS ? GROUP_VECTORS - COLUMNS : panel * COLUMNS;
    int64_t pixel = task % BLOCKS * ROWS;
    if (pixel + ROWS > PIXELS) pixel = PIXELS - ROWS;
    const uint8_t* bases[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
        const int64_t p = pixel + row;
        const int64_t ow = p % Shape::OUT_W, oh = p / Shape::OUT_W % Shape::OUT_H, n = p / Shape::OUT_W / Shape::OUT_H;
        bases[row] = x + n * Shape::IMAGE + oh * Shape::STRIDE_H * Shape::ROW + ow * Shape::STRIDE_W * Shape::PIXEL +
            group * (Shape::C / Shape::GROUPS);
    }
    const int vector0 = group * GROUP_VECTORS + column0;
    Ints sums[ROWS][COLUMNS];
    multiply<Shape, ROWS, COLUMNS>(bases, weight + vector0 * VECTOR, sums);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) {
            const int64_t c = (column0 + column) * LANES, p = pixel + row;
            const int lanes = GROUP_OUT % LANES == 0 || c + LANES <= GROUP_OUT ? LANES : GROUP_OUT - c;
            finish<Shape::CHANNELS, Epilogue>(
                sums[row][column], channels + (vector0 + column) * LANES, numbers,
                other + p * Shape::OTHER_PIXEL + group * GROUP_OUT + c, out + p * Shape::OUT_C + group * GROUP_OUT + c,
                lanes);
        }
}

// Runs `task(image, numbers, i)` for every i below `count`, shared among the threads, once the copy of the image is made.
template <class Shape, class Task>
inline void share(const uint8_t* x, const int32_t* channels, int64_t count, const Task& task) {
    constexpr int64_t PADDED_ROWS = (int64_t)Shape::N * Shape::PADDED_HEIGHT;
    const Scalars numbers = scalars<Shape::CHANNELS>(channels);
    const Scratch padded(Shape::COPIED ? PADDED_ROWS * Shape::PADDED_WIDTH * Shape::C : 0);
#pragma omp parallel num_threads(Shape::THREADS ? Shape::THREADS : omp_get_max_threads()) if (Shape::THREADS != 1)
    {
        const uint8_t* image = x;
        if constexpr (Shape::COPIED) {
            image = padded.bytes;
#pragma omp for
            for (int64_t row = 0; row < PADDED_ROWS; ++row) pad_row<Shape>(x, padded.bytes, row, numbers.x_zero_point);
        }
#pragma omp for
        for (int64_t i = 0; i < count; ++i) task(image, numbers, i);
    }
}

template <class Shape, class Epilogue>
inline void convolution(
    const uint8_t* x, const int8_t* weight, const int32_t* channels, const typename Epilogue::Other* other,
    typename Epilogue::Out* out) {
    constexpr int GROUP_VECTORS = Shape::VECTORS / Shape::GROUPS;
    constexpr int64_t PIXELS = (int64_t)Shape::N * Shape::OUT_H * Shape::OUT_W;
    constexpr int64_t TASKS = (PIXELS + Shape::ROWS - 1) / Shape::ROWS *
        ((GROUP_VECTORS + Shape::COLUMNS - 1) / Shape::COLUMNS) * Shape::GROUPS;
    share<Shape>(x, channels, TASKS, [&](const uint8_t* image, const Scalars& numbers, int64_t task) {
        block<Shape, Epilogue>(image, weight, channels, other, out, numbers, task);
    });
}

// --- depthwise convolution ------------------------------------------------------------------------------------------

// LANES channels of four rows of an image, as `dot` takes them; rows from COUNT on are 0.
template <int COUNT>
INDUCTOR_X86Q_INLINE Ints interleave(const uint8_t* address, int64_t row) {
    Ints four = Ints{};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) four |= extend(address + i * row) << (8 * i);
    return four;
}

// COLUMNS neighbouring pixels of LANES channels. Weights lie as [column of the kernel][four rows][channel][4].
template <class Shape, class Epilogue>
INDUCTOR_X86Q_INLINE void depthwise_block(
    const uint8_t* x, const int8_t* weight, const int32_t* channels, const Scalars& numbers,
    typename Epilogue::Out* out) {
    constexpr int COLUMNS = Shape::COLUMNS, FOURS = (Shape::KERNEL_H + 3) / 4;
    constexpr int REACH = (COLUMNS - 1) * Shape::STRIDE_W + (Shape::KERNEL_W - 1) * Shape::DILATION_W + 1;
    Ints sums[COLUMNS];
#pragma GCC unroll 16
    for (int column = 0; column < COLUMNS; ++column) sums[column] = Ints{};
    const auto add = [&](int four, int position, Ints values) INDUCTOR_X86Q_LAMBDA {
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) {
            const int tap = position - column * Shape::STRIDE_W;
            if (tap < 0 || tap % Shape::DILATION_W != 0 || tap / Shape::DILATION_W >= Shape::KERNEL_W) continue;
            const Ints w = load<Ints>(weight + ((int64_t)(tap / Shape::DILATION_W) * FOURS + four) * Shape::C * 4);
            sums[column] = dot<Shape::FITS_16>(sums[column], values, w);
        }
    };
#pragma GCC unroll 64
    for (int position = 0; position < REACH; ++position) {
        const uint8_t* at = x + (int64_t)position * Shape::PIXEL;
#pragma GCC unroll 4
        for (int four = 0; four < Shape::KERNEL_H / 4; ++four)
            add(four, position, interleave<4>(at + four * 4 * Shape::DILATION_H * Shape::ROW, Shape::DILATION_H * Shape::ROW));
        if constexpr (Shape::KERNEL_H % 4 != 0)
            add(FOURS - 1, position,
                interleave<Shape::KERNEL_H % 4>(
                    at + (FOURS - 1) * 4 * Shape::DILATION_H * Shape::ROW, Shape::DILATION_H * Shape::ROW));
    }
#pragma GCC unroll 16
    for (int column = 0; column < COLUMNS; ++column)
        finish<Shape::CHANNELS, Epilogue>(sums[column], channels, numbers, nullptr, out + (int64_t)column * Shape::C, LANES);
}

template <class Shape, class Epilogue>
inline void depthwise_row(
    const uint8_t* x, const int8_t* weight, const int32_t* channels, const Scalars& numbers,
    typename Epilogue::Out* out, int64_t row) {
    const int64_t n = row / Shape::OUT_H, oh = row % Shape::OUT_H;
    const uint8_t* from = x + n * Shape::IMAGE + oh * Shape::STRIDE_H * Shape::ROW;
    typename Epilogue::Out* to = out + row * Shape::OUT_W * Shape::C;
    for (int64_t c = 0; c < Shape::C; c += LANES) {
        // The last vector and the last block begin earlier and compute some outputs twice, instead of being smaller.
        if (c + LANES > Shape::C) c = Shape::C - LANES;
        for (int64_t ow = 0; ow < Shape::OUT_W; ow += Shape::COLUMNS) {
            if (ow + Shape::COLUMNS > Shape::OUT_W) ow = Shape::OUT_W - Shape::COLUMNS;
            depthwise_block<Shape, Epilogue>(
                from + ow * Shape::STRIDE_W * Shape::PIXEL + c, weight + c * 4, channels + c, numbers,
                to + ow * Shape::C + c);
        }
    }
}

template <class Shape, class Epilogue>
inline void depthwise(
    const uint8_t* x, const int8_t* weight, const int32_t* channels, const typename Epilogue::Other*,
    typename Epilogue::Out* out) {
    share<Shape>(x, channels, Shape::N * Shape::OUT_H, [&](const uint8_t* image, const Scalars& numbers, int64_t row) {
        depthwise_row<Shape, Epilogue>(image, weight, channels, numbers, out, row);
    });
}

}  // namespace inductor_x86q
#endif
