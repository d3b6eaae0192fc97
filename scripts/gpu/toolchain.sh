#!/usr/bin/env bash
# scripts/gpu/toolchain.sh DIR
#
# Makes DIR/cuda: one CUDA_HOME (13.0) out of PyPI's nvidia-* wheels, enough to
# build candle 0.11 with its `cuda` feature on a machine that has neither a GPU,
# nor a driver, nor a CUDA toolkit. Writes DIR/env.sh, to be sourced before cargo.
#
# Instead of the real libcuda/libcublas/libcublasLt/libcurand/libnvrtc it puts
# small static "shim" archives in the library folder: cudarc's `dynamic-linking`
# feature (which candle selects and nobody can switch off) then links those, and
# each shim dlopen()s the real library at the first call. So the binary names no
# CUDA library in its NEEDED list: it starts without a driver, and finds the real
# libraries through LD_LIBRARY_PATH (or $CUDA_SHIM_PATH) where there is one.
# libcudart is linked statically.
#
# Needs: python3 with pip, gcc, ar, cargo (only to fetch cudarc's source, whose
# list of functions the shims are made from). About 105 MB of downloads.
set -euo pipefail
DIR=$(mkdir -p "${1:?usage: toolchain.sh DIR}" && cd "$1" && pwd)
CUDARC_VERSION=${CUDARC_VERSION:-0.19.10}
PY=${PYTHON:-python3}

if [ ! -x "$DIR/cuda/bin/nvcc" ]; then
  tmp=$(mktemp -d "$DIR/wheels.XXXXXX")
  # nvcc:    bin/{nvcc,cudafe++,ptxas,fatbinary,nvlink,bin2c}, nvcc.profile
  # nvvm:    nvvm/bin/cicc, nvvm/libdevice/libdevice.10.bc   (nvcc cannot run without)
  # crt:     include/crt/*.h                                  (idem)
  # runtime: include/cuda*.h, lib/libcudart_static.a, libcudadevrt.a
  # cccl:    include/cccl/{cub,thrust,cuda,nv}                (candle-kernels: cuda_fp8 etc., cub)
  # curand:  include/curand*.h - not needed by candle-kernels, left out (60 MB)
  # cublas, nvrtc: libraries only, not needed at build time, left out
  "$PY" -m pip download -q --no-deps --only-binary=:all: -d "$tmp" \
     --python-version 3.12 --implementation cp \
     --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
     --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 \
     nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
     nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  rm -rf "$DIR/cuda.new"; mkdir "$DIR/cuda.new"
  "$PY" - "$tmp" "$DIR/cuda.new" <<'PYEOF'
import glob, os, stat, sys, zipfile
src, dst = sys.argv[1:]
for w in sorted(glob.glob(src + "/*.whl")):
    with zipfile.ZipFile(w) as z:
        for i in z.infolist():
            p = "nvidia/cu13/"
            if not i.filename.startswith(p) or i.is_dir():
                continue
            rel = i.filename[len(p):]
            if rel.startswith(".metadata") or rel.endswith("libnvvm.so.4"):
                continue
            out = os.path.join(dst, rel)
            os.makedirs(os.path.dirname(out), exist_ok=True)
            with z.open(i) as f, open(out, "wb") as g:
                while b := f.read(1 << 20):
                    g.write(b)
            if rel.startswith(("bin/", "nvvm/bin/")) and not rel.endswith((".profile", ".stub")):
                os.chmod(out, 0o755)
PYEOF
  rm -rf "$tmp"
  cd "$DIR/cuda.new"
  ln -s lib lib64                                   # cudaforge and nvcc.profile say lib64
  ln -s libcudart_static.a lib/libcudart.a          # -lcudart -> static
  rm -f lib/libcudart.so*                           # no shared one to be taken by mistake
  cd "$DIR"; rm -rf cuda; mv cuda.new cuda
fi

# ---- shims -----------------------------------------------------------------
if [ ! -f "$DIR/cuda/lib/libnvrtc.a" ]; then
  shim=$DIR/shim; rm -rf "$shim"; mkdir -p "$shim"
  # cudarc's source, through cargo (from the local registry cache when it is there)
  src=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$CUDARC_VERSION" 2>/dev/null | head -1 || true)
  if [ -z "$src" ]; then
    mkdir -p "$shim/fetch/src"; : > "$shim/fetch/src/lib.rs"
    printf '[package]\nname="f"\nversion="0.0.0"\nedition="2021"\n[dependencies]\ncudarc={version="=%s",default-features=false}\n[workspace]\n' \
       "$CUDARC_VERSION" > "$shim/fetch/Cargo.toml"
    (cd "$shim/fetch" && cargo fetch -q)
    src=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$CUDARC_VERSION" | head -1)
  fi
  "$PY" - "$src" "$shim" <<'PYEOF'
import re, sys
src, out = sys.argv[1:]
#        module      archive      sonames tried                                   value returned when absent
LIBS = [("driver",   "cuda",     ["libcuda.so.1"],                                 100),  # CUDA_ERROR_NO_DEVICE
        ("cublas",   "cublas",   ["libcublas.so.13", "libcublas.so.12"],             1),  # NOT_INITIALIZED
        ("cublaslt", "cublasLt", ["libcublasLt.so.13", "libcublasLt.so.12"],         1),
        ("curand",   "curand",   ["libcurand.so.10"],                              101),  # NOT_INITIALIZED
        ("nvrtc",    "nvrtc",    ["libnvrtc.so.13", "libnvrtc.so.12"],               11)]  # INTERNAL_ERROR
for mod, lib, sonames, err in LIBS:
    text = open(f"{src}/src/{mod}/sys/mod.rs").read()
    names = sorted(set(re.findall(r'extern "C" \{\s*fn (\w+)\(', text)))
    assert len(names) > 20, (mod, len(names))
    c = ['#define _GNU_SOURCE', '#include <dlfcn.h>', '#include <stdio.h>', '#include <stdlib.h>', '']
    c += ['static const char *const so_names[] = {' + ', '.join(f'"{s}"' for s in sonames) + ', 0};']
    c += ['static const char *const fn_names[] = {'] + [f'  "{n}",' for n in names] + ['};', '']
    c += [f'static int absent(void) {{ return {err}; }}']
    if mod == "driver":
        c += ['static int absent_str(int e, const char **s) { (void)e; *s = "no CUDA driver (libcuda.so.1) on this machine"; return 0; }']
    c += [f'''
__attribute__((visibility("hidden"))) void *shim_{lib}_tab[{len(names)}];
static void *handle(void) {{
  static void *h; static int tried;
  if (__atomic_load_n(&tried, __ATOMIC_ACQUIRE)) return h;
  void *n = 0;
  const char *dir = getenv("CUDA_SHIM_PATH");
  for (int i = 0; so_names[i] && !n; i++) {{
    if (dir && *dir) {{ char p[4096]; snprintf(p, sizeof p, "%s/%s", dir, so_names[i]); n = dlopen(p, RTLD_NOW | RTLD_GLOBAL); }}
    if (!n) n = dlopen(so_names[i], RTLD_NOW | RTLD_GLOBAL);
  }}
  if (!n && getenv("CUDA_SHIM_DEBUG")) fprintf(stderr, "cuda shim: %s\\n", dlerror());
  h = n; __atomic_store_n(&tried, 1, __ATOMIC_RELEASE);
  return h;
}}
__attribute__((visibility("hidden"), used)) void *shim_{lib}_resolve(long i) {{
  void *h = handle(), *f = h ? dlsym(h, fn_names[i]) : 0;
  if (h && !f && getenv("CUDA_SHIM_DEBUG")) fprintf(stderr, "cuda shim: no %s in %s\\n", fn_names[i], so_names[0]);
  if (!f) {{''']
    if mod == "driver":
        c += ['    const char *n = fn_names[i];',
              '    if (!__builtin_strcmp(n, "cuGetErrorName") || !__builtin_strcmp(n, "cuGetErrorString")) f = (void *)absent_str; else']
    c += [f'''    f = (void *)absent;
  }}
  __atomic_store_n(&shim_{lib}_tab[i], f, __ATOMIC_RELEASE);
  return f;
}}
__asm__(".text\\n"
"shim_{lib}_slow:\\n"                    // rax = index; all argument registers live
" push %rbp\\n mov %rsp,%rbp\\n and $-16,%rsp\\n sub $192,%rsp\\n"
" mov %rdi,0(%rsp)\\n mov %rsi,8(%rsp)\\n mov %rdx,16(%rsp)\\n mov %rcx,24(%rsp)\\n mov %r8,32(%rsp)\\n mov %r9,40(%rsp)\\n"
" movups %xmm0,64(%rsp)\\n movups %xmm1,80(%rsp)\\n movups %xmm2,96(%rsp)\\n movups %xmm3,112(%rsp)\\n"
" movups %xmm4,128(%rsp)\\n movups %xmm5,144(%rsp)\\n movups %xmm6,160(%rsp)\\n movups %xmm7,176(%rsp)\\n"
" mov %rax,%rdi\\n call shim_{lib}_resolve\\n mov %rax,%r11\\n"
" mov 0(%rsp),%rdi\\n mov 8(%rsp),%rsi\\n mov 16(%rsp),%rdx\\n mov 24(%rsp),%rcx\\n mov 32(%rsp),%r8\\n mov 40(%rsp),%r9\\n"
" movups 64(%rsp),%xmm0\\n movups 80(%rsp),%xmm1\\n movups 96(%rsp),%xmm2\\n movups 112(%rsp),%xmm3\\n"
" movups 128(%rsp),%xmm4\\n movups 144(%rsp),%xmm5\\n movups 160(%rsp),%xmm6\\n movups 176(%rsp),%xmm7\\n"
" leave\\n jmp *%r11\\n");
#define SHIM(i, name) __asm__(".text\\n.globl " #name "\\n.type " #name ",@function\\n" #name ":\\n" \\
  " endbr64\\n mov shim_{lib}_tab+8*" #i "(%rip),%r11\\n test %r11,%r11\\n jz 1f\\n jmp *%r11\\n" \\
  "1: mov $" #i ",%eax\\n jmp shim_{lib}_slow\\n.size " #name ",.-" #name "\\n");''']
    c += [f'SHIM({i}, {n})' for i, n in enumerate(names)]
    open(f"{out}/{lib}.c", "w").write('\n'.join(c) + '\n')
    print(f"shim {lib}: {len(names)} functions")
PYEOF
  for l in cuda cublas cublasLt curand nvrtc; do
    gcc -O2 -fPIC -c "$shim/$l.c" -o "$shim/$l.o"
    rm -f "$DIR/cuda/lib/lib$l.a"
    ar rcs "$DIR/cuda/lib/lib$l.a" "$shim/$l.o"
  done
fi

# ---- nvcc-nogguf: nvcc, but quick ---------------------------------------------
# cudaforge (candle-kernels, candle-flash-attn) runs $NVCC. candle-kernels compiles
# 10 files of GGUF matrix kernels (mmq_instance_*.cu, 32 big kernels each) that no
# program with bf16/f16/f32 weights launches: about 44 s of CPU and 3 MB of binary each.
# This wrapper compiles a stub in their place, which aborts with a message.
# NVCC=$CUDA_HOME/bin/nvcc builds the real ones (cargo sees NVCC change).
cat > "$DIR/cuda/bin/nvcc-nogguf" <<'EOF2'
#!/usr/bin/env bash
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
src=${!#}
case $src in *mmq_instance_*.cu)
  out=; prev=
  for a in "$@"; do if [ "$prev" = -o ]; then out=$a; fi; prev=$a; done
  fn=launch_mmq_gguf_$(basename "$src" .cu | sed 's/^mmq_instance_//')
  grep -q "void $fn(" "$src"
  printf '#include <cstdio>\n#include <cstdlib>\nextern "C" void %s() { fprintf(stderr, "%s: built by nvcc-nogguf\\n"); abort(); }\n' "$fn" "$fn" |
    g++ -O2 -fPIC -x c++ -c -o "$out" -
  exit 0;;
esac
exec "$here/nvcc" "$@"
EOF2
chmod +x "$DIR/cuda/bin/nvcc-nogguf"

cat > "$DIR/env.sh" <<EOF2
# source this before: cargo build --release --features cuda
export CUDA_HOME="$DIR/cuda" CUDA_PATH="$DIR/cuda" NVCC="$DIR/cuda/bin/nvcc-nogguf"
export PATH="$DIR/cuda/bin:\$PATH"
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
export CUDARC_CUDA_VERSION=13000
export CUDAFORGE_THREADS=\${CUDAFORGE_THREADS:-2}
EOF2
"$DIR/cuda/bin/nvcc" --version | tail -2
echo "ready: source $DIR/env.sh"
