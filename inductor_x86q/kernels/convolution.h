// Convolution as a matrix product over runs of contiguous bytes.
//
// A pixel's inputs are kernel_d × kernel_h × row_runs runs of `run` bytes. Weights lie as [vector][run][four bytes of the run][lane][4],
// each run filled up to whole fours. A `Kernel` says what decides the machine code: ROWS output pixels by COLUMNS vectors
// of output channels are summed up in registers, the input is SIGNED, and a sum of two products FITS_16 bits.

// Loads the four bytes that a product of a lane takes.
struct Fours {
    static X86Q_INLINE uint32_t read(const uint8_t* address, int64_t) {
        uint32_t four;
        std::memcpy(&four, address, 4);
        return four;
    }
};

// The last `rest` bytes of a run that has four at least; reads what is in front of them too, instead of what is behind.
struct LastOfRun {
    static X86Q_INLINE uint32_t read(const uint8_t* address, int64_t rest) {
        return Fours::read(address + rest - 4, 4) >> (32 - 8 * rest);
    }
};

// A run of one to three bytes.
struct ShortRun {
    static X86Q_INLINE uint32_t read(const uint8_t* address, int64_t rest) {
        uint32_t four = address[0];
        if (rest > 1) four |= address[1] << 8;
        if (rest > 2) four |= address[2] << 16;
        return four;
    }
};

template <class Kernel, int ROWS>
struct Product {
    static constexpr int COLUMNS = Kernel::COLUMNS;
    static constexpr int64_t FOUR = 4 * LANES;  // bytes of a vector's weights for four bytes of a run
    typedef Ints Sums[ROWS][COLUMNS];

    // One step: four bytes of each pixel from `offset` on times the weights from `here` on.
    template <class Load>
    static X86Q_INLINE void step(
        Sums& sums, const uint8_t* const* bases, int64_t offset, int64_t rest, const int8_t* here, int64_t column_bytes) {
        Ints b[COLUMNS];
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) b[column] = load<Ints>(here + column * column_bytes);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Ints a = broadcast(Load::read(bases[row] + offset, rest));
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column)
                sums[row][column] = dot<Kernel::FITS_16>(sums[row][column], a, b[column]);
        }
    }

    // Two steps, added up in 16 bits.
    static X86Q_INLINE void pair(
        Sums& sums, const uint8_t* const* bases, int64_t offset, const int8_t* here, int64_t column_bytes) {
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Ints a = broadcast(Fours::read(bases[row] + offset, 4));
            const Ints c = broadcast(Fours::read(bases[row] + offset + 4, 4));
#pragma GCC unroll 16
            for (int column = 0; column < COLUMNS; ++column) {
                const int8_t* there = here + column * column_bytes;
                sums[row][column] = dot_pair(sums[row][column], a, load<Ints>(there), c, load<Ints>(there + FOUR));
            }
        }
    }

    static X86Q_INLINE Ints broadcast(uint32_t four) {
        if constexpr (Kernel::SIGNED) four ^= 0x80808080u;  // s8 as u8; the zero point moves along
        return Ints{} + (int32_t)four;
    }
};

// Rows of the kernel.
struct KernelRows {
    int64_t first, end;
};

// The sums of ROWS pixels by COLUMNS vectors over some rows of the kernel. DYNAMIC: the zero points, of each pixel, are not part
// of the layer's numbers. Where the CPU adds products in 16 bits, `overflows` has a byte for each pair of fours of a vector:
// whether four products may exceed 16 bits.
template <class Kernel, bool DYNAMIC, int ROWS>
X86Q_INLINE void multiply(
    const Shape& shape, const uint8_t* const* bases, const int8_t* weight, const int8_t* overflows,
    const int32_t* channels, const int32_t (&zero_points)[ROWS], const KernelRows& kernel_rows, Ints (&sums)[ROWS][Kernel::COLUMNS]) {
    typedef Product<Kernel, ROWS> Product;
    constexpr int COLUMNS = Kernel::COLUMNS;
    constexpr int64_t FOUR = Product::FOUR;
    const int64_t run = shape.run, rest = run % 4, whole = run - rest, runs = shape.kernel_d * shape.kernel_h * shape.row_runs;
    const int64_t pairs = Kernel::FITS_16 ? run / 8 : 0, paired = 8 * pairs;
    const int64_t column_bytes = runs * ((run + 3) / 4) * FOUR;
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
        for (int column = 0; column < COLUMNS; ++column) {
            sums[row][column] = load<Ints>(channels + column * LANES);
            if constexpr (DYNAMIC) sums[row][column] *= zero_points[row];
        }
    const int8_t* here = weight + kernel_rows.first * shape.row_runs * ((run + 3) / 4) * FOUR;
    overflows += kernel_rows.first * shape.row_runs * pairs;
    int64_t start_of_row = kernel_rows.first * shape.dilation_h * shape.read_row;
    for (int64_t kernel_row = kernel_rows.first, h = kernel_row; kernel_row < kernel_rows.end; ++kernel_row) {
        int64_t start = start_of_row;
        for (int64_t row_run = 0; row_run < shape.row_runs; ++row_run) {
            int64_t offset = start;
            if constexpr (Kernel::FITS_16) {
                for (int64_t i = 0; i < pairs; ++i, offset += 8, here += 2 * FOUR) {
                    int8_t overflow = 0;
#pragma GCC unroll 16
                    for (int column = 0; column < COLUMNS; ++column) overflow |= overflows[column * runs * pairs + i];
                    if (__builtin_expect(overflow, 0)) {
                        Product::template step<Fours>(sums, bases, offset, 4, here, column_bytes);
                        Product::template step<Fours>(sums, bases, offset + 4, 4, here + FOUR, column_bytes);
                    } else {
                        Product::pair(sums, bases, offset, here, column_bytes);
                    }
                }
                overflows += pairs;
            }
            for (const int64_t end = start + whole; offset < end; offset += 4, here += FOUR)
                Product::template step<Fours>(sums, bases, offset, 4, here, column_bytes);
            if (rest != 0) {
                if (whole != 0)
                    Product::template step<LastOfRun>(sums, bases, offset, rest, here, column_bytes);
                else
                    Product::template step<ShortRun>(sums, bases, offset, rest, here, column_bytes);
                here += FOUR;
            }
            start += shape.dilation_w * shape.read_pixel;
        }
        start_of_row += shape.dilation_h * shape.read_row;
        if (++h == shape.kernel_h) {
            h = 0;
            start_of_row += shape.dilation_d * shape.read_plane - shape.kernel_h * shape.dilation_h * shape.read_row;
        }
    }
}

// `count` pixels of C channels that lie apart, one after the other; C of 0 is any number.
template <int C>
X86Q_INLINE void gather(const Shape& shape, const uint8_t* from, uint8_t* to) {
    const int64_t channels = C ? C : shape.c, pixel = shape.x_pixel, channel = shape.x_channel;
    for (int64_t w = 0; w < shape.w; ++w)
#pragma GCC unroll 4
        for (int64_t c = 0; c < channels; ++c) to[w * channels + c] = from[w * pixel + c * channel];
}

// The image with the zero point around it, channels and pixels without gaps.
inline void pad_row(const Shape& given, const uint8_t* x, uint8_t* padded, int64_t row, int zero_point) {
    const Shape shape = given;  // what is stored may not lie in a local variable
    const int64_t width = shape.padded_w * shape.c;
    uint8_t* to = padded + row * width;
    const int64_t plane = row / shape.padded_h, h = row % shape.padded_h - shape.pad_h;
    const int64_t image = plane / shape.padded_d, d = plane % shape.padded_d - shape.pad_d;
    if (h < 0 || h >= shape.h || d < 0 || d >= shape.d) {
        std::memset(to, zero_point, width);
        return;
    }
    std::memset(to, zero_point, shape.pad_w * shape.c);
    const uint8_t* from = x + image * shape.x_image + d * shape.x_plane + h * shape.x_row;
    uint8_t* inner = to + shape.pad_w * shape.c;
    if (shape.x_channel != 1) {
        switch (shape.c) {  // what images have
            case 2: gather<2>(shape, from, inner); break;
            case 3: gather<3>(shape, from, inner); break;
            case 4: gather<4>(shape, from, inner); break;
            default: gather<0>(shape, from, inner);
        }
    } else if (shape.x_pixel == shape.c) {
        std::memcpy(inner, from, shape.w * shape.c);
    } else {
        for (int64_t w = 0; w < shape.w; ++w) std::memcpy(inner + w * shape.c, from + w * shape.x_pixel, shape.c);
    }
    inner += shape.w * shape.c;
    std::memset(inner, zero_point, to + width - inner);
}

// Walks along the output's pixels, and says where in the input each begins.
struct Walker {
    int64_t step, line_step, plane_step, image_step, width, height, depth;
    int64_t column, line, plane;
    const uint8_t *base, *line_base, *plane_base, *image_base;

    X86Q_INLINE Walker(const Shape& shape, const uint8_t* x, int64_t pixel) {
        step = shape.stride_w * shape.read_pixel;
        line_step = shape.stride_h * shape.read_row;
        plane_step = shape.stride_d * shape.read_plane;
        image_step = shape.read_image;
        width = shape.out_w;
        height = shape.out_h;
        depth = shape.out_d;
        column = pixel % width;
        line = pixel / width % height;
        plane = pixel / width / height % depth;
        image_base = x + pixel / width / height / depth * image_step;
        plane_base = image_base + plane * plane_step;
        line_base = plane_base + line * line_step;
        base = line_base + column * step;
    }

    // The line and the image of the pixel before this one; there is one plane.
    X86Q_INLINE int64_t last_line() const { return column ? line : line ? line - 1 : height - 1; }
    X86Q_INLINE const uint8_t* last_image() const { return column || line ? image_base : image_base - image_step; }

    X86Q_INLINE void next() {
        base += step;
        if (__builtin_expect(++column == width, 0)) {
            column = 0;
            line_base += line_step;
            if (++line == height) {
                line = 0;
                plane_base += plane_step;
                if (++plane == depth) {
                    plane = 0;
                    plane_base = image_base += image_step;
                }
                line_base = plane_base;
            }
            base = line_base;
        }
    }
};

// The rows of the kernel that lie in the image for any output row from `first` to `last`.
X86Q_INLINE KernelRows rows_inside(const Shape& shape, int64_t first, int64_t last) {
    const int64_t above = shape.pad_h - last * shape.stride_h, down_to = shape.h + shape.pad_h - first * shape.stride_h;
    KernelRows found = {0, shape.kernel_h};
    if (above > 0) found.first = (above + shape.dilation_h - 1) / shape.dilation_h;
    if (down_to < shape.dilation_h * shape.kernel_h) found.end = (down_to + shape.dilation_h - 1) / shape.dilation_h;
    return found;
}

// Blocks of ROWS pixels by panels of COLUMNS vectors; a pass over the pixels takes as many panels as stay in the L1 cache.
template <class Kernel, class Epilogue, int ROWS>
struct Blocks {
    static constexpr int COLUMNS = Kernel::COLUMNS;
    static constexpr int64_t PASS_BYTES = 16384;

    const Shape& shape;
    const Scalars& numbers;
    const uint8_t* x;
    const int32_t* channels;
    const typename Epilogue::Other* other;
    typename Epilogue::Out* out;

    int64_t runs() const { return shape.kernel_d * shape.kernel_h * shape.row_runs; }
    int64_t vector_bytes() const { return runs() * ((shape.run + 3) / 4) * 4 * LANES; }
    int64_t pixels() const { return shape.n * shape.out_d * shape.out_h * shape.out_w; }
    int64_t blocks() const { return (pixels() + ROWS - 1) / ROWS; }
    int64_t panels() const { return (shape.group_vectors + COLUMNS - 1) / COLUMNS; }
    int64_t panels_together() const {
        const int64_t fitting = PASS_BYTES / (COLUMNS * vector_bytes());
        return fitting < 1 ? 1 : fitting < panels() ? fitting : panels();
    }
    int64_t passes() const { return (panels() + panels_together() - 1) / panels_together(); }

    void run(const Worker& worker) const {
        const int64_t count = blocks(), per_group = count * passes();
        worker.share(per_group * shape.groups, [&](int64_t task, int64_t end) {
            while (task < end) {
                const int64_t first = task % count, stop = count - first < end - task ? count : first + end - task;
                run_pass(task / per_group, task / count % passes(), first, stop);
                task += stop - first;
            }
        });
    }

    // The last panel and the last block begin earlier and compute some outputs twice, instead of being smaller. Where
    // there are fewer pixels than ROWS the first is computed in place of what is missing, and not stored.
    void run_pass(int64_t group, int64_t pass, int64_t first, int64_t stop) const {
        const Shape local = shape;  // in registers, as far as they go: what is stored may not lie in a local variable
        const Scalars scalars = numbers;
        const int64_t all = pixels(), together = panels_together(), last = local.group_vectors - COLUMNS, bytes = vector_bytes();
        const int64_t group_c = local.c / local.groups, group_out = local.out_c / local.groups;
        const int64_t first_panel = pass * together, end_panel = first_panel + together < panels() ? first_panel + together : panels();
        const int64_t pairs = Kernel::FITS_16 ? runs() * (local.run / 8) : 0;  // of a vector
        const int8_t* weight = packed_weight(channels, local.channels);
        const int8_t* overflows = weight + local.groups * local.group_vectors * bytes;
        [[maybe_unused]] const int32_t* const x_zero_points = (const int32_t*)local.x_zero_points;
        const uint8_t* image = x + group * group_c;
        // Rows of the kernel outside of the image are left out where they add nothing, because what they read is 0.
        const bool reads_0 = scalars.x_zero_point + (Kernel::SIGNED ? 128 : 0) == 0;
        const bool skips = reads_0 && local.pad_h && local.padded_d == 1 && all >= ROWS;
        Walker walker(local, image, first * ROWS);
        for (int64_t block = first; block < stop; ++block) {
            int64_t pixel = block * ROWS;
            if (__builtin_expect(pixel + ROWS > all, 0)) {
                pixel = all > ROWS ? all - ROWS : 0;
                walker = Walker(local, image, pixel);
            }
            const int valid = all < ROWS ? all : ROWS;
            const uint8_t* bases[ROWS];
            const int64_t first_line = walker.line;
            const uint8_t* const first_image = walker.image_base;
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; ++row) {
                bases[row] = row < valid ? walker.base : bases[0];
                walker.next();
            }
            [[maybe_unused]] int32_t zero_points[ROWS];
            if constexpr (Epilogue::DYNAMIC) {
#pragma GCC unroll 16
                for (int row = 0; row < ROWS; ++row) {
                    const int64_t there = (row < valid ? pixel + row : pixel) * local.x_zero_points_step;
                    zero_points[row] = x_zero_points[there] + (Kernel::SIGNED ? 128 : 0);
                }
            }
            KernelRows kernel_rows = {0, local.kernel_d * local.kernel_h};
            if (skips && walker.last_image() == first_image) kernel_rows = rows_inside(local, first_line, walker.last_line());
            for (int64_t panel = first_panel; panel < end_panel; ++panel) {
                const int64_t column = panel * COLUMNS < last ? panel * COLUMNS : last;
                const int64_t vector = group * local.group_vectors + column, c = column * LANES, rest = group_out - c;
                Ints sums[ROWS][COLUMNS];
                multiply<Kernel, Epilogue::DYNAMIC, ROWS>(
                    local, bases, weight + vector * bytes,
                    overflows + vector * pairs, channels + vector * LANES, zero_points, kernel_rows, sums);
                const int64_t to_c = group * group_out + c;
                const Target<Epilogue> target = {
                    channels + vector * LANES, local.channels,
                    other + pixel * local.other_pixel + to_c, local.other_pixel,
                    out + pixel * local.out_pixel + to_c, local.out_pixel,
                    (const float*)local.x_scales + pixel * local.x_scales_step, local.x_scales_step,
                    rest < COLUMNS * LANES ? (int)rest : COLUMNS * LANES, valid};
                finish_all<Epilogue, ROWS, COLUMNS, true>(sums, scalars, target);
            }
        }
    }
};

template <class Kernel, class Epilogue>
inline void convolution(
    const uint8_t* x, const int32_t* channels, const typename Epilogue::Other* other, typename Epilogue::Out* out,
    const X86qArguments& arguments) {
    static_assert(1 <= Kernel::ROWS && 1 <= Kernel::COLUMNS && Kernel::COLUMNS <= 4, "no more columns are packed together");
    const Shape shape(arguments);
    const Scalars numbers = scalars<Epilogue>(channels, shape);
    const int64_t padded_rows = shape.n * shape.padded_d * shape.padded_h;
    const Scratch padded(shape.is_copied ? padded_rows * shape.padded_w * shape.c : 0);
    on_threads(shape.threads, [&](const Worker& worker) {
        const uint8_t* image = x;
        if (shape.is_copied) {
            image = padded.bytes;
            worker.share(padded_rows, [&](int64_t first, int64_t end) {
                for (int64_t row = first; row < end; ++row) pad_row(shape, x, padded.bytes, row, numbers.x_zero_point);
            });
            worker.meet();
        }
        if (shape.n * shape.out_d * shape.out_h * shape.out_w == 1)
            Blocks<Kernel, Epilogue, 1>{shape, numbers, image, channels, other, out}.run(worker);
        else
            Blocks<Kernel, Epilogue, Kernel::ROWS>{shape, numbers, image, channels, other, out}.run(worker);
    });
}
