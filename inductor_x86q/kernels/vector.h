// Vectors of LANES 32-bit numbers: the compiler's own, and what names instructions as small functions on them.
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

template <class Vector>
X86Q_INLINE Vector load(const void* address) {
    Vector value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class Vector>
X86Q_INLINE void store(void* address, Vector value) {
    std::memcpy(address, &value, sizeof value);
}

// The first `bytes` of a vector, one at least, and 0 behind them.
X86Q_INLINE Ints load_first(const void* address, int bytes) { return (Ints)load_first_bytes(address, bytes); }
X86Q_INLINE void store_first(void* address, Ints value, int bytes) {
    store_first_bytes(address, (Integers)value, bytes);
}

// --- instructions that work on each 128-bit part of a vector by itself ------------------------------------------------

#define X86Q_PARTWISE(name, instruction) \
    X86Q_INLINE Ints name(Ints a, Ints b) { return (Ints)X86Q_MM(instruction)((Integers)a, (Integers)b); }

X86Q_PARTWISE(products_8, maddubs_epi16)   // 16-bit sums of two products, a unsigned and b signed
X86Q_PARTWISE(products_16, madd_epi16)     // 32-bit sums of two products
X86Q_PARTWISE(interleave_low_8, unpacklo_epi8)
X86Q_PARTWISE(interleave_high_8, unpackhi_epi8)
X86Q_PARTWISE(interleave_low_16, unpacklo_epi16)
X86Q_PARTWISE(interleave_high_16, unpackhi_epi16)
X86Q_PARTWISE(interleave_low_32, unpacklo_epi32)
X86Q_PARTWISE(interleave_high_32, unpackhi_epi32)
X86Q_PARTWISE(interleave_low_64, unpacklo_epi64)
X86Q_PARTWISE(interleave_high_64, unpackhi_epi64)
X86Q_PARTWISE(pack_32, packs_epi32)
X86Q_PARTWISE(add_16, add_epi16)
X86Q_PARTWISE(add_saturated_16, adds_epi16)
X86Q_PARTWISE(pack_signed_16, packs_epi16)
X86Q_PARTWISE(pack_unsigned_16, packus_epi16)
X86Q_PARTWISE(minimum_signed_8, min_epi8)
X86Q_PARTWISE(maximum_signed_8, max_epi8)
X86Q_PARTWISE(minimum_unsigned_8, min_epu8)
X86Q_PARTWISE(maximum_unsigned_8, max_epu8)

// --- four products a lane -----------------------------------------------------------------------------------------

// sum + Σ a[4·lane + i]·b[4·lane + i], a unsigned and b signed. FITS_16 promises that the sum of two products fits in
// 16 bits, as it does where activations or weights keep 7 bits. Without either it is exact all the same, and slow.
template <bool FITS_16>
X86Q_INLINE Ints dot(Ints sum, Ints a, Ints b) {
#ifdef X86Q_DOT
    return (Ints)X86Q_DOT((Integers)sum, (Integers)a, (Integers)b);
#else
    if constexpr (FITS_16) return sum + products_16(products_8(a, b), (Ints)(Shorts{} + 1));
    const Ints even = products_16((Ints)((Shorts)a & 255), (Ints)((Shorts)b << 8 >> 8));
    const Ints odd = products_16((Ints)((Shorts)a >> 8 & 255), (Ints)((Shorts)b >> 8));
    return sum + even + odd;
#endif
}

// dot(dot(sum, a, b), c, d) where the sum of the four products of each 16 bits fits there.
X86Q_INLINE Ints dot_pair(Ints sum, Ints a, Ints b, Ints c, Ints d) {
    return sum + products_16(add_16(products_8(a, b), products_8(c, d)), (Ints)(Shorts{} + 1));
}

// --- floats -------------------------------------------------------------------------------------------------------

X86Q_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
X86Q_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// To the nearest integer, ties to even, of |x| < 2^31.
X86Q_INLINE Ints nearest(Floats x) { return (Ints)X86Q_MM(cvtps_epi32)((Singles)x); }

// Steps of a quantized output as its integers, with its zero point added and limited.
X86Q_INLINE Ints quantized(Floats steps, int32_t zero_point, int32_t low, int32_t high) {
    constexpr float MOST = 0x1p30f;  // converting more than 2^31 would change its sign
    const Ints found = nearest(maximum(minimum(steps, Floats{} + MOST), Floats{} - MOST)) + zero_point;
    const Ints above = found < low ? Ints{} + low : found;
    return above > high ? Ints{} + high : above;
}

// a·b + c, rounded once: compilers are forbidden to contract.
X86Q_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)X86Q_MM(fmadd_ps)((Singles)a, (Singles)b, (Singles)c);
}

// 1/x to about 1e-7 of its value, for x from 1 on, and 1/2 exactly, which tanh(0) takes: one step of Newton's, which squares
// an estimate's relative error.
X86Q_INLINE Floats reciprocal(Floats x) {
    const Floats estimate = (Floats)estimated_reciprocal((Singles)x);
    return multiply_add(estimate, multiply_add(-x, estimate, Floats{} + 1.0f), estimate);
}

// How many vectors of exponentials it takes to keep a CPU busy.
constexpr int EXPONENTIALS = 6;

// e^x of N vectors, each to about 2e-7 of its value: 2^n·p(x − n·ln 2), where p is the polynomial of fifth degree with the
// least relative error from −ln(2)/2 to ln(2)/2 that is 1 at 0, so that tanh(0) is 0. It is one long chain of operations,
// hence several side by side: a CPU does not look far enough ahead to find them by itself.
template <int N>
X86Q_INLINE void exponentials(Floats (&x)[N]) {
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

// v·Φ(v) from e^(-v²/2).
X86Q_INLINE Floats gelu(Floats v, Floats e) {
    constexpr float POLYNOMIAL[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    const Floats t = reciprocal(1.0f + 0.23164189f * maximum(v, -v));
    Floats p = Floats{} + 1.061405429f;
    for (const float factor : POLYNOMIAL) p = multiply_add(p, t, Floats{} + factor);
    const Floats rest = 0.5f * v * p * t * e;  // v times what lies beyond |v|
    return v > 0.0f ? v - rest : rest;
}

// The upper half of a float.
struct Bfloat16 { uint16_t bits; };

X86Q_INLINE Ints extend(const uint8_t* address) { return (Ints)extend_bytes(address); }
X86Q_INLINE Ints extend(const int8_t* address) { return ((Ints)extend_bytes(address) ^ 128) - 128; }

template <class T>
X86Q_INLINE Floats widen(const T* address) {
    if constexpr (std::is_same_v<T, float>) {
        return load<Floats>(address);
    } else if constexpr (std::is_same_v<T, Bfloat16>) {
        return (Floats)((Ints)extend_shorts(address) << 16);
    } else {
        return __builtin_convertvector(extend(address), Floats);
    }
}

X86Q_INLINE void store_floats(float* address, Floats value) { store(address, value); }

// To the nearest, ties to even.
X86Q_INLINE void store_floats(Bfloat16* address, Floats value) {
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    const Words bits = (Words)value, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    store_shorts(address, (Integers)(value == value ? rounded : Words{} + 0x7FC0));
}
