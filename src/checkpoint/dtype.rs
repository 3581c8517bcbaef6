//! The element types that a checkpoint may hold, and buffers of them.

use half::{bf16, f16};

/// The dtype of a stored tensor. Only the floating-point ones can be averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The name in a safetensors header.
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
        }
    }

    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::Bf16, Self::I64, Self::I32, Self::I16, Self::I8, Self::U8, Self::Bool]
            .into_iter()
            .find(|dtype| dtype.safetensors_name() == name)
    }
}

/// A buffer of tensor elements in their stored type. The typed vectors (never bytes cast in place) keep the alignment
/// right without unsafe code.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    I16(Vec<i16>),
    /// `I8`, `U8` and `BOOL`: one byte an element, kept as it is.
    Bytes(Vec<u8>),
}

impl Default for Elements {
    fn default() -> Self {
        Self::F32(Vec::new())
    }
}
