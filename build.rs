//! Compiles the wire contract with protox, which is written in Rust: no `protoc` has to be installed.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["warm/v1/reward.proto", "warm/v1/model.proto"], ["proto"])?;
    // Reflection hands these bytes to clients such as grpcurl.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("warm_descriptor.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    // The kernels for cards, into `groups.ptx` beside it; as candle builds its own.
    #[cfg(feature = "cuda")]
    cudaforge::KernelBuilder::new().source_files(["src/model/device/groups.cu"]).arg("-std=c++17").arg("-O3").build_ptx()?;
    Ok(())
}
