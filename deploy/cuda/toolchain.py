#!/usr/bin/env python3
"""A CUDA toolchain for building `warm --features cuda` on a machine that has neither a GPU, nor a driver, nor CUDA.

    python3 deploy/cuda/toolchain.py FOLDER            the compiler, and what is linked
    python3 deploy/cuda/toolchain.py FOLDER cutlass    with the headers of the flash kernels, from a wheel and not by git
    python3 deploy/cuda/toolchain.py FOLDER check      a compiler that compiles nothing: enough for `cargo clippy`

The compiler and the headers come from NVIDIA's own Python wheels. The libraries of the driver (libcuda, cuBLAS, ...) are not
needed to build: what the program calls of them is written here as small stand-ins, which look for the real library when they
are first called and report an error of that library where there is none. So one program starts on machines with and
without a card; `warm devices` says which it is. Nothing of a stand-in is to be shipped apart from the program.

Only for x86-64 Linux with pip, gcc and ar. Where CUDA is installed, none of this is needed.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# nvcc writes PTX for its own version, and a driver refuses PTX that is newer than itself: 13.0 is what the 580 line takes.
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-runtime==13.0.96",
]
PLATFORMS = ["manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_12_x86_64", "manylinux2010_x86_64"]

# The name to link by: the file to open, where the crate declares its functions, and the library's own code for "not there".
LIBRARIES = {
    "cuda": ("libcuda.so.1", "driver", 100),  # CUDA_ERROR_NO_DEVICE
    "cublas": ("libcublas.so.13", "cublas", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("libcublasLt.so.13", "cublaslt", 1),
    "curand": ("libcurand.so.10", "curand", 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nvrtc": ("libnvrtc.so.13", "nvrtc", 11),  # NVRTC_ERROR_INTERNAL_ERROR
}

# The headers of the version that candle-flash-attn names by its commit.
CUTLASS = "nvidia-cutlass==3.5.0.0"

# What the build scripts ask of nvcc: its version in its own fourth line, what it compiles for, and a file for every -o. Nothing of it reaches a program that is only checked.
NO_COMPILER = """#!/bin/sh
case " $* " in
  *" --version "*) printf 'nvcc\\n\\n\\nCuda compilation tools, release 13.0, V13.0.88\\n'; exit ;;
  *" --list-gpu-code "*) printf 'sm_80\\nsm_89\\nsm_90\\n'; exit ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o | --output-file) : >"$2"; shift ;;
    --output-directory=*) folder=${1#*=} ;;
    --output-directory | -odir) folder=$2; shift ;;
    *.cu) sources="$sources $1" ;;
  esac
  shift
done
for source in $sources; do
  [ -z "$folder" ] || : >"$folder/$(basename "$source" .cu).ptx"
done
"""

LOOK_UP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

static const char *const NAMES[] = {{{names}}};
__attribute__((visibility("hidden"))) void *{library}_targets[{count}];
static void *opened;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static long absent(void) {{ return {absent}; }}

static void open_it(void) {{
  static const char *const FOLDERS[] = {{"", "/usr/local/cuda/lib64/", "/usr/local/nvidia/lib64/", "/usr/lib/x86_64-linux-gnu/"}};
  char path[256];
  for (unsigned i = 0; i < sizeof FOLDERS / sizeof *FOLDERS && !opened; i++) {{
    snprintf(path, sizeof path, "%s{file}", FOLDERS[i]);
    opened = dlopen(path, RTLD_LAZY | RTLD_GLOBAL);
  }}
}}

__attribute__((visibility("hidden"))) void *{library}_find(unsigned long index) {{
  pthread_once(&once, open_it);
  void *found = opened ? dlsym(opened, NAMES[index]) : 0;
  if (opened && !found) fprintf(stderr, "warm: {file} has no %s\\n", NAMES[index]);
  return {library}_targets[index] = found ? found : (void *)absent;
}}
"""

# Arguments stay where the caller put them: integers in six registers, the count of vector arguments in rax, vectors in eight.
INTEGERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax"]


def common(library):
    """Finds the function of the index on the stack, with every argument kept, and goes on there."""
    lines = [f"{library}_enter:", "  pushq %rbp", "  movq %rsp, %rbp", "  subq $192, %rsp", "  andq $-16, %rsp"]
    lines += [f"  movq %{name}, {8 * i}(%rsp)" for i, name in enumerate(INTEGERS)]
    lines += [f"  movups %xmm{i}, {64 + 16 * i}(%rsp)" for i in range(8)]
    lines += ["  movq 8(%rbp), %rdi", f"  call {library}_find", "  movq %rax, %r11"]
    lines += [f"  movups {64 + 16 * i}(%rsp), %xmm{i}" for i in range(8)]
    lines += [f"  movq {8 * i}(%rsp), %{name}" for i, name in enumerate(INTEGERS)]
    lines += ["  leave", "  addq $8, %rsp", "  jmpq *%r11"]
    return lines


def stand_in(library, names):
    lines = ["  .text", f"  .hidden {library}_targets", f"  .hidden {library}_find", *common(library)]
    for index, name in enumerate(names):
        lines += [f"  .globl {name}", f"  .type {name}, @function", f"{name}:"]
        lines += [f"  movq {library}_targets+{8 * index}(%rip), %r11", "  testq %r11, %r11", "  je 1f", "  jmpq *%r11"]
        lines += [f"1: pushq ${index}", f"  jmp {library}_enter", f"  .size {name}, . - {name}"]
    return "\n".join([*lines, '  .section .note.GNU-stack,"",@progbits', ""])


def declared(source, module):
    """The functions that the crate which candle calls CUDA through declares of one library."""
    names = sorted(set(re.findall(r"^\s+(?:pub )?fn (\w+)\s*\(", (source / "src" / module / "sys" / "mod.rs").read_text(), re.M)))
    if not names:
        sys.exit(f"{source}: no functions of {module} are declared there")
    return names


def build(folder, library, source):
    file, module, absent = LIBRARIES[library]
    names = declared(source, module)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        quoted = ", ".join(f'"{name}"' for name in names)
        text = LOOK_UP.format(names=quoted, count=len(names), library=library, file=file, absent=absent)
        (scratch / "find.c").write_text(text)
        (scratch / "enter.s").write_text(stand_in(library, names))
        for name in ("find.c", "enter.s"):
            subprocess.run(["gcc", "-O2", "-fPIC", "-c", name], cwd=scratch, check=True)
        archive = folder / f"lib{library}.a"
        archive.unlink(missing_ok=True)
        subprocess.run(["ar", "rcs", str(archive), "enter.o", "find.o"], cwd=scratch, check=True)
    print(f"{library}: {len(names)} functions of {file}")


def crate_source(crate):
    """Where cargo keeps a crate, in the version of Cargo.lock."""
    lock = (Path(__file__).resolve().parents[2] / "Cargo.lock").read_text()
    version = re.search(rf'name = "{crate}"\nversion = "([^"]+)"', lock)[1]
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    found = sorted(home.glob(f"registry/src/*/{crate}-{version}"))
    return found[-1] if found else sys.exit(f"{crate} {version} is not there: run `cargo fetch` first")


def clone_of_cutlass(forge):
    """Where candle's build helper looks for its own clone of these headers, and the commit that it asks git for there."""
    commit = re.search(r'CUTLASS_COMMIT: &str = "([0-9a-f]+)"', (crate_source("candle-flash-attn") / "build.rs").read_text())[1]
    return forge / "git" / "checkouts" / f"cutlass-{commit[:16]}", commit


def pretend_commit(clone, commit):
    subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
    (clone / ".git" / "HEAD").write_text(commit + "\n")


def cutlass(forge):
    clone, commit = clone_of_cutlass(forge)
    if (clone / "include" / "cute").is_dir() and (clone / ".git").is_dir():
        return
    shutil.rmtree(clone, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, CUTLASS], check=True)
        source = Path(scratch) / "cutlass_library" / "source"
        for part in ("include", "tools/util/include"):
            shutil.copytree(source / part, clone / part)
    pretend_commit(clone, commit)
    print(f"{CUTLASS}: {clone}")


def no_compiler(folder):
    nvcc = folder / "bin" / "nvcc"
    clone, commit = clone_of_cutlass(folder / "forge")
    for part in (nvcc.parent, folder / "include", folder / "lib64", clone / "include"):
        part.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(NO_COMPILER)
    nvcc.chmod(0o755)
    # Whoever looks for a toolkit looks for this header.
    (folder / "include" / "cuda.h").touch()
    pretend_commit(clone, commit)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    wheels = folder / "wheels"
    stamp = wheels / "WHEELS"
    if not stamp.exists() or stamp.read_text() != "\n".join(WHEELS):
        shutil.rmtree(wheels, ignore_errors=True)
        platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target", str(wheels)]
        subprocess.run([*pip, *platforms, *WHEELS], check=True)
        stamp.write_text("\n".join(WHEELS))
    cuda = next(wheels.glob("nvidia/cu*"))
    for tool in [*cuda.glob("bin/*"), *cuda.glob("nvvm/bin/*")]:
        tool.chmod(0o755)
    # nvcc looks for its libraries in lib64 beside itself.
    links = {folder / name: cuda / name for name in ("bin", "include", "nvvm")} | {cuda / "lib64": cuda / "lib"}
    libraries = folder / "lib"
    shutil.rmtree(libraries, ignore_errors=True)
    libraries.mkdir()
    links |= {folder / "lib64": libraries, libraries / "libcudart.a": cuda / "lib" / "libcudart_static.a"}
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve())
    source = crate_source("cudarc")
    for library in LIBRARIES:
        build(libraries, library, source)


if __name__ == "__main__":
    folder, *kind = [Path(sys.argv[1]).resolve(), *sys.argv[2:]] if len(sys.argv) > 1 else sys.exit(__doc__)
    if kind == ["check"]:
        no_compiler(folder)
    elif kind in ([], ["cutlass"]):
        main(folder)
        if kind:
            cutlass(folder / "forge")
    else:
        sys.exit(__doc__)
