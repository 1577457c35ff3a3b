"""What a kernel is, without FX and Inductor: its shape, epilogue, numbers, packing and C++."""
