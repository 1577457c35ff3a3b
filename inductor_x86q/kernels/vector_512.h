// What vectors of 512 bits name differently from those of 256.
constexpr int LANES = 16;
#define X86Q_MM(name) _mm512_##name
typedef __m512i Integers;
typedef __m512 Singles;

// Part j of vector i goes to place PARTS·i + j, where `pack` leaves it at 4·j + i (both counted in 32-bit numbers).
X86Q_INLINE Integers parts_in_a_row(Integers x) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

// LANES bytes as integers. Compilers take a conversion of so short vectors apart, hence the instructions by name.
X86Q_INLINE Integers extend_bytes(const void* address) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)address));
}

// LANES shorts as integers.
X86Q_INLINE Integers extend_shorts(const void* address) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)address));
}

// 16 bytes for each part, which lie `stride` apart.
X86Q_INLINE Integers load_parts(const uint8_t* address, int64_t stride) {
    Integers value = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)address));
    value = _mm512_inserti32x4(value, _mm_loadu_si128((const __m128i*)(address + stride)), 1);
    value = _mm512_inserti32x4(value, _mm_loadu_si128((const __m128i*)(address + 2 * stride)), 2);
    return _mm512_inserti32x4(value, _mm_loadu_si128((const __m128i*)(address + 3 * stride)), 3);
}

X86Q_INLINE void store_parts(uint8_t* address, int64_t stride, Integers value) {
    _mm_storeu_si128((__m128i*)address, _mm512_castsi512_si128(value));
    _mm_storeu_si128((__m128i*)(address + stride), _mm512_extracti32x4_epi32(value, 1));
    _mm_storeu_si128((__m128i*)(address + 2 * stride), _mm512_extracti32x4_epi32(value, 2));
    _mm_storeu_si128((__m128i*)(address + 3 * stride), _mm512_extracti32x4_epi32(value, 3));
}

X86Q_INLINE Integers lane_numbers() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// The lower half of each number.
X86Q_INLINE void store_shorts(void* address, Integers value) {
    _mm256_storeu_si256((__m256i*)address, _mm512_cvtepi32_epi16(value));
}

X86Q_INLINE Singles estimated_reciprocal(Singles x) { return _mm512_rcp14_ps(x); }

X86Q_INLINE Integers load_first_bytes(const void* address, int bytes) {
    return _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), address);
}

X86Q_INLINE void store_first_bytes(void* address, Integers value, int bytes) {
    _mm512_mask_storeu_epi8(address, ~0ull >> (64 - bytes), value);
}
