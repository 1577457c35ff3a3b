// Attention: softmax(query·key)·value, all three in bytes, the softmax in single precision.
//
// BLOCK queries at a time, one in each lane of VECTORS vectors. Their scores with all keys are computed in integers, then the
// exponentials of what they lie below the greatest, as bytes, then the sum of values weighted by these. A head's keys and values
// are laid out once for each thread that has blocks of it. A `Kernel` says which MASK there is, whether a sum of two products
// FITS_16 bits, the type of the output, and of how many keys sums of 32 bits hold the values times weights.

constexpr int VECTORS = LANES == 16 ? 2 : 1;
constexpr int BLOCK = VECTORS * LANES;
constexpr int ROWS = 8;  // keys, or columns of the value, whose sums registers hold at once
constexpr int32_t MASKED = -(1 << 30);  // the score of what is masked

enum class Mask { NONE, BOOLEAN, ADDED };

X86Q_INLINE int64_t up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }
X86Q_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- between rows of bytes and vectors of a word of each row ---------------------------------------------------------

// Four vectors of LANES / 4 times four words: each four by four words change places.
X86Q_INLINE void transpose(Ints (&x)[4]) {
    const Ints a = interleave_low_32(x[0], x[1]), b = interleave_high_32(x[0], x[1]);
    const Ints c = interleave_low_32(x[2], x[3]), d = interleave_high_32(x[2], x[3]);
    x[0] = interleave_low_64(a, c);
    x[1] = interleave_high_64(a, c);
    x[2] = interleave_low_64(b, d);
    x[3] = interleave_high_64(b, d);
}

// Word `w` of LANES rows goes to `to + w * step`. Of rows there are `count`, of a row `bytes`; beyond them it is 0.
inline void gather_words(const uint8_t* rows, int64_t stride, int64_t count, int64_t bytes, Ints* to, int64_t step) {
    for (int64_t at = 0; at < bytes; at += 16, to += 4 * step) {
        const uint8_t* from = rows + at;
        int64_t from_stride = stride;
        uint8_t some[LANES * 16];
        if (__builtin_expect(count < LANES || bytes - at < 16, 0)) {
            std::memset(some, 0, sizeof some);
            for (int64_t row = 0; row < count; ++row) std::memcpy(some + row * 16, from + row * stride, least(bytes - at, 16));
            from = some;
            from_stride = 16;
        }
        Ints words[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) words[i] = (Ints)load_parts(from + i * from_stride, 4 * from_stride);
        transpose(words);
        const int64_t rest = (bytes - at + 3) / 4;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            if (i < rest) to[i * step] = words[i];
    }
}

// The reverse.
inline void scatter_words(const Ints* from, int64_t step, uint8_t* rows, int64_t stride, int64_t count, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 16, from += 4 * step) {
        Ints words[4];
        const int64_t rest = (bytes - at + 3) / 4;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) words[i] = i < rest ? from[i * step] : Ints{};
        transpose(words);
        if (__builtin_expect(count < LANES || bytes - at < 16, 0)) {
            uint8_t some[LANES * 16];
            for (int i = 0; i < 4; ++i) store_parts(some + i * 16, 64, (Integers)words[i]);
            for (int64_t row = 0; row < count; ++row) std::memcpy(rows + at + row * stride, some + row * 16, least(bytes - at, 16));
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) store_parts(rows + at + i * stride, 4 * stride, (Integers)words[i]);
        }
    }
}

// Four rows of bytes as words of a byte of each, OFFSET less. What is behind the last whole 16 of them is 0 before.
template <int OFFSET>
inline void interleave_rows(const uint8_t* const* rows, int64_t bytes, int8_t* to) {
    for (int64_t at = 0; at < bytes; at += 16, to += 64) {
        __m128i x[4];
        uint8_t some[16] = {};
        for (int i = 0; i < 4; ++i) {
            const uint8_t* from = rows[i] + at;
            if (__builtin_expect(bytes - at < 16, 0)) {
                std::memcpy(some, from, bytes - at);
                from = some;
            }
            x[i] = _mm_sub_epi8(_mm_loadu_si128((const __m128i*)from), _mm_set1_epi8((char)OFFSET));
        }
        const __m128i a = _mm_unpacklo_epi8(x[0], x[1]), b = _mm_unpackhi_epi8(x[0], x[1]);
        const __m128i c = _mm_unpacklo_epi8(x[2], x[3]), d = _mm_unpackhi_epi8(x[2], x[3]);
        _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(a, c));
        _mm_storeu_si128((__m128i*)to + 1, _mm_unpackhi_epi16(a, c));
        _mm_storeu_si128((__m128i*)to + 2, _mm_unpacklo_epi16(b, d));
        _mm_storeu_si128((__m128i*)to + 3, _mm_unpackhi_epi16(b, d));
    }
}

// --- the softmax's exponentials ---------------------------------------------------------------------------------------

constexpr float LOG2_E = 1.44269504f, LOG2_255 = 7.99435344f;

// 2^x of N vectors, as integers, x being 8 at most: 2^n times a polynomial of fifth degree for what is left of x.
template <int N>
X86Q_INLINE void weights(Floats (&x)[N], Ints (&result)[N]) {
    constexpr float POLYNOMIAL[] = {9.675542e-3f, 5.550713e-2f, 2.402212e-1f, 6.931469e-1f, 1.0f};
    constexpr float ROUNDING = 12582912.0f;  // 1.5·2^23, see `exponentials`
    Floats n[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = maximum(x[i], Floats{} - 20.0f);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) n[i] = x[i] + ROUNDING;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] -= n[i] - ROUNDING, p[i] = Floats{} + 1.327647e-3f;
#pragma GCC unroll 8
    for (const float factor : POLYNOMIAL)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) p[i] = multiply_add(p[i], x[i], Floats{} + factor);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) result[i] = nearest((Floats)((Ints)p[i] + ((Ints)n[i] << 23)));
}

// --- a block of queries -----------------------------------------------------------------------------------------------

template <class Kernel>
struct Attention {
    typedef typename Kernel::Out Out;
    static constexpr Mask MASK = Kernel::MASK;
    static constexpr bool BY_ROWS = Kernel::BY_ROWS;
    static constexpr bool IS_REAL = MASK == Mask::ADDED || BY_ROWS;  // what a score is
    static constexpr bool IS_INTEGER = std::is_integral_v<Out>;
    static constexpr int OFFSET = Kernel::FITS_16 ? 64 : 128;  // what makes signed bytes of unsigned ones

    const X86qAttention a;
    const uint8_t *query, *key, *value, *mask;
    Out* out;
    int64_t words, columns;  // of a row of keys; of a row of values, filled up
    Ints *keys, *key_sums, *queries, *scores, *masks, *results;
    int8_t* values;
    const float *query_scales, *key_scales;  // of a head, one for each row; else there is one for all
    float value_scale;

    // Bytes of scratch that a thread needs, and where in it what lies.
    int64_t place(uint8_t* scratch) {
        words = (a.width + 3) / 4;
        columns = up(a.value_width, 16);
        const int64_t key_vectors = (a.keys + LANES - 1) / LANES, rows = key_vectors * LANES, quads = rows / 4;
        int64_t used = 0;
        const auto take = [&](auto*& pointer, int64_t vectors) {
            pointer = (std::remove_reference_t<decltype(pointer)>)(scratch + used);
            used += vectors * (int64_t)sizeof(Ints);
        };
        take(keys, key_vectors * words);
        take(key_sums, key_vectors);
        take(queries, words * VECTORS);
        take(scores, rows * VECTORS);
        take(masks, MASK == Mask::NONE ? 0 : (MASK == Mask::BOOLEAN ? quads : rows) * VECTORS);
        take(results, columns * VECTORS);
        take(values, quads * columns / LANES);
        return used;
    }

    // Lays out the keys and values of a head.
    void pack(const uint8_t* head_key, const uint8_t* head_value) const {
        for (int64_t first = 0, vector = 0; first < a.keys; first += LANES, ++vector) {
            Ints* const to = keys + vector * words;
            gather_words(head_key + first * a.key_row, a.key_row, least(a.keys - first, LANES), a.width, to, 1);
            Ints sum{};
            for (int64_t word = 0; word < words; ++word) sum = dot<true>(sum, to[word], Ints{} + 0x01010101);
            key_sums[vector] = sum * (int32_t)(OFFSET - a.query_zero_point);
        }
        for (int64_t first = 0; first < a.keys; first += 4) {
            const uint8_t* rows[4];  // the last again in place of what is not there: its weight is 0
            for (int i = 0; i < 4; ++i) rows[i] = head_value + least(first + i, a.keys - 1) * a.value_row;
            interleave_rows<OFFSET>(rows, a.value_width, values + first * columns);
        }
    }

    // The keys that the block of queries from `first` on may look at.
    int64_t reach(int64_t first) const { return a.is_causal ? least(a.keys, first + BLOCK) : a.keys; }

    // `query_sums` becomes what each query's scores have too much for the key's zero point: one number that all its scores share
    // unless these have scales of their own.
    void read_queries(const uint8_t* head_query, int64_t first, Ints (&query_sums)[VECTORS]) const {
        for (int vector = 0; vector < VECTORS; ++vector, first += LANES)
            if (const int64_t count = least(a.queries - first, LANES); count > 0)
                gather_words(head_query + first * a.query_row, a.query_row, count, a.width, queries + vector, VECTORS);
            else
                for (int64_t word = 0; word < words; ++word) queries[word * VECTORS + vector] = Ints{};
        typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
        for (int64_t i = 0; i < words * VECTORS; ++i) queries[i] = (Ints)((Bytes)queries[i] - (uint8_t)OFFSET);
        if constexpr (BY_ROWS)
            for (int vector = 0; vector < VECTORS; ++vector) {
                Ints sum = Ints{} + (int32_t)((OFFSET - a.query_zero_point) * a.width);
                // What fills up a row's last word is -OFFSET here.
                for (int64_t word = 0; word < words; ++word) sum = dot<true>(sum, Ints{} + 0x01010101, queries[word * VECTORS + vector]);
                query_sums[vector] = (sum + (int32_t)(OFFSET * (4 * words - a.width))) * (int32_t)a.key_zero_point;
            }
    }

    void read_mask(const uint8_t* head_mask, int64_t first, int64_t reached) const {
        constexpr int64_t SIZE = MASK == Mask::ADDED ? 4 : 1;
        for (int vector = 0; vector < VECTORS; ++vector, first += LANES) {
            const uint8_t* const rows = head_mask + first * a.mask_row * SIZE;
            const int64_t count = least(a.queries - first, LANES), step = a.mask_row * SIZE;
            if (a.mask_key && count > 0) gather_words(rows, step, count, reached * SIZE, masks + vector, VECTORS);
            if (!a.mask_key) {
                Ints all{};
                for (int64_t row = 0; row < count; ++row) {
                    int32_t word = rows[row * step] * 0x01010101;
                    if (MASK == Mask::ADDED) std::memcpy(&word, rows + row * step, 4);
                    all[row] = word;
                }
                for (int64_t word = 0; word < (reached * SIZE + 3) / 4; ++word) masks[word * VECTORS + vector] = all;
            }
        }
    }

    typedef Ints Sums[ROWS][VECTORS];

    // sums += words of `narrow`, ROWS of them side by side, each with all lanes of `wide`; which of the two is unsigned differs.
    template <bool NARROW_IS_SIGNED>
    static X86Q_INLINE void multiply(
        Sums& sums, const int32_t* narrow, int64_t narrow_step, const Ints* wide, int64_t steps) {
        for (int64_t step = 0; step < steps; ++step, narrow += narrow_step, wide += VECTORS) {
            Ints lanes[VECTORS];
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector) lanes[vector] = wide[vector];
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) {
                const Ints word = Ints{} + narrow[row];
#pragma GCC unroll 4
                for (int vector = 0; vector < VECTORS; ++vector)
                    sums[row][vector] = NARROW_IS_SIGNED ? dot<Kernel::FITS_16>(sums[row][vector], lanes[vector], word)
                                                         : dot<Kernel::FITS_16>(sums[row][vector], word, lanes[vector]);
            }
        }
    }

    // The factors of the scores of a vector's queries, from `first` on; those of queries that are not there do not matter.
    Floats query_factors(int64_t first) const {
        if (!BY_ROWS) return Floats{} + a.factor;
        Floats scales{};
        if (first < a.queries) std::memcpy(&scales, query_scales + first, least(a.queries - first, LANES) * sizeof(float));
        return scales * a.factor;
    }

    // The scores of the block with the keys that it reaches: integers up to a number that is the same for all keys of a query,
    // or floats where a mask is added, or up to the query's scale where rows have scales. `most` becomes the greatest of each query.
    X86Q_INLINE void score(int64_t first, int64_t reached, const Ints (&query_sums)[VECTORS], Ints (&most)[VECTORS]) const {
        const Ints lane = (Ints)lane_numbers();
        Floats factors[VECTORS];
        if constexpr (MASK == Mask::ADDED)
            for (int vector = 0; vector < VECTORS; ++vector) factors[vector] = query_factors(first + vector * LANES);
        for (int64_t key = 0; key < reached; key += ROWS) {
            Sums sums;
            const int32_t* const narrow = (const int32_t*)(keys + key / LANES * words) + key % LANES;
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
                for (int vector = 0; vector < VECTORS; ++vector) sums[row][vector] = Ints{} + ((const int32_t*)key_sums)[key + row];
            multiply<false>(sums, narrow, LANES, queries, words);
            const bool checks = key + ROWS > reached || (a.is_causal && key + ROWS - 1 > first);
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector) {
                const Ints last = a.is_causal ? lane + (int32_t)(first + vector * LANES) : Ints{} + INT32_MAX;
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row) {
                    Ints& sum = sums[row][vector];
                    Ints seen = Ints{} - 1;
                    if constexpr (MASK == Mask::BOOLEAN)
                        seen = (masks[(key / 4 + row / 4) * VECTORS + vector] >> 8 * (row % 4) & 255) != 0;
                    if constexpr (IS_REAL) {
                        Floats score = __builtin_convertvector(BY_ROWS ? sum - query_sums[vector] : sum, Floats);
                        if constexpr (BY_ROWS) score *= key_scales[least(key + row, a.keys - 1)];
                        if constexpr (MASK == Mask::ADDED)
                            score = multiply_add(score, factors[vector], (Floats)masks[(key + row) * VECTORS + vector]);
                        if constexpr (MASK == Mask::BOOLEAN) score = seen ? score : lowest();
                        if (checks) score = key + row < reached ? (last < (int32_t)(key + row) ? lowest() : score) : lowest();
                        most[vector] = (Ints)maximum((Floats)most[vector], score);
                        sum = (Ints)score;
                    } else {
                        if constexpr (MASK == Mask::BOOLEAN) sum = seen ? sum : Ints{} + MASKED;
                        if (checks) sum = key + row < reached ? (last < (int32_t)(key + row) ? Ints{} + MASKED : sum) : Ints{} + MASKED;
                        most[vector] = most[vector] > sum ? most[vector] : sum;
                    }
                    scores[(key + row) * VECTORS + vector] = sum;
                }
            }
        }
    }

    static X86Q_INLINE Floats lowest() { return Floats{} - __builtin_inff(); }

    // Scores become weights of a byte, four keys of a query to a word; `totals` the sums of them.
    X86Q_INLINE void soften(int64_t first, int64_t reached, const Ints (&most)[VECTORS], Ints (&totals)[VECTORS]) const {
        constexpr int N = 4 * VECTORS;
        Floats scales[VECTORS];
        for (int vector = 0; vector < VECTORS; ++vector)
            scales[vector] = LOG2_E * (MASK == Mask::ADDED ? Floats{} + 1.0f : query_factors(first + vector * LANES));
        for (int64_t quad = 0; 4 * quad < reached; ++quad) {
            Floats x[N];
            Ints weight[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                const Ints score = scores[quad * N + i];
                if constexpr (IS_REAL)
                    x[i] = (Floats)score - (Floats)most[i % VECTORS];
                else
                    x[i] = __builtin_convertvector(score - most[i % VECTORS], Floats);
                x[i] = multiply_add(x[i], scales[i % VECTORS], Floats{} + LOG2_255);
            }
            weights(x, weight);
            if (!IS_REAL && (MASK == Mask::BOOLEAN || a.is_causal || 4 * quad + 4 > reached)) {
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) weight[i] &= scores[quad * N + i] != MASKED;
            }
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector) {
                const Ints word = weight[vector] | weight[VECTORS + vector] << 8 | weight[2 * VECTORS + vector] << 16 |
                                  weight[3 * VECTORS + vector] << 24;
                totals[vector] = dot<true>(totals[vector], word, Ints{} + 0x01010101);
                scores[quad * VECTORS + vector] = word;  // in place: what lies there has been read
            }
        }
    }

    // The mean of the values by these weights, and what the output holds of it.
    X86Q_INLINE void average(int64_t reached, const Ints (&totals)[VECTORS]) const {
        Floats factors[VECTORS];
        Ints offsets[VECTORS];
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; ++vector) {
            const Floats total = __builtin_convertvector(totals[vector], Floats);
            factors[vector] = (value_scale * (IS_INTEGER ? a.inverse_scale : 1.0f)) / maximum(total, Floats{} + 1.0f);
            offsets[vector] = totals[vector] * (int32_t)(OFFSET - a.value_zero_point);
        }
        for (int64_t column = 0; column < a.value_width; column += ROWS) {
            Sums sums;
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
                for (int vector = 0; vector < VECTORS; ++vector) sums[row][vector] = offsets[vector];
            multiply<true>(sums, (const int32_t*)values + column, columns, scores, (reached + 3) / 4);
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector) {
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row) {
                    const Floats real = __builtin_convertvector(sums[row][vector], Floats) * factors[vector];
                    if constexpr (IS_INTEGER) {
                        sums[row][vector] = quantized(real, (int32_t)a.zero_point, (int32_t)a.low, (int32_t)a.high) & 255;
                    } else {
                        results[(column + row) * VECTORS + vector] = (Ints)real;
                    }
                }
                if constexpr (IS_INTEGER)
#pragma GCC unroll 2
                    for (int row = 0; row < ROWS; row += 4)
                        results[(column + row) / 4 * VECTORS + vector] = sums[row][vector] | sums[row + 1][vector] << 8 |
                                                                         sums[row + 2][vector] << 16 | sums[row + 3][vector] << 24;
            }
        }
    }

    void write(Out* head_out, int64_t first) const {
        for (int vector = 0; vector < VECTORS; ++vector, first += LANES)
            if (const int64_t count = least(a.queries - first, LANES); count > 0)
                scatter_words(results + vector, VECTORS, (uint8_t*)(head_out + first * a.out_row), a.out_row * sizeof(Out), count,
                              a.value_width * sizeof(Out));
    }

    void block(const uint8_t* head_query, const uint8_t* head_mask, Out* head_out, int64_t first) const {
        const int64_t reached = reach(first);
        Ints query_sums[VECTORS], most[VECTORS], totals[VECTORS];
        for (int vector = 0; vector < VECTORS; ++vector) {
            most[vector] = IS_REAL ? (Ints)(Floats{} - __FLT_MAX__) : Ints{} + MASKED;
            totals[vector] = Ints{};
        }
        read_queries(head_query, first, query_sums);
        if constexpr (MASK != Mask::NONE) read_mask(head_mask, first, reached);
        score(first, reached, query_sums, most);
        soften(first, reached, most, totals);
        average(reached, totals);
        write(head_out, first);
    }

    void run(const Worker& worker) {
        const Scratch scratch(place(nullptr) + 64);
        place((uint8_t*)(((uintptr_t)scratch.bytes + 63) / 64 * 64));
        const int64_t blocks = (a.queries + BLOCK - 1) / BLOCK, group = a.heads / a.key_heads;
        worker.share(a.batch * a.heads * blocks, [&](int64_t task, int64_t end) {
            for (int64_t packed = -1; task < end; ++task) {
                const int64_t head = task / blocks % a.heads, batch = task / blocks / a.heads, key_head = head / group;
                if (packed != batch * a.key_heads + key_head) {
                    packed = batch * a.key_heads + key_head;
                    key_scales = (const float*)a.key_scales + packed * a.keys;
                    value_scale = BY_ROWS ? ((const float*)a.value_scales)[packed] : a.value_scale;
                    pack(key + batch * a.key_batch + key_head * a.key_head, value + batch * a.value_batch + key_head * a.value_head);
                }
                query_scales = (const float*)a.query_scales + (batch * a.heads + head) * a.queries;
                const int64_t mask_at = (batch * a.mask_batch + head * a.mask_head) * (MASK == Mask::ADDED ? 4 : 1);
                block(query + batch * a.query_batch + head * a.query_head, mask + mask_at,
                      out + batch * a.out_batch + head * a.out_head, task % blocks * BLOCK);
            }
        });
    }
};

template <class Kernel>
inline void attention(
    const uint8_t* query, const uint8_t* key, const uint8_t* value, const uint8_t* mask, typename Kernel::Out* out,
    const X86qAttention& arguments) {
    if (arguments.keys > Kernel::MOST_KEYS) throw std::length_error("int8 attention: more keys than sums of 32 bits hold");
    on_threads(arguments.threads, [&](const Worker& worker) {
        Attention<Kernel> attention{arguments, query, key, value, mask, out, 0, 0, {}, {}, {}, {}, {}, {}, {}};
        attention.run(worker);
    });
}
