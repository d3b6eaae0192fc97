//! Compiles the GPU's kernels: to PTX for a real device (feature `cuda`), or to machine code for the emulator that the
//! tests run them on (feature `kernel-emulation`). Without either there is nothing to do.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    #[cfg(feature = "cuda")]
    compile_ptx()?;
    #[cfg(feature = "kernel-emulation")]
    compile_emulator()?;
    Ok(())
}

/// To OUT_DIR/kernels.ptx with nvcc, for the compute capability in CUDA_COMPUTE_CAP, or that of the GPU in this machine.
#[cfg(feature = "cuda")]
fn compile_ptx() -> Result<(), Box<dyn std::error::Error>> {
    cudaforge::KernelBuilder::new()
        .source_files(["kernels/kernels.cu"])
        .watch(["kernels"])
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()?;
    Ok(())
}

#[cfg(feature = "kernel-emulation")]
fn compile_emulator() -> Result<(), Box<dyn std::error::Error>> {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        // The C library's check of jumps does not know of other stacks.
        .flag("-U_FORTIFY_SOURCE")
        .file("kernels/emulator/emulator.cpp")
        // nvcc's `#pragma unroll`.
        .flag_if_supported("-Wno-unknown-pragmas")
        .try_compile("lengthwise_kernels")?;
    Ok(())
}
