"""What CUDA schedules share: code with its launches, compiling without a GPU, emulation on the CPU."""
