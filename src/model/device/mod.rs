//! Where a model computes: the names of devices, what this build and this machine have of them, and how each is used.
//! The only place that depends on how the program was built.

#[cfg_attr(not(feature = "cuda"), path = "no_cuda.rs")]
mod cuda;
mod fault;
#[cfg_attr(not(feature = "flash-attn"), path = "no_flash.rs")]
mod flash;
mod flash_check;
mod idle;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use serde::Serialize;

use super::kernels::attention::Shape;
use super::memory::Way;
use super::ops::Ops;
use super::plain;
use crate::checkpoint::{Architecture, Dtype};
pub use fault::Fault;
pub use flash_check::{FlashCheck, flash_checks};
pub use idle::run_when_idle;

/// More devices than any machine has.
const MOST_PLACES: usize = 64;

/// One device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Cpu,
    Cuda(usize),
    Metal(usize),
}

/// Where the settings want the model to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device, where this build and this machine have one; else the CPU.
    #[default]
    Auto,
    /// At least one, all of one kind: scores of different kinds of device differ in their last digits.
    Places(Vec<Place>),
}

/// A device that cannot be used, in words for its operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {place}: {problem}")]
pub struct DeviceError {
    pub place: String,
    pub problem: String,
}

/// What this build can compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Support {
    pub cuda: bool,
    pub flash_attention: bool,
    pub metal: bool,
}

/// A card as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Card {
    pub device: String,
    pub name: String,
    /// Such as `9.0`.
    pub compute_capability: String,
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// The devices of this machine that this build can use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inventory {
    pub support: Support,
    pub cards: Vec<Card>,
    /// Why there are no cards.
    pub problem: Option<String>,
}

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
    pub device: Device,
    /// What matrices are stored and multiplied in; norms, softmax and head are in float32 everywhere.
    pub weights: DType,
    pub ops: Ops,
    /// Rows of every product with a weight, where that is to be one number.
    pub fixed_rows: Option<usize>,
    /// Attention by the flash kernels, where there are such for the model.
    pub flash: Option<FlashKernel>,
}

/// Attention of `[queries, keys, values]`, `[rows, heads, head_dim]` each, of sequences end to end: where the queries and the
/// keys of each begin, and the most of either. The last query of a sequence stands beside its last key.
pub type FlashKernel = fn(&Shape, [&Tensor; 3], &[Tensor; 2], [usize; 2]) -> CandleResult<Tensor>;

/// How far the flash kernels may be from plain attention over random rows: twice what 16-bit numbers of magnitude one are off.
const FLASH_TOLERANCE: f32 = 2e-2;

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Metal(ordinal) => write!(f, "metal:{ordinal}"),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, ordinal) = text.split_once(':').unwrap_or((text, "0"));
        // Digits alone: `+1` parses as a number, too.
        let ordinal = ordinal.parse().ok().filter(|_| ordinal.len() <= 3 && ordinal.bytes().all(|byte| byte.is_ascii_digit()));
        match (kind, ordinal) {
            ("cpu", _) if text == "cpu" => Ok(Self::Cpu),
            ("cuda", Some(ordinal)) => Ok(Self::Cuda(ordinal)),
            ("metal", Some(ordinal)) => Ok(Self::Metal(ordinal)),
            _ => Err("expected auto, cpu, cuda:0, or a list such as [cuda:0, cuda:1]".to_owned()),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "auto" {
            return Ok(Self::Auto);
        }
        let list = text.trim();
        let list = list.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(list);
        let places: Vec<Place> = list.split(',').map(|name| name.trim().trim_matches('"').parse()).collect::<Result<_, _>>()?;
        if places.len() > MOST_PLACES {
            return Err(format!("expected at most {MOST_PLACES} devices"));
        }
        if places.iter().any(|place| std::mem::discriminant(place) != std::mem::discriminant(&places[0])) {
            return Err("expected devices of one kind, because scores differ between kinds in their last digits".to_owned());
        }
        // The CPU may stand there more than once: workers that share their weights.
        let twice = places.iter().enumerate().find(|(i, place)| **place != Place::Cpu && places[..*i].contains(place));
        match twice {
            Some((_, place)) => Err(format!("expected every device once; {place} stands there twice")),
            None => Ok(Self::Places(places)),
        }
    }
}

impl DeviceChoice {
    /// The devices that are meant, of which the driver says that they are there.
    pub fn resolve(&self) -> Result<Vec<Place>, DeviceError> {
        match self {
            Self::Auto => Ok(vec![if cards().is_ok_and(|cards| !cards.is_empty()) { Place::Cuda(0) } else { Place::Cpu }]),
            Self::Places(places) => {
                for place in places {
                    place.check()?;
                }
                Ok(places.clone())
            }
        }
    }
}

impl Place {
    fn error(self, problem: impl Into<String>) -> DeviceError {
        DeviceError { place: self.to_string(), problem: problem.into() }
    }

    fn check(self) -> Result<(), DeviceError> {
        let support = Support::of_this_build();
        match self {
            Self::Cpu => Ok(()),
            Self::Metal(_) if support.metal => Ok(()),
            Self::Metal(_) => Err(self.error("this build has no Metal; build with `--features metal`, which nobody has tested")),
            Self::Cuda(ordinal) => match cards() {
                Err(problem) => Err(self.error(problem)),
                Ok(cards) if ordinal >= cards.len() => {
                    let count = if cards.len() == 1 { "one CUDA device".to_owned() } else { format!("{} CUDA devices", cards.len()) };
                    Err(self.error(format!("this machine has {count}, counted from 0")))
                }
                Ok(_) => Ok(()),
            },
        }
    }

    /// How a model would be computed there by this build; whether flash attention is right is found when it is loaded.
    pub fn way(self, arithmetic: Arithmetic, architecture: &Architecture) -> Way {
        let weights = if arithmetic.dtype == Dtype::F32 { DType::F32 } else { DType::BF16 };
        match self {
            Self::Cpu => Way::Kernels,
            Self::Cuda(_) if flash::BUILT && flash::covers(architecture.head_dim, architecture.disentangled.is_some(), weights) => {
                Way::Flash
            }
            Self::Cuda(_) | Self::Metal(_) => Way::Plain,
        }
    }

    /// Tokens of a pack beyond which more would make nothing faster, and every caller wait longer.
    pub fn enough_pack_tokens(self) -> usize {
        if self == Self::Cpu { 8192 } else { 16_384 }
    }

    fn device(self) -> Result<Device, DeviceError> {
        self.check()?;
        let open = || match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => Device::new_cuda(ordinal),
            Self::Metal(ordinal) => Device::new_metal(ordinal),
        };
        // A library of the vendor that is found but does not fit panics in the crates that load it.
        guarded(|| open().map_err(|error| error.to_string())).map_err(|problem| self.error(problem))
    }

    /// Opens the device for a model.
    pub(super) fn open(self, arithmetic: Arithmetic, architecture: &Architecture) -> Result<Backend, DeviceError> {
        let device = self.device()?;
        if self == Self::Cpu {
            return Ok(Backend::cpu());
        }
        let weights = match arithmetic.dtype {
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
            _ => DType::F32,
        };
        let flash = if matches!(self, Self::Cuda(_)) && flash::covers(architecture.head_dim, architecture.disentangled.is_some(), weights) {
            checked(flash::attend, &device, architecture, weights)
                .inspect_err(|problem| tracing::warn!(device = %self, problem, "flash attention is not used"))
                .ok()
        } else {
            None
        };
        let fixed_rows = arithmetic.batch_invariant.then_some(FIXED_ROWS);
        Ok(Backend { place: self, device, weights, ops: Ops::Plain, fixed_rows, flash })
    }
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
        if difference.is_nan() || difference > FLASH_TOLERANCE {
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
        Self { place: Place::Cpu, device: Device::Cpu, weights: DType::F32, ops: Ops::Kernels, fixed_rows: None, flash: None }
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

    /// The device and how attention runs there, for people.
    pub fn describe(&self) -> String {
        let shapes = if self.fixed_rows.is_some() { ", fixed shapes" } else { "" };
        match (self.ops, self.flash.is_some()) {
            (Ops::Kernels, _) => self.place.to_string(),
            (Ops::Plain, true) => format!("{} (flash attention{shapes})", self.place),
            (Ops::Plain, false) => format!("{} (plain attention{shapes})", self.place),
        }
    }

    /// Tensor operations on the CPU in place of its kernels: what runs on any other device, testable here.
    #[cfg(test)]
    pub fn plain_on_cpu(weights: DType) -> Self {
        Self { place: Place::Cpu, device: Device::Cpu, weights, ops: Ops::Plain, fixed_rows: None, flash: None }
    }
}

impl Support {
    pub fn of_this_build() -> Self {
        Self {
            cuda: candle_core::utils::cuda_is_available(),
            flash_attention: flash::BUILT,
            metal: candle_core::utils::metal_is_available(),
        }
    }
}

/// What `warm devices` tells.
pub fn inventory() -> Inventory {
    let support = Support::of_this_build();
    match cards() {
        Ok(cards) => Inventory { support, cards, problem: None },
        Err(problem) => Inventory { support, cards: Vec::new(), problem: Some(problem) },
    }
}

fn cards() -> Result<Vec<Card>, String> {
    guarded(cuda::cards)
}

/// Whether each of these devices has room for so many bytes, as far as its driver tells; asked before anything is loaded.
pub fn has_room(places: &[Place], needed: u64) -> Result<(), DeviceError> {
    if places.iter().all(|place| *place == Place::Cpu) {
        // The system gives memory as it is used; how much that may be is the operator's business.
        return Ok(());
    }
    has_room_among(&cards().unwrap_or_default(), places, needed)
}

fn has_room_among(cards: &[Card], places: &[Place], needed: u64) -> Result<(), DeviceError> {
    let full = |place: &Place| cards.iter().find(|card| card.device == place.to_string()).filter(|card| card.free_bytes < needed);
    match places.iter().find_map(|place| Some((place, full(place)?))) {
        None => Ok(()),
        Some((place, card)) => {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let (needed, free, total) = (gib(needed), gib(card.free_bytes), gib(card.total_bytes));
            Err(place.error(format!(
                "{needed:.1} GiB are needed, and {free:.1} of its {total:.1} GiB are free; a device holds the whole model, because tensor \
                 parallelism is not done: `warm plan --device {place}` says what takes how much"
            )))
        }
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
    use super::*;
    use crate::model::parity_tests::oracle as right;
    use proptest::prelude::*;

    fn choice(text: &str) -> Result<DeviceChoice, String> {
        text.parse()
    }

    #[test]
    fn devices_are_named_alone_or_in_a_list() {
        let places = |places: &[Place]| Ok(DeviceChoice::Places(places.to_vec()));
        assert_eq!(choice("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(choice("cpu"), places(&[Place::Cpu]));
        assert_eq!(choice("cuda"), places(&[Place::Cuda(0)]));
        assert_eq!(choice("cuda:7"), places(&[Place::Cuda(7)]));
        assert_eq!(choice("[cuda:0, cuda:1]"), places(&[Place::Cuda(0), Place::Cuda(1)]));
        assert_eq!(choice("[\"cuda:0\",\"cuda:1\"]"), places(&[Place::Cuda(0), Place::Cuda(1)]));
        assert_eq!(choice("cuda:0,cuda:1"), choice("[cuda:0, cuda:1]"));
        assert_eq!(choice("[cpu, cpu]"), places(&[Place::Cpu, Place::Cpu]));
    }

    #[test]
    fn what_is_no_device_is_refused_with_what_was_expected() {
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:1234", "cpu:1", "[]", "[cuda:0", "cuda:0;cuda:1"] {
            assert!(choice(text).is_err_and(|problem| problem.contains("expected auto, cpu, cuda:0")), "{text}");
        }
        assert!(choice("[cuda:0, cuda:0]").is_err_and(|problem| problem.contains("cuda:0 stands there twice")));
        assert!(choice("[cpu, cuda:0]").is_err_and(|problem| problem.contains("of one kind")));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_and_a_name_is_its_own(text in ".{0,40}", ordinal in 0usize..1000) {
            let _ = choice(&text);
            prop_assert_eq!(Place::Cuda(ordinal).to_string().parse(), Ok(Place::Cuda(ordinal)));
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_told_in_a_sentence() {
        assert_eq!(DeviceChoice::Places(vec![Place::Cpu; 2]).resolve(), Ok(vec![Place::Cpu; 2]));
        // No machine has a thousand cards, whether this build knows of any or not.
        let refused = DeviceChoice::Places(vec![Place::Cuda(999)]).resolve().expect_err("no such card").to_string();
        assert!(refused.starts_with("device cuda:999: "), "{refused}");
        assert!(
            ["this build has no CUDA", "this machine has", "no NVIDIA driver"].iter().any(|words| refused.contains(words)),
            "{refused}"
        );
    }

    #[test]
    fn a_card_without_room_is_named_before_anything_is_loaded() {
        let card = |ordinal: usize, free: u64| Card {
            device: format!("cuda:{ordinal}"),
            name: String::new(),
            compute_capability: String::new(),
            free_bytes: free << 30,
            total_bytes: 80 << 30,
        };
        let cards = [card(0, 70), card(1, 10)];
        let room = |places: &[Place], gib: u64| has_room_among(&cards, places, gib << 30).map_err(|error| error.to_string());
        assert_eq!((room(&[Place::Cuda(0)], 60), room(&[Place::Cuda(0), Place::Cuda(1)], 10)), (Ok(()), Ok(())));
        let full = room(&[Place::Cuda(0), Place::Cuda(1)], 60).expect_err("no room");
        assert!(full.starts_with("device cuda:1: 60.0 GiB are needed, and 10.0 of its 80.0 GiB are free"), "{full}");
        assert!(full.contains("tensor parallelism is not done"), "{full}");
        // The CPU, and a card that says nothing, are not refused.
        assert_eq!((has_room(&[Place::Cpu], u64::MAX), room(&[Place::Cuda(7)], 60)), (Ok(()), Ok(())));
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
