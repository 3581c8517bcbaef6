//! The element types that a checkpoint may hold, and buffers of them.

use std::fmt;
use std::ops::Range;

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

    /// The largest finite value of a floating-point dtype.
    pub fn largest(self) -> Option<f64> {
        match self {
            Self::F64 => Some(f64::MAX),
            Self::F32 => Some(f32::MAX.into()),
            Self::F16 => Some(f16::MAX.into()),
            Self::Bf16 => Some(bf16::MAX.into()),
            _ => None,
        }
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

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
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

/// Runs the same expression on whichever vector the buffer holds.
macro_rules! each {
    ($elements:expr, $values:ident => $body:expr) => {
        match $elements {
            Elements::F64($values) => $body,
            Elements::F32($values) => $body,
            Elements::F16($values) => $body,
            Elements::Bf16($values) => $body,
            Elements::I64($values) => $body,
            Elements::I32($values) => $body,
            Elements::I16($values) => $body,
            Elements::Bytes($values) => $body,
        }
    };
}

impl Elements {
    pub fn len(&self) -> usize {
        each!(self, values => values.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes this a buffer of `len` elements of `dtype`. Memory of the same type is reused and keeps whatever it held, so
    /// the caller must overwrite all of it.
    pub fn reset(&mut self, dtype: Dtype, len: usize) {
        match (dtype, &*self) {
            (Dtype::F64, Self::F64(_)) | (Dtype::F32, Self::F32(_)) | (Dtype::F16, Self::F16(_)) | (Dtype::Bf16, Self::Bf16(_)) => {}
            (Dtype::I64, Self::I64(_)) | (Dtype::I32, Self::I32(_)) | (Dtype::I16, Self::I16(_)) => {}
            (Dtype::I8 | Dtype::U8 | Dtype::Bool, Self::Bytes(_)) => {}
            (Dtype::F64, _) => *self = Self::F64(Vec::new()),
            (Dtype::F32, _) => *self = Self::F32(Vec::new()),
            (Dtype::F16, _) => *self = Self::F16(Vec::new()),
            (Dtype::Bf16, _) => *self = Self::Bf16(Vec::new()),
            (Dtype::I64, _) => *self = Self::I64(Vec::new()),
            (Dtype::I32, _) => *self = Self::I32(Vec::new()),
            (Dtype::I16, _) => *self = Self::I16(Vec::new()),
            (Dtype::I8 | Dtype::U8 | Dtype::Bool, _) => *self = Self::Bytes(Vec::new()),
        }
        each!(self, values => values.resize(len, Default::default()))
    }

    /// Takes the other's elements, into the memory at hand where it is of the same type.
    pub fn copy_from(&mut self, other: &Self) {
        match (self, other) {
            (Self::F64(into), Self::F64(from)) => into.clone_from(from),
            (Self::F32(into), Self::F32(from)) => into.clone_from(from),
            (Self::F16(into), Self::F16(from)) => into.clone_from(from),
            (Self::Bf16(into), Self::Bf16(from)) => into.clone_from(from),
            (Self::I64(into), Self::I64(from)) => into.clone_from(from),
            (Self::I32(into), Self::I32(from)) => into.clone_from(from),
            (Self::I16(into), Self::I16(from)) => into.clone_from(from),
            (Self::Bytes(into), Self::Bytes(from)) => into.clone_from(from),
            (into, from) => *into = from.clone(),
        }
    }

    /// The elements' memory, in the byte order of this machine.
    pub fn bytes(&self) -> &[u8] {
        each!(self, values => bytemuck::cast_slice(values))
    }

    /// The elements' memory, to be filled with their little-endian bytes; [`Elements::from_little_endian`] must follow.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        each!(self, values => bytemuck::cast_slice_mut(values))
    }

    /// Turns little-endian bytes that lie in the buffer into numbers (and back): nothing to do on nearly every machine.
    pub fn from_little_endian(&mut self) {
        if cfg!(target_endian = "big") {
            let size = each!(self, values => element_size(values));
            self.bytes_mut().chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
    }

    /// Calls `with` on the elements in their stored form, little-endian bytes.
    pub fn with_little_endian<R>(&self, with: impl FnOnce(&[u8]) -> R) -> R {
        if cfg!(target_endian = "big") {
            let mut stored = self.clone();
            stored.from_little_endian();
            with(stored.bytes())
        } else {
            with(self.bytes())
        }
    }

    /// The floating-point elements `range` as float64, exactly; `into` has as many places, and all values are finite. Of
    /// integers nothing is taken.
    pub fn widen(&self, range: Range<usize>, into: &mut [f64]) {
        match self {
            Self::F64(values) => copy(values, range, into, |x| x),
            Self::F32(values) => copy(values, range, into, f64::from),
            Self::F16(values) => copy(values, range, into, widen_f16),
            Self::Bf16(values) => copy(values, range, into, widen_bf16),
            Self::I64(_) | Self::I32(_) | Self::I16(_) | Self::Bytes(_) => {}
        }
    }

    /// Index and value of the first NaN or infinity; integers have none.
    pub fn first_non_finite(&self) -> Option<(usize, f64)> {
        match self {
            Self::F64(values) => first_with(values, |value| !value.is_finite(), |value| value),
            Self::F32(values) => first_with(values, |value| !value.is_finite(), f64::from),
            Self::F16(values) => first_with(values, |value| value.to_bits() & 0x7c00 == 0x7c00, f64::from),
            Self::Bf16(values) => first_with(values, |value| value.to_bits() & 0x7f80 == 0x7f80, f64::from),
            Self::I64(_) | Self::I32(_) | Self::I16(_) | Self::Bytes(_) => None,
        }
    }
}

#[inline(always)]
fn copy<T: Copy>(values: &[T], range: Range<usize>, into: &mut [f64], widen: impl Fn(T) -> f64) {
    let values = values.get(range).unwrap_or_default();
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || into.iter_mut().zip(values).for_each(|(into, &value)| *into = widen(value)),
    );
}

#[inline(always)]
pub fn widen_bf16(value: bf16) -> f64 {
    f64::from(f32::from_bits(u32::from(value.to_bits()) << 16))
}

/// Exact for finite values: exponent and mantissa move to their places in a float32, and a multiplication by `2^112`
/// corrects the exponent's bias, for subnormal values too. Unlike the instruction for it, this is vectorised everywhere.
#[inline(always)]
pub fn widen_f16(value: f16) -> f64 {
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f64::from(f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16))
}

fn element_size<T>(_: &[T]) -> usize {
    size_of::<T>()
}

// A search that may stop at every element is not vectorised; a fold over a block is, and blocks with a hit are rare.
fn first_with<T: Copy>(values: &[T], bad: impl Fn(T) -> bool, wide: impl Fn(T) -> f64) -> Option<(usize, f64)> {
    const BLOCK: usize = 4096;
    let block = values.chunks(BLOCK).position(|block| block.iter().fold(false, |found, &value| found | bad(value)))?;
    let (index, &value) = values.iter().enumerate().skip(block * BLOCK).find(|&(_, &value)| bad(value))?;
    Some((index, wide(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_takes_the_dtype_it_is_asked_for_and_reuses_its_memory() {
        let mut elements = Elements::default();
        for name in ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"] {
            let dtype = Dtype::from_safetensors_name(name).unwrap();
            elements.reset(dtype, 5);
            assert_eq!((elements.len(), elements.bytes().len()), (5, 5 * dtype.size()), "{name}");
        }
        elements.reset(Dtype::F32, 100);
        let Elements::F32(values) = &elements else { panic!("{elements:?}") };
        let place = values.as_ptr();
        elements.reset(Dtype::F32, 3);
        elements.reset(Dtype::F32, 100);
        let Elements::F32(values) = &elements else { panic!("{elements:?}") };
        assert_eq!(values.as_ptr(), place);
    }

    #[test]
    fn the_first_non_finite_value_is_found_wherever_it_lies() {
        for at in [0, 1, 4095, 4096, 9999] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut f32s = vec![1.0_f32; 10_000];
                f32s[at] = bad;
                let bf16s = f32s.iter().map(|&x| bf16::from_f32(x)).collect();
                let f16s = f32s.iter().map(|&x| f16::from_f32(x)).collect();
                let f64s = f32s.iter().map(|&x| x.into()).collect();
                for elements in [Elements::F32(f32s.clone()), Elements::Bf16(bf16s), Elements::F16(f16s), Elements::F64(f64s)] {
                    let (index, value) = elements.first_non_finite().unwrap();
                    assert_eq!((index, value.to_string()), (at, bad.to_string()));
                }
            }
        }
        let largest = [
            Elements::F16(vec![f16::MAX, f16::MIN]),
            Elements::Bf16(vec![bf16::MAX]),
            Elements::F32(vec![f32::MIN]),
            Elements::F64(vec![f64::MAX]),
        ];
        for elements in largest {
            assert_eq!(elements.first_non_finite(), None);
        }
    }
}
