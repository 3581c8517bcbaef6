//! The flash kernels held against plain attention in every shape that a family may ask for: what a bench runs on a card.

use candle_core::{DType, Device};
use serde::Serialize;

use super::{DeviceError, FlashKernel, Place, Shape, differences, flash};

/// One shape, and how far the kernel is from plain attention in it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlashCheck {
    pub head_dim: usize,
    pub causal: bool,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    /// The largest difference over the same bfloat16 rows; absent where the kernel refuses.
    pub from_plain: Option<f32>,
    /// The same over the rows before they were rounded.
    pub from_float32: Option<f32>,
    /// Why there are no differences.
    pub problem: Option<String>,
}

/// Head sizes of the families that are read, and those between which the kernels' sizes change.
const HEAD_SIZES: [usize; 9] = [32, 64, 80, 96, 128, 160, 192, 224, 256];
/// Without a window, within a block of keys, and over more than one.
const WINDOWS: [Option<usize>; 3] = [None, Some(5), Some(100)];

/// Checks the flash kernels of this build on a device, over sequences of which some have fewer queries than keys.
pub fn flash_checks(place: Place) -> Result<Vec<FlashCheck>, DeviceError> {
    if !flash::BUILT {
        return Err(place.error("this build has no flash attention; build with `--features cuda,flash-attn`"));
    }
    let device = place.opened()?;
    Ok(checks(flash::attend, &device, DType::BF16))
}

fn checks(kernel: FlashKernel, device: &Device, dtype: DType) -> Vec<FlashCheck> {
    let mut checks = Vec::new();
    for (head_dim, causal, window, softcap) in HEAD_SIZES.into_iter().flat_map(shapes) {
        let (heads, kv_heads, scale) = (6, 2, (head_dim as f32).powf(-0.5));
        let shape = Shape { heads, kv_heads, head_dim, scale, softcap, causal, window };
        let found = differences(&shape, kernel, device, dtype);
        let (from_plain, from_float32) = found.as_ref().map_or((None, None), |[plain, exact]| (Some(*plain), Some(*exact)));
        checks.push(FlashCheck { head_dim, causal, window, softcap, from_plain, from_float32, problem: found.err() });
    }
    checks
}

fn shapes(head_dim: usize) -> impl Iterator<Item = (usize, bool, Option<usize>, Option<f32>)> {
    let windows = move |causal: bool| WINDOWS.into_iter().map(move |window| (head_dim, causal, window));
    let all = [true, false].into_iter().flat_map(windows);
    all.flat_map(|(head_dim, causal, window)| [None, Some(30.0)].map(move |softcap| (head_dim, causal, window, softcap)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parity_tests::oracle;

    #[test]
    fn every_shape_is_checked_once_and_a_wrong_kernel_is_far_away() {
        let right: FlashKernel = |shape, parts, starts, longest| match shape.softcap {
            Some(_) => candle_core::bail!("no soft caps here"),
            None => oracle(shape, parts, starts, longest),
        };
        let found = checks(right, &Device::Cpu, DType::F32);
        assert_eq!(found.len(), HEAD_SIZES.len() * 12);
        for check in &found {
            let near = check.from_plain.is_some_and(|apart| apart < 1e-5) && check.from_float32 == check.from_plain;
            assert_eq!(near, check.softcap.is_none(), "{check:?}");
            assert_eq!(check.problem.is_some(), check.softcap.is_some(), "{check:?}");
        }
        let unwindowed: FlashKernel =
            |shape, parts, starts, longest| oracle(&Shape { window: None, softcap: None, ..shape.clone() }, parts, starts, longest);
        let found = checks(unwindowed, &Device::Cpu, DType::F32);
        let far = |check: &&FlashCheck| check.from_plain.is_some_and(|apart| apart > 1e-2);
        assert!(found.iter().filter(|check| check.window.is_some()).all(|check| far(&check)));
        assert!(!found.iter().filter(|check| check.window.is_none() && check.softcap.is_none()).any(|check| far(&check)));
    }

    /// It takes a window that is wider than the longest sequence as none, for which there are kernels of their own.
    #[test]
    fn a_window_is_one_however_short_the_samples_beside_it_are() {
        let as_candle: FlashKernel = |shape, parts, starts, longest| match shape.window {
            Some(window) if window > longest[1] => candle_core::bail!("a window of {window} over {longest:?} would be none"),
            _ => oracle(&Shape { softcap: None, ..shape.clone() }, parts, starts, longest),
        };
        let shape = Shape { heads: 2, kv_heads: 2, head_dim: 8, scale: 0.3, softcap: None, causal: true, window: Some(4096) };
        assert!(differences(&shape, as_candle, &Device::Cpu, DType::F32).is_ok_and(|apart| apart[0] < 1e-5));
    }

    #[test]
    fn a_build_without_the_kernels_says_so() {
        assert!(flash::BUILT || flash_checks(Place::Cpu).is_err_and(|error| error.to_string().contains("--features cuda,flash-attn")));
    }
}
