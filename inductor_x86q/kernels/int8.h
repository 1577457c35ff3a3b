// int8 convolution for x86, written into the generated code of every kernel that uses it.
//
// All shapes are compile-time constants of a struct (`Shape`), so that each instance is a kernel for one layer. Values are
// the compiler's vectors of LANES 32-bit numbers; what names instructions is small functions on them, up to `finish`.
// Whoever includes this defines INDUCTOR_X86Q_LANES as 8 or 16; a file may include it for both, each is a namespace.
#include <immintrin.h>
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#define INDUCTOR_X86Q_JOINED(prefix, number) prefix##number
#define INDUCTOR_X86Q_NAMESPACE(number) INDUCTOR_X86Q_JOINED(lanes_, number)
namespace inductor_x86q {
namespace INDUCTOR_X86Q_NAMESPACE(INDUCTOR_X86Q_LANES) {

#define INDUCTOR_X86Q_INLINE inline __attribute__((always_inline))
#define INDUCTOR_X86Q_LAMBDA __attribute__((always_inline))

constexpr int LANES = INDUCTOR_X86Q_LANES;
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

// The first BYTES of a vector, and 0 behind them.
template <int BYTES>
INDUCTOR_X86Q_INLINE Ints load_first(const void* address) {
    if constexpr (BYTES == 4 * LANES) return load<Ints>(address);
#if INDUCTOR_X86Q_LANES == 16 && defined(__AVX512BW__)
    return (Ints)_mm512_maskz_loadu_epi8(~0ull >> (64 - BYTES), address);
#elif INDUCTOR_X86Q_LANES == 8 && defined(__AVX512BW__) && defined(__AVX512VL__)
    return (Ints)_mm256_maskz_loadu_epi8(~0u >> (32 - BYTES), address);
#else
    Ints value = {};
    std::memcpy(&value, address, BYTES);
    return value;
#endif
}

INDUCTOR_X86Q_INLINE void store_first(void* address, Ints value, int bytes) {
#if INDUCTOR_X86Q_LANES == 16 && defined(__AVX512BW__)
    _mm512_mask_storeu_epi8(address, ~0ull >> (64 - bytes), (__m512i)value);
#elif INDUCTOR_X86Q_LANES == 8 && defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi8(address, ~0u >> (32 - bytes), (__m256i)value);
#else
    std::memcpy(address, &value, bytes);
#endif
}

// --- instructions that work on each 128-bit part of a vector by itself ------------------------------------------------

#if INDUCTOR_X86Q_LANES == 8
#define INDUCTOR_X86Q_PARTWISE(name, instruction) \
    INDUCTOR_X86Q_INLINE Ints name(Ints a, Ints b) { return (Ints)_mm256_##instruction((__m256i)a, (__m256i)b); }
#elif defined(__AVX512BW__)
#define INDUCTOR_X86Q_PARTWISE(name, instruction) \
    INDUCTOR_X86Q_INLINE Ints name(Ints a, Ints b) { return (Ints)_mm512_##instruction((__m512i)a, (__m512i)b); }
#else
#define INDUCTOR_X86Q_PARTWISE(name, instruction)                                                              \
    INDUCTOR_X86Q_INLINE Ints name(Ints a, Ints b) {                                                           \
        struct Halves { __m256i part[2]; };                                                                    \
        Halves x = load<Halves>(&a), y = load<Halves>(&b);                                                     \
        for (int i = 0; i < 2; ++i) x.part[i] = _mm256_##instruction(x.part[i], y.part[i]);                    \
        return load<Ints>(&x);                                                                                 \
    }
#endif

INDUCTOR_X86Q_PARTWISE(products_8, maddubs_epi16)   // 16-bit sums of two products, a unsigned and b signed
INDUCTOR_X86Q_PARTWISE(products_16, madd_epi16)     // 32-bit sums of two products
INDUCTOR_X86Q_PARTWISE(interleave_low_8, unpacklo_epi8)
INDUCTOR_X86Q_PARTWISE(interleave_high_8, unpackhi_epi8)
INDUCTOR_X86Q_PARTWISE(interleave_low_16, unpacklo_epi16)
INDUCTOR_X86Q_PARTWISE(interleave_high_16, unpackhi_epi16)
INDUCTOR_X86Q_PARTWISE(pack_32, packs_epi32)
INDUCTOR_X86Q_PARTWISE(add_16, add_epi16)
INDUCTOR_X86Q_PARTWISE(add_saturated_16, adds_epi16)
INDUCTOR_X86Q_PARTWISE(pack_signed_16, packs_epi16)
INDUCTOR_X86Q_PARTWISE(pack_unsigned_16, packus_epi16)
INDUCTOR_X86Q_PARTWISE(minimum_signed_8, min_epi8)
INDUCTOR_X86Q_PARTWISE(maximum_signed_8, max_epi8)
INDUCTOR_X86Q_PARTWISE(minimum_unsigned_8, min_epu8)
INDUCTOR_X86Q_PARTWISE(maximum_unsigned_8, max_epu8)

// Part j of vector i goes to place PARTS·i + j, where `pack` leaves it at 4·j + i (both counted in 32-bit numbers).
INDUCTOR_X86Q_INLINE Ints parts_in_a_row(Ints x) {
#if INDUCTOR_X86Q_LANES == 8
    return (Ints)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#elif defined(__AVX512F__)
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (Ints)_mm512_permutexvar_epi32(places, (__m512i)x);
#else
    Ints result = x;
    for (int i = 0; i < LANES; ++i) result[i] = x[i % 4 * 4 + i / 4];
    return result;
#endif
}

// --- four products a lane -----------------------------------------------------------------------------------------

typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// sum + Σ a[4·lane + i]·b[4·lane + i], a unsigned and b signed. FITS_16 promises that the sum of two products fits in
// 16 bits, as it does where activations or weights keep 7 bits.
template <bool FITS_16>
INDUCTOR_X86Q_INLINE Ints dot(Ints sum, Ints a, Ints b) {
#if INDUCTOR_X86Q_LANES == 16 && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif INDUCTOR_X86Q_LANES == 8 && defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (Ints)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif INDUCTOR_X86Q_LANES == 8 && defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    if constexpr (FITS_16) return sum + products_16(products_8(a, b), (Ints)(Shorts{} + 1));
    const Ints even = products_16((Ints)((Shorts)a & 255), (Ints)((Shorts)b << 8 >> 8));
    const Ints odd = products_16((Ints)((Shorts)a >> 8 & 255), (Ints)((Shorts)b >> 8));
    return sum + even + odd;
#endif
}

// dot(dot(sum, a, b), c, d) where the sum of the four products of each 16 bits fits there.
INDUCTOR_X86Q_INLINE Ints dot_pair(Ints sum, Ints a, Ints b, Ints c, Ints d) {
    return sum + products_16(add_16(products_8(a, b), products_8(c, d)), (Ints)(Shorts{} + 1));
}

// --- from the integer sum to the output ---------------------------------------------------------------------------

INDUCTOR_X86Q_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
INDUCTOR_X86Q_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// To the nearest integer, ties to even, of |x| < 2^31.
INDUCTOR_X86Q_INLINE Ints nearest(Floats x) {
#if INDUCTOR_X86Q_LANES == 8
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#elif defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#else
    struct Halves { __m256 part[2]; } halves = load<Halves>(&x);
    struct { __m256i part[2]; } result = {_mm256_cvtps_epi32(halves.part[0]), _mm256_cvtps_epi32(halves.part[1])};
    return load<Ints>(&result);
#endif
}

// a·b + c, rounded once where the CPU can: Inductor forbids compilers to contract.
INDUCTOR_X86Q_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if INDUCTOR_X86Q_LANES == 8 && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif INDUCTOR_X86Q_LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// One step of Newton's towards 1/x, which squares an estimate's relative error.
INDUCTOR_X86Q_INLINE Floats refine(Floats x, Floats estimate) {
    return multiply_add(estimate, multiply_add(-x, estimate, Floats{} + 1.0f), estimate);
}

// 1/x to about 1e-7 of its value, for x from 1 on, and 1/2 exactly, which tanh(0) takes: from an estimate of 12 or 14 bits.
INDUCTOR_X86Q_INLINE Floats reciprocal(Floats x) {
#if INDUCTOR_X86Q_LANES == 8 && defined(__AVX512VL__)
    return refine(x, (Floats)_mm256_rcp14_ps((__m256)x));
#elif INDUCTOR_X86Q_LANES == 8
    return refine(x, refine(x, (Floats)_mm256_rcp_ps((__m256)x)));
#elif defined(__AVX512F__)
    return refine(x, (Floats)_mm512_rcp14_ps((__m512)x));
#else
    return 1.0f / x;
#endif
}

// How many vectors of exponentials it takes to keep a CPU busy.
constexpr int EXPONENTIALS = 6;

// e^x of N vectors, each to about 2e-7 of its value: 2^n·p(x − n·ln 2), where p is the polynomial of fifth degree with the
// least relative error from −ln(2)/2 to ln(2)/2 that is 1 at 0, so that tanh(0) is 0. It is one long chain of operations,
// hence several side by side: a CPU does not look far enough ahead to find them by itself.
template <int N>
INDUCTOR_X86Q_INLINE void exponentials(Floats (&x)[N]) {
    constexpr float POLYNOMIAL[] = {4.1897975e-2f, 1.6667637e-1f, 4.999915e-1f, 9.999997e-1f, 1.0f};
    constexpr float ROUNDING = 12582912.0f;  // 1.5·2^23: what is added to it is rounded, and lies in its lowest bits
    Floats n[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = minimum(maximum(x[i], Floats{} - 87.0f), Floats{} + 88.0f);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) n[i] = multiply_add(x[i], Floats{} + 1.44269504f, Floats{} + ROUNDING);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = multiply_add(n[i] - ROUNDING, Floats{} - 0.693147181f, x[i]), p[i] = Floats{} + 8.290307e-3f;
#pragma GCC unroll 8
    for (const float factor : POLYNOMIAL)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) p[i] = multiply_add(p[i], x[i], Floats{} + factor);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = (Floats)((Ints)p[i] + ((Ints)n[i] << 23));  // p is near 1: its exponent does not overflow
}

// LANES bytes as integers. Compilers take a conversion of so short vectors apart, hence the instructions by name.
INDUCTOR_X86Q_INLINE Ints extend(const uint8_t* address) {
#if INDUCTOR_X86Q_LANES == 8
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)address));
#elif defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)address));
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
    float inverse_scale;  // of the output
    int32_t zero_point, low, high;  // of the output's integers
    float other_scale, other_zero_point;
    float first, second;  // of the activation
    int32_t x_zero_point;
};

// A layer's constants: per output channel the compensation of the input's zero point (int32), the scale and the bias,
// STRIDE apart, behind them the scalars, and at the next whole ALIGNMENT the packed weight.
template <int STRIDE>
INDUCTOR_X86Q_INLINE Scalars scalars(const int32_t* channels) { return load<Scalars>(channels + 3 * STRIDE); }

template <int STRIDE>
INDUCTOR_X86Q_INLINE const int8_t* packed_weight(const int32_t* channels) {
    constexpr int64_t ALIGNMENT = 64, NUMBERS = 3 * 4 * (int64_t)STRIDE + sizeof(Scalars);
    return (const int8_t*)channels + (NUMBERS + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

// VECTORS vectors of integers as bytes, part 0 of each vector first, then part 1, ...; with the zero point added, and limited.
template <int VECTORS, bool SIGNED>
INDUCTOR_X86Q_INLINE Ints pack(const Ints* x, const Scalars& scalars) {
    const Ints zero_points = Ints{} + (int32_t)((scalars.zero_point & 0xFFFF) * 0x10001u);
    const Ints least = Ints{} + (int32_t)((scalars.low & 0xFF) * 0x1010101u);
    const Ints greatest = Ints{} + (int32_t)((scalars.high & 0xFF) * 0x1010101u);
    const Ints front = add_saturated_16(pack_32(x[0], x[VECTORS > 1 ? 1 : 0]), zero_points);
    const Ints back =
        VECTORS > 2 ? add_saturated_16(pack_32(x[VECTORS > 2 ? 2 : 0], x[VECTORS > 3 ? 3 : 0]), zero_points) : front;
    if constexpr (SIGNED) return maximum_signed_8(minimum_signed_8(pack_signed_16(front, back), greatest), least);
    return maximum_unsigned_8(minimum_unsigned_8(pack_unsigned_16(front, back), greatest), least);
}

// The values of a pixel's VECTORS vectors of channels, of which `count` are wanted: dequantized, biased, and with the other
// operand added.
template <class Shape, class Epilogue, int VECTORS>
INDUCTOR_X86Q_INLINE void dequantize(
    const Ints* sums, const int32_t* channels, const Scalars& scalars, const typename Epilogue::Other* other, int count,
    Floats* values) {
    typename Epilogue::Other some_other[VECTORS * LANES];
    if (Epilogue::HAS_OTHER && count < VECTORS * LANES) {
        std::memcpy(some_other, other, count * sizeof *other);
        other = some_other;
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        const int32_t* here = channels + i * LANES;
        values[i] = multiply_add(
            __builtin_convertvector(sums[i], Floats), load<Floats>(here + Shape::CHANNELS),
            load<Floats>(here + 2 * Shape::CHANNELS));
        if constexpr (Epilogue::HAS_OTHER) {
            const Floats others = widen(other + i * LANES) - scalars.other_zero_point;
            values[i] = multiply_add(others, Floats{} + scalars.other_scale, values[i]);
        }
    }
}

// Stores the first `count` of a pixel's channels, quantized. They lie one after the other if IN_A_ROW, else as `interleave`
// gives them, which is how `pack` takes them.
template <class Epilogue, int VECTORS, bool IN_A_ROW>
INDUCTOR_X86Q_INLINE void quantize(
    const Floats* values, const Scalars& scalars, typename Epilogue::Out* out, int count) {
    typedef typename Epilogue::Out Out;
    constexpr int FULL = VECTORS * LANES;
    constexpr bool HAS_FLOATS = Epilogue::HAS_OTHER && std::is_same_v<typename Epilogue::Other, float>;
    Out some[FULL];
    [[maybe_unused]] Out* to = count < FULL ? some : out;
    Ints steps[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        Floats value = values[i];
        if constexpr (!std::is_same_v<Out, float>) {
            if constexpr (!Epilogue::IN_STEPS) value *= scalars.inverse_scale;
            // What only this kernel has computed has less than 2^30 steps; converting more than 2^31 would change its sign.
            if constexpr (HAS_FLOATS) value = minimum(value, Floats{} + 0x1p30f);
            steps[i] = nearest(value);
        } else if constexpr (IN_A_ROW) {
            store(to + i * LANES, value);
        } else {
            struct Parts { __m128 part[LANES / 4]; } parts = load<Parts>(&value);
            for (int part = 0; part < LANES / 4; ++part) store(to + part * 16 + i * 4, parts.part[part]);
        }
    }
    if constexpr (!std::is_same_v<Out, float>) {
        const Ints packed = pack<VECTORS, std::is_signed_v<Out>>(steps, scalars);
        const Ints bytes = IN_A_ROW ? parts_in_a_row(packed) : packed;
        if (count < FULL) {
            store_first(out, bytes, count);
        } else {
            std::memcpy(out, &bytes, FULL);
        }
    } else if (count < FULL) {
        std::memcpy(out, some, count * sizeof(Out));
    }
}

// The output of PIXELS neighbouring pixels from their sums on.
template <class Shape, class Epilogue, int PIXELS, int VECTORS, bool IN_A_ROW>
INDUCTOR_X86Q_INLINE void finish(
    const Ints (*sums)[VECTORS], const int32_t* channels, const Scalars& scalars, const typename Epilogue::Other* other,
    typename Epilogue::Out* out, int count) {
    Floats values[PIXELS * VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i)
        dequantize<Shape, Epilogue, VECTORS>(
            sums[i], channels, scalars, other + i * Shape::OTHER_PIXEL, count, values + i * VECTORS);
    if constexpr (!Epilogue::IN_STEPS) Epilogue::activate(values, scalars);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i)
        quantize<Epilogue, VECTORS, IN_A_ROW>(values + i * VECTORS, scalars, out + i * Shape::OUT_PIXEL, count);
}

// All ROWS pixels of a block, as many together as it takes to hide how long an exponential takes.
template <class Shape, class Epilogue, int ROWS, int VECTORS, bool IN_A_ROW>
INDUCTOR_X86Q_INLINE void finish_all(
    const Ints (&sums)[ROWS][VECTORS], const int32_t* channels, const Scalars& scalars,
    const typename Epilogue::Other* other, typename Epilogue::Out* out, int count) {
    constexpr int WANTED = Epilogue::EXPONENTIAL ? (EXPONENTIALS + VECTORS - 1) / VECTORS : 1;
    constexpr int TOGETHER = WANTED < ROWS ? WANTED : ROWS, WHOLE = ROWS / TOGETHER * TOGETHER;
#pragma GCC unroll 16
    for (int row = 0; row < WHOLE; row += TOGETHER)
        finish<Shape, Epilogue, TOGETHER, VECTORS, IN_A_ROW>(
            sums + row, channels, scalars, other + row * Shape::OTHER_PIXEL, out + row * Shape::OUT_PIXEL, count);
    if constexpr (WHOLE < ROWS)
        finish<Shape, Epilogue, ROWS - WHOLE, VECTORS, IN_A_ROW>(
            sums + WHOLE, channels, scalars, other + WHOLE * Shape::OTHER_PIXEL, out + WHOLE * Shape::OUT_PIXEL, count);
}

// --- convolution as a matrix product over runs of contiguous bytes --------------------------------------------------

template <class Shape>
INDUCTOR_X86Q_INLINE Ints broadcast(const uint8_t* address, int bytes) {
    uint32_t four = 0;
    std::memcpy(&four, address, bytes);
    if constexpr (Shape::SIGNED) four ^= 0x80808080u;  // s8 as u8; the zero point moves along
    return Ints{} + (int32_t)four;
}

template <bool WRITTEN_OUT, class Body>
INDUCTOR_X86Q_INLINE void each(int first, int end, const Body& body) {
    if constexpr (WRITTEN_OUT) {
#pragma GCC unroll 32
        for (int i = first; i < end; ++i) body(i);
    } else {
#pragma GCC unroll 1
        for (int i = first; i < end; ++i) body(i);
    }
}

// The bytes of a vector's weights: each run is filled up to whole fours.
template <class Shape>
constexpr int64_t VECTOR_BYTES = (int64_t)Shape::RUNS * ((Shape::RUN + 3) / 4) * 4 * LANES;

// ROWS output pixels by COLUMNS vectors of output channels. A pixel's inputs are RUNS runs of RUN bytes; run r starts
// at Shape::run(r) from the pixel's base. Weights lie as [vector][run][four bytes of the run][lane][4]. Where the CPU adds
// products in 16 bits, `overflows` has a byte for each pair of fours of a vector: whether four products may exceed 16 bits.
template <class Shape, int ROWS, int COLUMNS>
INDUCTOR_X86Q_INLINE void multiply(
    const uint8_t* const* bases, const int8_t* weight, const int8_t* overflows, const int32_t* channels,
    Ints (&sums)[ROWS][COLUMNS]) {
    constexpr int FOURS = (Shape::RUN + 3) / 4, WHOLE = Shape::RUN / 4, REST = Shape::RUN % 4;
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) sums[row][column] = load<Ints>(channels + column * LANES);
    const auto step = [&](const int8_t* here, int64_t offset, int bytes) INDUCTOR_X86Q_LAMBDA {
        Ints b[COLUMNS];
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) b[column] = load<Ints>(here + column * VECTOR_BYTES<Shape>);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Ints a = broadcast<Shape>(bases[row] + offset, bytes);
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column)
                sums[row][column] = dot<Shape::FITS_16>(sums[row][column], a, b[column]);
        }
    };
    const auto pair = [&](const int8_t* here, int64_t offset) INDUCTOR_X86Q_LAMBDA {
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Ints a = broadcast<Shape>(bases[row] + offset, 4), c = broadcast<Shape>(bases[row] + offset + 4, 4);
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column) {
                const int8_t* there = here + column * VECTOR_BYTES<Shape>;
                sums[row][column] = dot_pair(sums[row][column], a, load<Ints>(there), c, load<Ints>(there + 4 * LANES));
            }
        }
    };
    // A kernel of some rows has few enough bytes in each to be written out: no counting, and all offsets are constants.
    constexpr bool SHORT = Shape::RUNS > 1 && Shape::RUNS * FOURS <= 32;
    each<SHORT>(0, Shape::RUNS, [&](int run) INDUCTOR_X86Q_LAMBDA {
        const int64_t start = Shape::run(run);
        const int8_t* here = weight + (int64_t)run * FOURS * 4 * LANES;
        const auto four = [&](int i) INDUCTOR_X86Q_LAMBDA { step(here + i * 4 * LANES, start + i * 4, 4); };
        each<SHORT>(0, Shape::PAIRS, [&](int i) INDUCTOR_X86Q_LAMBDA {
            int8_t overflow = 0;
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column)
                overflow |= overflows[(column * Shape::RUNS + run) * Shape::PAIRS + i];
            if (__builtin_expect(overflow, 0)) {
                four(2 * i);
                four(2 * i + 1);
            } else {
                pair(here + 2 * i * 4 * LANES, start + 2 * i * 4);
            }
        });
        each<SHORT>(2 * Shape::PAIRS, WHOLE, four);
        if constexpr (REST != 0) step(here + WHOLE * 4 * LANES, start + WHOLE * 4, REST);
    });
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

// The image with the zero point around it, channels and pixels without gaps.
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
    if constexpr (Shape::X_CHANNEL != 1) {
        for (int64_t w = 0; w < Shape::W; ++w)
#pragma GCC unroll 4
            for (int64_t c = 0; c < Shape::C; ++c)
                inner[w * Shape::C + c] = from[w * Shape::X_PIXEL + c * Shape::X_CHANNEL];
    } else if constexpr (Shape::X_PIXEL == Shape::C) {
        std::memcpy(inner, from, Shape::W * Shape::C);
    } else {
        for (int64_t w = 0; w < Shape::W; ++w) std::memcpy(inner + w * Shape::C, from + w * Shape::X_PIXEL, Shape::C);
    }
    inner += Shape::W * Shape::C;
    std::memset(inner, zero_point, to + WIDTH - inner);
}

// The panels of weights that a pass over the pixels takes: as many as stay in the L1 cache beside them.
constexpr int64_t PASS_BYTES = 16384;

template <class Shape>
struct Blocks {
    static constexpr int GROUP_VECTORS = Shape::VECTORS / Shape::GROUPS;
    static constexpr int64_t PIXELS = (int64_t)Shape::N * Shape::OUT_H * Shape::OUT_W;
    static constexpr int64_t COUNT = (PIXELS + Shape::ROWS - 1) / Shape::ROWS;
    static constexpr int64_t PANELS = (GROUP_VECTORS + Shape::COLUMNS - 1) / Shape::COLUMNS;
    static constexpr int64_t FITTING = PASS_BYTES / (Shape::COLUMNS * VECTOR_BYTES<Shape>);
    static constexpr int64_t TOGETHER = FITTING < 1 ? 1 : FITTING < PANELS ? FITTING : PANELS;
    static constexpr int64_t PASSES = (PANELS + TOGETHER - 1) / TOGETHER;
    // Whether output pixel p reads from p·PIXEL on.
    static constexpr bool ONE_TO_ONE = Shape::KERNEL_H * Shape::KERNEL_W * Shape::STRIDE_H * Shape::STRIDE_W == 1 &&
        Shape::ROW == Shape::OUT_W * Shape::PIXEL && Shape::IMAGE == Shape::OUT_H * Shape::ROW;

    static INDUCTOR_X86Q_INLINE int64_t base(int64_t p) {
        if constexpr (ONE_TO_ONE) return p * Shape::PIXEL;
        const int64_t ow = p % Shape::OUT_W, oh = p / Shape::OUT_W % Shape::OUT_H, n = p / Shape::OUT_W / Shape::OUT_H;
        return n * Shape::IMAGE + oh * Shape::STRIDE_H * Shape::ROW + ow * Shape::STRIDE_W * Shape::PIXEL;
    }
};

// One block of pixels by the panels of one pass. The last panel and the last block begin earlier and compute some
// outputs twice, instead of being smaller.
template <class Shape, class Epilogue>
inline void block(
    const uint8_t* x, const int8_t* weight, const int32_t* channels, const typename Epilogue::Other* other,
    typename Epilogue::Out* out, const Scalars& numbers, int64_t task) {
    typedef Blocks<Shape> Blocks;
    constexpr int ROWS = Shape::ROWS, COLUMNS = Shape::COLUMNS, GROUP_OUT = Shape::OUT_C / Shape::GROUPS;
    const int64_t group = task / Blocks::COUNT / Blocks::PASSES, pass = task / Blocks::COUNT % Blocks::PASSES;
    int64_t pixel = task % Blocks::COUNT * ROWS;
    if (pixel + ROWS > Blocks::PIXELS) pixel = Blocks::PIXELS - ROWS;
    const uint8_t* bases[ROWS];
    const uint8_t* channel = x + group * (Shape::C / Shape::GROUPS);
    const uint8_t* base = channel + Blocks::base(pixel);
    int64_t left = Shape::OUT_W - pixel % Shape::OUT_W;  // pixels of the row
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
        bases[row] = base;
        base += Shape::STRIDE_W * Shape::PIXEL;
        if constexpr (!Blocks::ONE_TO_ONE) {
            if (--left == 0) {
                base = channel + Blocks::base(pixel + row + 1);
                left = Shape::OUT_W;
            }
        }
    }
    const int64_t end = (pass + 1) * Blocks::TOGETHER < Blocks::PANELS ? (pass + 1) * Blocks::TOGETHER : Blocks::PANELS;
    for (int64_t panel = pass * Blocks::TOGETHER; panel < end; ++panel) {
        const int64_t last = Blocks::GROUP_VECTORS - COLUMNS, wanted = panel * COLUMNS;
        const int64_t column = wanted < last ? wanted : last, vector = group * Blocks::GROUP_VECTORS + column;
        Ints sums[ROWS][COLUMNS];
        const int8_t* overflows = weight + Shape::VECTORS * VECTOR_BYTES<Shape> + vector * Shape::RUNS * Shape::PAIRS;
        multiply<Shape, ROWS, COLUMNS>(
            bases, weight + vector * VECTOR_BYTES<Shape>, overflows, channels + vector * LANES, sums);
        const int64_t c = column * LANES, rest = GROUP_OUT - c;
        const int count = GROUP_OUT % LANES == 0 || rest > COLUMNS * LANES ? COLUMNS * LANES : rest;
        finish_all<Shape, Epilogue, ROWS, COLUMNS, true>(
            sums, channels + vector * LANES, numbers, other + pixel * Shape::OTHER_PIXEL + group * GROUP_OUT + c,
            out + pixel * Shape::OUT_PIXEL + group * GROUP_OUT + c, count);
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
    const uint8_t* x, const int32_t* channels, const typename Epilogue::Other* other, typename Epilogue::Out* out) {
    const int8_t* weight = packed_weight<Shape::CHANNELS>(channels);
    constexpr int64_t TASKS = Blocks<Shape>::COUNT * Blocks<Shape>::PASSES * Shape::GROUPS;
    share<Shape>(x, channels, TASKS, [&](const uint8_t* image, const Scalars& numbers, int64_t task) {
        block<Shape, Epilogue>(image, weight, channels, other, out, numbers, task);
    });
}

// --- depthwise convolution ------------------------------------------------------------------------------------------

// Four rows of WIDTH channels as `dot` takes them, each channel's four bytes together; rows from COUNT on are 0. Vector i
// gets the channels 16·part + 4·i to 16·part + 4·i + 3 as its part of that number.
template <int COUNT, int WIDTH>
INDUCTOR_X86Q_INLINE void interleave(const uint8_t* const* rows, Ints (&values)[4]) {
    Ints row[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) row[i] = load_first<WIDTH>(rows[i]);
    const Ints low = interleave_low_8(row[0], row[1]), high = interleave_high_8(row[0], row[1]);
    const Ints next_low = interleave_low_8(row[2], row[3]), next_high = interleave_high_8(row[2], row[3]);
    values[0] = interleave_low_16(low, next_low);
    values[1] = interleave_high_16(low, next_low);
    values[2] = interleave_low_16(high, next_high);
    values[3] = interleave_high_16(high, next_high);
}

template <class Shape>
struct Taps {
    static constexpr int FOURS = (Shape::KERNEL_H + 3) / 4;
    // How many columns of the image a block of pixels reads.
    static constexpr int REACH =
        (Shape::COLUMNS - 1) * Shape::STRIDE_W + (Shape::KERNEL_W - 1) * Shape::DILATION_W + 1;
};

// COLUMNS neighbouring output pixels of 4·LANES channels, the first of which reads from `column` on. `rows` are the rows
// of the image that the kernel covers. What lies beside the image (EDGE: something may) is read from `padding`.
// Weights lie as [column of the kernel][four rows][vector][lane][4].
template <class Shape, class Epilogue, bool EDGE>
INDUCTOR_X86Q_INLINE void depthwise_block(
    const uint8_t* const* rows, const uint8_t* padding, int64_t column, const int8_t* weight, const int32_t* channels,
    const Scalars& numbers, typename Epilogue::Out* out) {
    constexpr int COLUMNS = Shape::COLUMNS, FOURS = Taps<Shape>::FOURS, REACH = Taps<Shape>::REACH;
    constexpr int WIDTH = Shape::C < 4 * LANES ? Shape::C : 4 * LANES;
    Ints sums[COLUMNS][4];
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; ++i)
#pragma GCC unroll 4
        for (int vector = 0; vector < 4; ++vector) sums[i][vector] = load<Ints>(channels + vector * LANES);
    const auto add = [&](int position, int four, const Ints (&values)[4]) INDUCTOR_X86Q_LAMBDA {
#pragma GCC unroll 16
        for (int i = 0; i < COLUMNS; ++i) {
            const int tap = position - i * Shape::STRIDE_W;
            if (tap < 0 || tap % Shape::DILATION_W != 0 || tap / Shape::DILATION_W >= Shape::KERNEL_W) continue;
            const int8_t* here = weight + (tap / Shape::DILATION_W * FOURS + four) * 16 * LANES;
#pragma GCC unroll 4
            for (int vector = 0; vector < 4; ++vector)
                sums[i][vector] = dot<Shape::FITS_16>(sums[i][vector], values[vector], load<Ints>(here + vector * 4 * LANES));
        }
    };
#pragma GCC unroll 64
    for (int position = 0; position < REACH; ++position) {
        const uint8_t* at[FOURS * 4];
#pragma GCC unroll 16
        for (int row = 0; row < Shape::KERNEL_H; ++row)
            at[row] = EDGE && (uint64_t)(column + position) >= (uint64_t)Shape::W
                ? padding
                : rows[row] + (column + position) * Shape::PIXEL;
        Ints values[4];
#pragma GCC unroll 4
        for (int four = 0; four < Shape::KERNEL_H / 4; ++four) {
            interleave<4, WIDTH>(at + four * 4, values);
            add(position, four, values);
        }
        if constexpr (Shape::KERNEL_H % 4 != 0) {
            interleave<Shape::KERNEL_H % 4, WIDTH>(at + (FOURS - 1) * 4, values);
            add(position, FOURS - 1, values);
        }
    }
    finish_all<Shape, Epilogue, COLUMNS, 4, false>(sums, channels, numbers, nullptr, out, WIDTH);
}

// A row of the output. The last channels and the last block of pixels begin earlier and compute some outputs twice,
// instead of being fewer. `padding` holds a row of zero points.
template <class Shape, class Epilogue>
inline void depthwise_row(
    const uint8_t* x, const uint8_t* padding, const int8_t* weight, const int32_t* channels, const Scalars& numbers,
    typename Epilogue::Out* out, int64_t row) {
    constexpr int COLUMNS = Shape::COLUMNS, BLOCK = 4 * LANES;
    const int64_t n = row / Shape::OUT_H, top = row % Shape::OUT_H * Shape::STRIDE_H - Shape::PAD_H;
    for (int64_t block = 0; block < Shape::CHANNELS / BLOCK; ++block) {
        const int64_t c = block * BLOCK + BLOCK <= Shape::C || Shape::C < BLOCK ? block * BLOCK : Shape::C - BLOCK;
        const uint8_t* rows[Shape::KERNEL_H];
#pragma GCC unroll 16
        for (int i = 0; i < Shape::KERNEL_H; ++i) {
            const int64_t h = top + i * Shape::DILATION_H;
            rows[i] = (h < 0 || h >= Shape::H ? padding : x + n * Shape::IMAGE + h * Shape::ROW) + c;
        }
        const int8_t* taps = weight + block * Shape::KERNEL_W * Taps<Shape>::FOURS * 4 * BLOCK;
        typename Epilogue::Out* to = out + row * Shape::OUT_W * Shape::OUT_PIXEL + c;
        for (int64_t ow = 0; ow < Shape::OUT_W; ow += COLUMNS) {
            if (ow + COLUMNS > Shape::OUT_W) ow = Shape::OUT_W - COLUMNS;
            const int64_t column = ow * Shape::STRIDE_W - Shape::PAD_W;
            if (column < 0 || column + Taps<Shape>::REACH > Shape::W) {
                depthwise_block<Shape, Epilogue, true>(
                    rows, padding + c, column, taps, channels + block * BLOCK, numbers, to + ow * Shape::OUT_PIXEL);
            } else {
                depthwise_block<Shape, Epilogue, false>(
                    rows, padding + c, column, taps, channels + block * BLOCK, numbers, to + ow * Shape::OUT_PIXEL);
            }
        }
    }
}

template <class Shape, class Epilogue>
inline void depthwise(
    const uint8_t* x, const int32_t* channels, const typename Epilogue::Other*, typename Epilogue::Out* out) {
    const int8_t* weight = packed_weight<Shape::CHANNELS>(channels);
    constexpr int64_t PADDING = Shape::PAD_H || Shape::PAD_W ? Shape::W * Shape::PIXEL : 0;
    const Scratch padding(PADDING);
    if (PADDING) std::memset(padding.bytes, scalars<Shape::CHANNELS>(channels).x_zero_point, PADDING);
    share<Shape>(x, channels, Shape::N * Shape::OUT_H, [&](const uint8_t* image, const Scalars& numbers, int64_t row) {
        depthwise_row<Shape, Epilogue>(image, padding.bytes, weight, channels, numbers, out, row);
    });
}

#undef INDUCTOR_X86Q_PARTWISE
}
}  // namespace inductor_x86q
