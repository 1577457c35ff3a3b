// The sizes of a layer, and what follows from them.

struct Shape : X86qArguments {
    int64_t out_d, out_h, out_w, padded_d, padded_h, padded_w;
    int64_t read_image, read_plane, read_row, read_pixel;  // strides of what is read: of the copy, where there is one

    explicit Shape(const X86qArguments& arguments) : X86qArguments(arguments) {
        padded_d = d + 2 * pad_d;
        padded_h = h + 2 * pad_h;
        padded_w = w + 2 * pad_w;
        out_d = outputs(padded_d, kernel_d, dilation_d, stride_d);
        out_h = outputs(padded_h, kernel_h, dilation_h, stride_h);
        out_w = outputs(padded_w, kernel_w, dilation_w, stride_w);
        read_pixel = is_copied ? c : x_pixel;
        read_row = is_copied ? padded_w * c : x_row;
        read_plane = is_copied ? padded_h * read_row : x_plane;
        read_image = is_copied ? padded_d * read_plane : x_image;
    }

    static int64_t outputs(int64_t size, int64_t kernel, int64_t dilation, int64_t stride) {
        return (size - dilation * (kernel - 1) - 1) / stride + 1;
    }
};
