#!/usr/bin/env python3
"""Compiles the kernels beside this file to the PTX that the library embeds.

usage: compile.py LIBNVRTC

The committed files were made with NVRTC 12.0.76, whose PTX every driver from CUDA 12.0 on reads:

    pip download --no-deps nvidia-cuda-nvrtc-cu12==12.0.76 && unzip nvidia_cuda_nvrtc_cu12-*.whl
    src/device/cuda/kernels/compile.py nvidia/cuda_nvrtc/lib/libnvrtc.so.12
"""
import ctypes
import pathlib
import sys

OPTIONS = [b"--gpu-architecture=compute_80", b"--std=c++03"]


def text_of(nvrtc, program, what):
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
        return ""
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


def compiled(nvrtc, source):
    program = ctypes.c_void_p()
    code = source.read_bytes()
    name = source.name.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, name, 0, None, None) != 0:
        sys.exit(f"{source}: no program")
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    result = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    print(text_of(nvrtc, program, "ProgramLog").strip("\0\n"), file=sys.stderr, end="")
    if result != 0:
        sys.exit(f"{source}: error {result}")
    return text_of(nvrtc, program, "PTX")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    library = pathlib.Path(sys.argv[1]).resolve()
    # It looks for its companion by name only.
    for companion in library.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(companion), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    for source in sorted(pathlib.Path(__file__).resolve().parent.glob("*.cu")):
        source.with_suffix(".ptx").write_text(compiled(nvrtc, source))


main()
