// What vectors of 256 bits name differently from those of 512; X86Q_HAS_MASKS says whether instructions take masks (AVX-512).
constexpr int LANES = 8;
#define X86Q_MM(name) _mm256_##name
typedef __m256i Integers;
typedef __m256 Singles;

// Part j of vector i goes to place PARTS·i + j, where `pack` leaves it at 4·j + i (both counted in 32-bit numbers).
X86Q_INLINE Integers parts_in_a_row(Integers x) {
    return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// LANES bytes as integers. Compilers take a conversion of so short vectors apart, hence the instructions by name.
X86Q_INLINE Integers extend_bytes(const void* address) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)address));
}

// LANES shorts as integers.
X86Q_INLINE Integers extend_shorts(const void* address) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)address));
}

// 16 bytes for each part, which lie `stride` apart.
X86Q_INLINE Integers load_parts(const uint8_t* address, int64_t stride) {
    return _mm256_loadu2_m128i((const __m128i*)(address + stride), (const __m128i*)address);
}

X86Q_INLINE void store_parts(uint8_t* address, int64_t stride, Integers value) {
    _mm256_storeu2_m128i((__m128i*)(address + stride), (__m128i*)address, value);
}

X86Q_INLINE Integers lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

#if X86Q_HAS_MASKS
// The lower half of each number.
X86Q_INLINE void store_shorts(void* address, Integers value) {
    _mm_storeu_si128((__m128i*)address, _mm256_cvtepi32_epi16(value));
}

X86Q_INLINE Singles estimated_reciprocal(Singles x) { return _mm256_rcp14_ps(x); }

X86Q_INLINE Integers load_first_bytes(const void* address, int bytes) {
    return _mm256_maskz_loadu_epi8(~0u >> (32 - bytes), address);
}

X86Q_INLINE void store_first_bytes(void* address, Integers value, int bytes) {
    _mm256_mask_storeu_epi8(address, ~0u >> (32 - bytes), value);
}
#else
// Of numbers below 2^16.
X86Q_INLINE void store_shorts(void* address, Integers value) {
    const Integers packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(value, value), 8);
    _mm_storeu_si128((__m128i*)address, _mm256_castsi256_si128(packed));
}

// Of 12 bits, and made as good as one of 14 need be.
X86Q_INLINE Singles estimated_reciprocal(Singles x) {
    const Singles estimate = _mm256_rcp_ps(x), one = _mm256_set1_ps(1.0f);
    return _mm256_fmadd_ps(estimate, _mm256_fnmadd_ps(x, estimate, one), estimate);
}

X86Q_INLINE Integers first_words(int words) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(words), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

X86Q_INLINE Integers load_first_bytes(const void* address, int bytes) {
    Integers value = _mm256_maskload_epi32((const int*)address, first_words(bytes / 4));
    if (bytes % 4 != 0) {
        uint8_t all[32];
        std::memcpy(all, &value, sizeof all);
        for (int i = bytes & ~3; i < bytes; ++i) all[i] = ((const uint8_t*)address)[i];
        std::memcpy(&value, all, sizeof all);
    }
    return value;
}

X86Q_INLINE void store_first_bytes(void* address, Integers value, int bytes) {
    _mm256_maskstore_epi32((int*)address, first_words(bytes / 4), value);
    if (bytes % 4 != 0) {
        uint8_t all[32];
        std::memcpy(all, &value, sizeof all);
        for (int i = bytes & ~3; i < bytes; ++i) ((uint8_t*)address)[i] = all[i];
    }
}
#endif
