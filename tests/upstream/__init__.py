"""Bugs of torch and oneDNN that this package works around: each a program that shows it, and a report ready to file.

Each is an xfail that is strict, so that it fails when upstream mends it: then what works around it can go, on the versions
that have it mended. A docstring's first line is the report's title.

Not here, since they did not show on the CPU at hand (Zen 4: AVX-512, VNNI, bfloat16; torch 2.13.0 and 2.15.0, and with
ONEDNN_MAX_CPU_ISA at AVX512_CORE_VNNI and below): outputs of a convolution that read padding only, and groups of one input
and more than 16 outputs. They were seen on another CPU with VNNI; the layers still stay float.
"""
