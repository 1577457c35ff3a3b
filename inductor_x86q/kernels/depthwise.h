// Depthwise convolution: an output channel for each of the input's.
//
// A `Kernel` says what decides the machine code: COLUMNS neighbouring output pixels of 4·LANES channels are summed up in
// registers; the kernel's size, its horizontal stride and dilation; whether all channels are fewer than that (NARROW).

// Four rows of bytes as `dot` takes them, each channel's four bytes together; rows from COUNT on are 0. Vector i gets
// the channels 16·part + 4·i to 16·part + 4·i + 3 as its part of that number.
template <int COUNT, bool NARROW>
X86Q_INLINE void interleave(const uint8_t* const* rows, int width, Ints (&values)[4]) {
    Ints row[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) row[i] = NARROW ? load_first(rows[i], width) : load<Ints>(rows[i]);
    const Ints low = interleave_low_8(row[0], row[1]), high = interleave_high_8(row[0], row[1]);
    const Ints next_low = interleave_low_8(row[2], row[3]), next_high = interleave_high_8(row[2], row[3]);
    values[0] = interleave_low_16(low, next_low);
    values[1] = interleave_high_16(low, next_low);
    values[2] = interleave_low_16(high, next_high);
    values[3] = interleave_high_16(high, next_high);
}

template <class Kernel>
struct Taps {
    static constexpr int FOURS = (Kernel::KERNEL_H + 3) / 4;
    // How many columns of the image a block of pixels reads.
    static constexpr int REACH =
        (Kernel::COLUMNS - 1) * Kernel::STRIDE_W + (Kernel::KERNEL_W - 1) * Kernel::DILATION_W + 1;
};

// COLUMNS neighbouring output pixels of 4·LANES channels, the first of which reads from `column` on. `rows` are the rows
// of the image that the kernel covers. What lies beside the image (EDGE: something may) is read from `padding`.
// Weights lie as [column of the kernel][four rows][vector][lane][4].
template <class Kernel, class Epilogue, bool EDGE>
X86Q_INLINE void depthwise_block(
    const Shape& shape, const uint8_t* const* rows, const uint8_t* padding, int64_t column, const int8_t* weight,
    const Scalars& numbers, const Target<Epilogue>& target) {
    constexpr int COLUMNS = Kernel::COLUMNS, KERNEL_H = Kernel::KERNEL_H;
    constexpr int FOURS = Taps<Kernel>::FOURS, REACH = Taps<Kernel>::REACH;
    Ints sums[COLUMNS][4];
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; ++i)
#pragma GCC unroll 4
        for (int vector = 0; vector < 4; ++vector) sums[i][vector] = load<Ints>(target.channels + vector * LANES);
    if constexpr (Epilogue::DYNAMIC) {
#pragma GCC unroll 16
        for (int i = 0; i < COLUMNS; ++i)
#pragma GCC unroll 4
            for (int vector = 0; vector < 4; ++vector) sums[i][vector] *= numbers.x_zero_point;
    }
    const auto add = [&](int position, int four, const Ints (&values)[4]) X86Q_LAMBDA {
#pragma GCC unroll 16
        for (int i = 0; i < COLUMNS; ++i) {
            const int tap = position - i * Kernel::STRIDE_W;
            if (tap < 0 || tap % Kernel::DILATION_W != 0 || tap / Kernel::DILATION_W >= Kernel::KERNEL_W) continue;
            const int8_t* here = weight + (tap / Kernel::DILATION_W * FOURS + four) * 16 * LANES;
#pragma GCC unroll 4
            for (int vector = 0; vector < 4; ++vector)
                sums[i][vector] =
                    dot<Kernel::FITS_16>(sums[i][vector], values[vector], load<Ints>(here + vector * 4 * LANES));
        }
    };
    int64_t offset = column * shape.x_pixel;
#pragma GCC unroll 64
    for (int position = 0; position < REACH; ++position, offset += shape.x_pixel) {
        const uint8_t* at[FOURS * 4];
#pragma GCC unroll 16
        for (int row = 0; row < KERNEL_H; ++row)
            at[row] = EDGE && (uint64_t)(column + position) >= (uint64_t)shape.w ? padding : rows[row] + offset;
        Ints values[4];
#pragma GCC unroll 4
        for (int four = 0; four < KERNEL_H / 4; ++four) {
            interleave<4, Kernel::NARROW>(at + four * 4, target.count, values);
            add(position, four, values);
        }
        if constexpr (KERNEL_H % 4 != 0) {
            interleave<KERNEL_H % 4, Kernel::NARROW>(at + (FOURS - 1) * 4, target.count, values);
            add(position, FOURS - 1, values);
        }
    }
    finish_all<Epilogue, COLUMNS, 4, false>(sums, numbers, target);
}

// A row of the output. The last channels and the last block of pixels begin earlier and compute some outputs twice,
// instead of being fewer. `padding` holds a row of zero points.
template <class Kernel, class Epilogue>
inline void depthwise_row(
    const Shape& given, const uint8_t* x, const uint8_t* padding, const int8_t* weight, const int32_t* channels,
    const Scalars& given_numbers, const typename Epilogue::Other* other, typename Epilogue::Out* out, int64_t row) {
    const Shape shape = given;  // what is stored may not lie in a local variable
    const Scalars numbers = given_numbers;
    constexpr int COLUMNS = Kernel::COLUMNS, BLOCK = 4 * LANES, KERNEL_H = Kernel::KERNEL_H;
    const int64_t top = row % shape.out_h * shape.stride_h - shape.pad_h;
    const uint8_t* image = x + row / shape.out_h * shape.x_image;
    const int count = Kernel::NARROW ? (int)shape.c : BLOCK;
    const int valid = shape.out_w < COLUMNS ? shape.out_w : COLUMNS;
    for (int64_t block = 0; block < shape.channels / BLOCK; ++block) {
        const int64_t c = Kernel::NARROW ? 0 : block * BLOCK + BLOCK <= shape.c ? block * BLOCK : shape.c - BLOCK;
        const uint8_t* rows[KERNEL_H];
#pragma GCC unroll 16
        for (int i = 0; i < KERNEL_H; ++i) {
            const int64_t h = top + i * shape.dilation_h;
            rows[i] = (h < 0 || h >= shape.h ? padding : image + h * shape.x_row) + c;
        }
        const int8_t* taps = weight + block * Kernel::KERNEL_W * Taps<Kernel>::FOURS * 4 * BLOCK;
        typename Epilogue::Out* to = out + row * shape.out_w * shape.out_pixel + c;
        for (int64_t ow = 0; ow < shape.out_w; ow += COLUMNS) {
            if (ow + COLUMNS > shape.out_w) ow = shape.out_w > COLUMNS ? shape.out_w - COLUMNS : 0;
            const int64_t column = ow * Kernel::STRIDE_W - shape.pad_w;
            const Target<Epilogue> target = {
                channels + block * BLOCK, shape.channels,
                other + (row * shape.out_w + ow) * shape.other_pixel + c, shape.other_pixel,
                to + ow * shape.out_pixel, shape.out_pixel,
                (const float*)shape.x_scales, 0, count, valid};
            if (column < 0 || column + Taps<Kernel>::REACH > shape.w)
                depthwise_block<Kernel, Epilogue, true>(shape, rows, padding + c, column, taps, numbers, target);
            else
                depthwise_block<Kernel, Epilogue, false>(shape, rows, padding + c, column, taps, numbers, target);
        }
    }
}

template <class Kernel, class Epilogue>
inline void depthwise(
    const uint8_t* x, const int32_t* channels, const typename Epilogue::Other* other, typename Epilogue::Out* out,
    const X86qArguments& arguments) {
    static_assert(Kernel::KERNEL_H <= 16 && Taps<Kernel>::REACH <= 64, "its loops are not unrolled further");
    const Shape shape(arguments);
    const Scalars numbers = scalars<Epilogue>(channels, shape);
    const int8_t* weight = packed_weight(channels, shape.channels);
    // Read beside the image, which is also where there are fewer output pixels than COLUMNS.
    const bool is_read = shape.pad_h || shape.pad_w || shape.out_w < Kernel::COLUMNS;
    const int64_t bytes = is_read ? shape.w * shape.x_pixel : 0;
    const Scratch padding(bytes);
    if (bytes) std::memset(padding.bytes, numbers.x_zero_point, bytes);
    on_threads(shape.threads, [&](const Worker& worker) {
        worker.share(shape.n * shape.out_h, [&](int64_t first, int64_t end) {
            for (int64_t row = first; row < end; ++row)
                depthwise_row<Kernel, Epilogue>(shape, x, padding.bytes, weight, channels, numbers, other, out, row);
        });
    });
}
