//! Where a model computes: the names of devices, what this build and this machine have of them, and how each is used.
//! The only place that depends on how the program was built.

mod cards;
#[cfg_attr(not(feature = "cuda"), path = "no_cuda.rs")]
mod cuda;
mod fault;
#[cfg_attr(not(feature = "flash-attn"), path = "no_flash.rs")]
mod flash;
mod flash_check;
mod grouped;
#[cfg_attr(not(feature = "cuda"), path = "no_groups.rs")]
mod groups;
mod idle;
#[cfg(feature = "cuda")]
mod launch;
mod opened;
mod place;
#[cfg(feature = "cuda")]
mod raw;
mod staging;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use candle_core::{DType, Device, Result as CandleResult, Tensor};

use super::kernels::attention::Shape;
use super::memory::Way;
use super::ops::Ops;
use super::plain;
use crate::checkpoint::{Architecture, Dtype};
pub use cards::{Card, Inventory, Support, card, has_room, inventory, settle};
pub use fault::Fault;
pub use flash_check::{FlashCheck, flash_checks};
#[cfg(test)]
pub use grouped::on_host::OnHost;
pub use grouped::{Grouped, Stack, Tiles, Tiling};
use grouped::{MOST_EXPERTS, Verdicts};
pub use idle::run_when_idle;
pub use opened::Devices;
pub(super) use opened::Turns;
pub use place::{DeviceChoice, DeviceError, Place};
pub use staging::Staging;

/// How a model computes on a device that our kernels do not run on. They compute in float32, and give a score the same bits
/// in any company, whatever is asked here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// What matrices are stored and multiplied in.
    pub dtype: Dtype,
    /// Every product in a shape that does not depend on the pack, so that a score has the same bits in any company.
    pub batch_invariant: bool,
}

impl From<Dtype> for Arithmetic {
    fn from(dtype: Dtype) -> Self {
        Self { dtype, batch_invariant: false }
    }
}

/// Rows of every product with a weight where shapes are fixed. A library chooses its kernel, and with it the order of
/// additions, by the shape; of one shape there is one choice. Fewer would leave a card idle, more would make a short
/// sample by itself wait for rows that nobody reads.
pub(super) const FIXED_ROWS: usize = 1024;

/// One device, opened, and how a model is computed there.
#[derive(Clone, Debug)]
pub struct Backend {
    pub place: Place,
    /// Held for as long as the model is there.
    pub device: Arc<Device>,
    /// What matrices are stored and multiplied in; norms, softmax and head are in float32 everywhere.
    pub weights: DType,
    pub ops: Ops,
    /// Rows of every product with a weight, where that is to be one number.
    pub fixed_rows: Option<usize>,
    /// Attention by the flash kernels, where there are such for the model.
    pub flash: Option<FlashKernel>,
    /// Of a mixture, what groups rows by their experts without the host.
    pub grouped: Option<&'static dyn Grouped>,
    pub driver: &'static dyn Driver,
}

/// What is asked of a device beside computing.
pub trait Driver: fmt::Debug + Sync {
    /// See [`settle`].
    fn settle(&self, place: Place) -> Result<(), DeviceError>;

    /// Whether the device still computes: what is asked once a forward has failed for no known reason.
    fn answers(&self, device: &Device) -> bool;
}

/// The driver that this machine has.
#[derive(Debug)]
struct Installed;

impl Driver for Installed {
    fn settle(&self, place: Place) -> Result<(), DeviceError> {
        settle(&[place])
    }

    fn answers(&self, device: &Device) -> bool {
        let sum = || Tensor::new(&[1f32, 2.0], device)?.sum(0)?.to_scalar::<f32>();
        let found = guarded(|| sum().map_err(|error| error.to_string()));
        // One that has no room for two numbers has not gone.
        found == Ok(3.0) || found.is_err_and(|words| Fault::of(&words) == Fault::OutOfMemory)
    }
}

/// Attention of `[queries, keys, values]`, `[rows, heads, head_dim]` each, of sequences end to end: where the queries and the
/// keys of each begin, and the most of either. The last query of a sequence stands beside its last key.
pub type FlashKernel = fn(&Shape, [&Tensor; 3], &[Tensor; 2], [usize; 2]) -> CandleResult<Tensor>;

/// How far the flash kernels may be from plain attention over random rows, and grouped products from others: twice what 16-bit
/// numbers of magnitude one are off.
const TOLERANCE: f32 = 2e-2;

/// What groups rows on a card, if a mixture of experts like this model's has the results there that it has otherwise.
fn grouped_on(
    place: Place,
    device: &Device,
    architecture: &Architecture,
    weights: DType,
    fixed_rows: Option<usize>,
) -> Option<&'static dyn Grouped> {
    static FOUND: Verdicts = Verdicts::none();
    let grouped = groups::on_card().filter(|_| matches!(place, Place::Cuda(_)))?;
    let experts = architecture.experts.as_ref().filter(|experts| experts.count <= MOST_EXPERTS)?;
    let asked = format!("{place} {weights:?} {fixed_rows:?} {} {} {experts:?}", architecture.hidden_size, architecture.gated);
    let verdict = FOUND.of(asked, || grouped_checked(grouped, device, architecture, weights, fixed_rows));
    verdict.inspect_err(|problem| tracing::warn!(device = %place, problem, "rows wait for the host at every mixture")).ok()?;
    Some(grouped)
}

fn grouped_checked(
    grouped: &'static dyn Grouped,
    device: &Device,
    architecture: &Architecture,
    weights: DType,
    fixed_rows: Option<usize>,
) -> Result<(), String> {
    let difference =
        guarded(|| plain::grouped_difference(grouped, architecture, fixed_rows, device, weights).map_err(|error| error.to_string()))?;
    if difference.is_nan() || difference > TOLERANCE {
        return Err(format!("grouped products are {difference} away from those of every expert by itself"));
    }
    Ok(())
}

/// The kernel, if it gives what plain attention gives in the shapes of this model: a build may lack one, and a wrong one must
/// not score.
fn checked(kernel: FlashKernel, device: &Device, architecture: &Architecture, weights: DType) -> Result<FlashKernel, String> {
    let mut seen: Vec<Option<usize>> = Vec::new();
    for layer in &architecture.layers {
        // The example is small, so a small window stands for a large one.
        let window = layer.window.map(|window| window.min(5));
        if seen.contains(&window) {
            continue;
        }
        seen.push(window);
        let shape = Shape {
            heads: architecture.heads,
            kv_heads: architecture.kv_heads,
            head_dim: architecture.head_dim,
            scale: architecture.attention_scale as f32,
            softcap: architecture.attention_softcap.map(|cap| cap as f32),
            causal: architecture.causal,
            window,
        };
        let [difference, _] = differences(&shape, kernel, device, weights)?;
        // A NaN is no agreement.
        if difference.is_nan() || difference > TOLERANCE {
            return Err(format!("it is {difference} away from plain attention, with a window of {window:?}"));
        }
    }
    Ok(kernel)
}

fn differences(shape: &Shape, kernel: FlashKernel, device: &Device, weights: DType) -> Result<[f32; 2], String> {
    guarded(|| plain::flash_differences(shape, kernel, device, weights).map_err(|error| error.to_string()))
}

impl Backend {
    /// Our kernels, which are in float32 whatever the weights were rounded to.
    pub fn cpu() -> Self {
        let (device, weights, ops) = (Arc::new(Device::Cpu), DType::F32, Ops::Kernels);
        Self { place: Place::Cpu, device, weights, ops, fixed_rows: None, flash: None, grouped: None, driver: &Installed }
    }

    /// How a model is computed on an opened device.
    fn on(place: Place, device: &Arc<Device>, arithmetic: Arithmetic, architecture: &Architecture) -> Self {
        if place == Place::Cpu {
            return Self::cpu();
        }
        let weights = match arithmetic.dtype {
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
            _ => DType::F32,
        };
        let flash = if matches!(place, Place::Cuda(_)) && flash::covers(architecture.head_dim, architecture.disentangled.is_some(), weights)
        {
            checked(flash::attend, device, architecture, weights)
                .inspect_err(|problem| tracing::warn!(device = %place, problem, "flash attention is not used"))
                .ok()
        } else {
            None
        };
        let fixed_rows = arithmetic.batch_invariant.then_some(FIXED_ROWS);
        let grouped = grouped_on(place, device, architecture, weights, fixed_rows);
        Self { place, device: Arc::clone(device), weights, ops: Ops::Plain, fixed_rows, flash, grouped, driver: &Installed }
    }

    pub fn way(&self) -> Way {
        match (self.ops, self.flash) {
            (Ops::Kernels, _) => Way::Kernels,
            (Ops::Plain, None) => Way::Plain,
            (Ops::Plain, Some(_)) => Way::Flash,
        }
    }

    pub fn arithmetic(&self) -> Arithmetic {
        let dtype = match self.weights {
            DType::BF16 => Dtype::Bf16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        };
        Arithmetic { dtype, batch_invariant: self.fixed_rows.is_some() }
    }

    /// What waits, when it is dropped, for all that this thread gave the device to do.
    pub fn at_the_end(&self) -> impl Drop + use<> {
        struct Waits(Arc<Device>);
        impl Drop for Waits {
            fn drop(&mut self) {
                // A device that answers no more is found out elsewhere.
                let _ = self.0.synchronize();
            }
        }
        Waits(Arc::clone(&self.device))
    }

    /// The device and how attention and experts run there, for people.
    pub fn describe(&self) -> String {
        if self.ops == Ops::Kernels {
            return self.place.to_string();
        }
        let attention = if self.flash.is_some() { "flash attention" } else { "plain attention" };
        let experts = if self.grouped.is_some() { ", grouped experts" } else { "" };
        let shapes = if self.fixed_rows.is_some() { ", fixed shapes" } else { "" };
        format!("{} ({attention}{experts}{shapes})", self.place)
    }

    /// Tensor operations on the CPU in place of its kernels: what runs on any other device, testable here.
    #[cfg(test)]
    pub fn plain_on_cpu(weights: DType) -> Self {
        Self { weights, ops: Ops::Plain, ..Self::cpu() }
    }
}

/// Turns a panic into words.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(format!("the driver's library cannot be used: {}", words.unwrap_or("it panicked")))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::parity_tests::oracle as right;

    #[test]
    fn a_model_says_where_it_runs_and_how() {
        let plain = Backend { place: Place::Cuda(3), ..Backend::plain_on_cpu(DType::BF16) };
        let fixed = Backend { fixed_rows: Some(FIXED_ROWS), ..plain.clone() };
        let flash = |backend: &Backend| Backend { flash: Some(right), ..backend.clone() };
        let said = |backend: &Backend| (backend.describe(), backend.way());
        assert_eq!(said(&Backend::cpu()), ("cpu".to_owned(), Way::Kernels));
        assert_eq!(said(&plain), ("cuda:3 (plain attention)".to_owned(), Way::Plain));
        assert_eq!(said(&fixed), ("cuda:3 (plain attention, fixed shapes)".to_owned(), Way::Plain));
        assert_eq!(said(&flash(&plain)), ("cuda:3 (flash attention)".to_owned(), Way::Flash));
        assert_eq!(said(&flash(&fixed)), ("cuda:3 (flash attention, fixed shapes)".to_owned(), Way::Flash));
        let grouped = Backend { grouped: Some(&OnHost), ..fixed };
        assert_eq!(said(&grouped), ("cuda:3 (plain attention, grouped experts, fixed shapes)".to_owned(), Way::Plain));
    }

    #[test]
    fn a_device_that_computes_answers() {
        assert!(Installed.answers(&Device::Cpu));
    }

    #[test]
    fn a_panic_of_a_library_is_told_in_a_sentence() {
        let refused = guarded::<()>(|| panic!("unable to load libcuda")).expect_err("panics");
        assert_eq!(refused, "the driver's library cannot be used: unable to load libcuda");
    }

    fn architecture(more: serde_json::Value) -> Architecture {
        let mut config = serde_json::json!({
            "model_type": "mistral", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 512, "id2label": {"0": "LABEL_0"},
        });
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        Architecture::parse(&config).expect("valid")
    }

    #[test]
    fn grouped_products_are_used_only_where_they_are_right() {
        let experts = json!({"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": null});
        let architecture = architecture(experts);
        let check =
            |grouped: &'static dyn Grouped, fixed: Option<usize>| grouped_checked(grouped, &Device::Cpu, &architecture, DType::F32, fixed);
        assert_eq!((check(&OnHost, None), check(&OnHost, Some(64))), (Ok(()), Ok(())));
        assert!(check(&Misplaced, None).is_err_and(|problem| problem.contains("away from")));
        assert!(check(&Unready, None).is_err_and(|problem| problem.contains("no kernel image")));
    }

    /// Multiplies every tile by the weight of the next expert.
    #[derive(Debug)]
    struct Misplaced;

    impl Grouped for Misplaced {
        fn group(&self, chosen: &Tensor, experts: usize, tiling: Tiling) -> CandleResult<Tiles> {
            let tiles = OnHost.group(chosen, experts, tiling)?;
            let next = |owner: u32| (owner + 1) % experts as u32;
            Ok(Tiles { owners: Tensor::new(tiles.owners.to_vec1()?.into_iter().map(next).collect::<Vec<u32>>(), &Device::Cpu)?, ..tiles })
        }

        fn addresses(&self, matrices: &[Tensor]) -> CandleResult<Tensor> {
            OnHost.addresses(matrices)
        }

        fn product(&self, x: &Tensor, matrices: &[Tensor], addresses: &Tensor, tiles: &Tiles) -> CandleResult<Tensor> {
            OnHost.product(x, matrices, addresses, tiles)
        }
    }

    /// Has no kernels for this card.
    #[derive(Debug)]
    struct Unready;

    impl Grouped for Unready {
        fn group(&self, _: &Tensor, _: usize, _: Tiling) -> CandleResult<Tiles> {
            candle_core::bail!("no kernel image is available")
        }

        fn addresses(&self, matrices: &[Tensor]) -> CandleResult<Tensor> {
            OnHost.addresses(matrices)
        }

        fn product(&self, _: &Tensor, _: &[Tensor], _: &Tensor, _: &Tiles) -> CandleResult<Tensor> {
            candle_core::bail!("no kernel image is available")
        }
    }

    #[test]
    fn a_kernel_is_used_only_where_it_gives_what_plain_attention_gives() {
        let check = |kernel: FlashKernel, architecture: &Architecture| checked(kernel, &Device::Cpu, architecture, DType::F32).map(|_| ());
        let (full, windowed) =
            (architecture(serde_json::json!({"sliding_window": null})), architecture(serde_json::json!({"sliding_window": 100})));
        assert_eq!((check(right, &full), check(right, &windowed)), (Ok(()), Ok(())));
        // A prompt's queries that stand beside its first keys and not beside its last, and no window at all.
        let upper: FlashKernel = |shape, parts, starts, longest| right(&Shape { causal: false, ..shape.clone() }, parts, starts, longest);
        let unwindowed: FlashKernel =
            |shape, parts, starts, longest| right(&Shape { window: None, ..shape.clone() }, parts, starts, longest);
        let broken: FlashKernel = |_, [queries, ..], _, _| queries.affine(f64::NAN, 0.0);
        assert!(check(upper, &full).is_err_and(|problem| problem.contains("away from plain attention")));
        assert!(check(unwindowed, &full).is_ok() && check(unwindowed, &windowed).is_err());
        assert!(check(broken, &full).is_err());
        assert!(check(flash::attend, &full).is_err() || flash::BUILT);
    }
}
