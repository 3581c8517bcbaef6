//! What the words of a device's error mean for the work that comes after it. Pure.

/// What an error of a forward pass means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A smaller pack may fit.
    OutOfMemory,
    /// The device's context is broken for good: whatever is asked of it fails, until the process starts anew.
    Lost,
    /// It concerns this pack alone.
    Other,
}

/// Errors after which every later call of the process fails as well (CUDA driver API, `CUresult`: "this leaves the process
/// in an inconsistent state and any further CUDA work will return the same error").
const STICKY: [&str; 16] = [
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_CONTAINED",
    // A card that has fallen off its bus, or that another process has to itself: what ends is the same.
    "CUDA_ERROR_NO_DEVICE",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_UNKNOWN",
];

const OUT_OF_MEMORY: [&str; 2] = ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"];

impl Fault {
    /// Of an error as candle words it, which names the driver's and cuBLAS' codes.
    pub fn of(words: &str) -> Self {
        let says = |codes: &[&str]| codes.iter().any(|code| words.contains(code));
        // A broken context answers a later allocation with its own error, so that one counts first.
        if says(&STICKY) {
            Self::Lost
        } else if says(&OUT_OF_MEMORY) {
            Self::OutOfMemory
        } else {
            Self::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_an_error_say_what_comes_after_it() {
        assert_eq!(Fault::of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"), Fault::OutOfMemory);
        assert_eq!(Fault::of("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), Fault::OutOfMemory);
        assert_eq!(Fault::of("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")"), Fault::Lost);
        for code in ["UNKNOWN", "CONTAINED", "NO_DEVICE", "DEVICE_UNAVAILABLE"] {
            assert_eq!(Fault::of(&format!("DriverError(CUDA_ERROR_{code}, \"...\")")), Fault::Lost, "{code}");
        }
        assert_eq!(Fault::of("DriverError(CUDA_ERROR_INVALID_VALUE, \"invalid argument\")"), Fault::Other);
        assert_eq!(Fault::of("CUDA_ERROR_OUT_OF_MEMORY after CUDA_ERROR_LAUNCH_FAILED"), Fault::Lost);
        assert_eq!(Fault::of("shape mismatch in matmul, lhs: [1, 2], rhs: [3, 4]"), Fault::Other);
    }
}
