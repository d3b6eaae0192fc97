//! Compiles the GPU's kernels: for a real device (feature `cuda`), or to machine code for the emulator that the tests run
//! them on (feature `kernel-emulation`). Without either there is nothing to do.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    #[cfg(feature = "cuda")]
    compile_kernels()?;
    #[cfg(feature = "kernel-emulation")]
    compile_emulator()?;
    Ok(())
}

/// To OUT_DIR/kernels.fatbin with nvcc: machine code for the compute capability in CUDA_COMPUTE_CAP, or that of the GPU in
/// this machine, and PTX that newer GPUs' drivers compile.
#[cfg(feature = "cuda")]
fn compile_kernels() -> Result<(), Box<dyn std::error::Error>> {
    for variable in ["CUDA_COMPUTE_CAP", "NVCC", "NVCC_CCBIN", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    // Without a suffix as of `sm_90a`: PTX with one runs on that capability alone.
    let capability = cudaforge::detect_compute_cap()?.base();
    // Without bf16 on tensor cores and asynchronous copies there are no kernels of prompts.
    if capability < 80 {
        return Err(format!("the kernels need a GPU of compute capability 8.0 or higher, not {capability}").into());
    }
    println!("cargo:rustc-env=KERNELS_CAPABILITY={capability}");
    let output = std::path::Path::new(&std::env::var("OUT_DIR")?).join("kernels.fatbin");
    let mut nvcc = std::process::Command::new(cudaforge::CudaToolkit::detect()?.nvcc_path);
    nvcc.args(["-std=c++17", "-O3", "--fatbin"]);
    nvcc.arg(format!(
        "-gencode=arch=compute_{capability},code=[sm_{capability},compute_{capability}]"
    ));
    if let Ok(compiler) = std::env::var("NVCC_CCBIN") {
        nvcc.arg("-ccbin").arg(compiler);
    }
    let status = nvcc.arg("-o").arg(output).arg("kernels/kernels.cu").status()?;
    if !status.success() {
        return Err(format!("nvcc: {status}").into());
    }
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
