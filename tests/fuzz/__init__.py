"""Random quantized graphs, compiled and compared with themselves run eagerly: `python -m tests.fuzz --help`."""
