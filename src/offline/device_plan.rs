//! What a model takes of the device that it is to be served from, before any weight is read. Pure.

use std::fmt;

use serde::Serialize;

use crate::checkpoint::{Architecture, Dtype, Manifest};
use crate::merge::Size;
use crate::model::{self, Arithmetic, Load, Place, Way, activation_bytes, fitting_pack};
use crate::registry::{Ensemble, Swap};

/// What is planned for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRequest {
    /// All devices that the model is to be on. The first is planned for: no other has more to hold.
    pub places: Vec<Place>,
    /// Bytes that the device has; `None` where nobody says.
    pub memory: Option<u64>,
    pub arithmetic: Arithmetic,
    pub ensemble: Ensemble,
    pub members: usize,
    /// Of all members as adapters on one base, where they are that.
    pub members_on_one_base: Option<u64>,
    /// `None`: as many as there is room for, and as are of use.
    pub max_pack_tokens: Option<usize>,
    pub prefix_cache_bytes: u64,
    pub swap: Swap,
}

impl DeviceRequest {
    fn place(&self) -> Place {
        self.places.first().copied().unwrap_or(Place::Cpu)
    }
}

/// The most memory that serving takes of one device, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DevicePlan {
    pub device: String,
    pub memory_bytes: Option<u64>,
    /// What matrices are multiplied in.
    pub dtype: String,
    pub way: Way,
    pub max_pack_tokens: usize,
    pub weights: u64,
    /// Of the members that stand beside the merged model.
    pub members: u64,
    /// Of one forward over the largest pack.
    pub activations: u64,
    /// Keys and values of prompts that are kept, which the CPU alone does.
    pub prefix_cache: u64,
    /// The driver's context and the code of its libraries, by experience of others; none on the CPU.
    pub driver: u64,
    /// All of these together.
    pub needed: u64,
    /// With another generation beside it, as a reload needs that takes over with `swap: beside`.
    pub needed_with_swap: u64,
    /// Why it cannot be served there.
    pub problems: Vec<String>,
    pub notes: Vec<String>,
}

/// A CUDA context with the modules of candle, cuBLAS and its workspace.
const DRIVER: u64 = 1 << 30;

impl DevicePlan {
    pub fn new(request: &DeviceRequest, architecture: &Architecture, manifest: &Manifest) -> Self {
        let mut plan = Self::parts(request, architecture, manifest);
        let Some(memory) = request.memory else { return plan };
        if plan.needed > memory {
            plan.problems.push(plan.too_large(request, architecture, manifest, memory));
        } else if request.swap == Swap::Beside && plan.needed_with_swap > memory {
            let needed = Size(plan.needed_with_swap);
            plan.notes.push(format!("a reload beside the live model does not fit ({needed} of {}): set `swap: in_place`", Size(memory)));
        }
        plan
    }

    fn parts(request: &DeviceRequest, architecture: &Architecture, manifest: &Manifest) -> Self {
        let (place, arithmetic) = (request.place(), request.arithmetic);
        let way = place.way(arithmetic, architecture);
        let dtype = if way == Way::Kernels { Dtype::F32 } else { arithmetic.dtype };
        let weights = model::device_bytes_on(&[place], arithmetic.dtype, manifest);
        let whole = |count: usize| weights.saturating_mul(count as u64);
        let members = match (request.ensemble, request.members) {
            // The merge of one is that one.
            (Ensemble::Off, _) | (Ensemble::Resident | Ensemble::Spread | Ensemble::Adapters, 1) => 0,
            (Ensemble::Resident, count) => whole(count),
            (Ensemble::Spread, count) => whole(model::most_on_one(&request.places, count)),
            (Ensemble::Adapters, count) => request.members_on_one_base.unwrap_or_else(|| whole(count)),
            (Ensemble::Streamed, _) => weights,
        };
        let prefix_cache = if way == Way::Kernels && architecture.causal { request.prefix_cache_bytes } else { 0 };
        let driver = if place == Place::Cpu { 0 } else { DRIVER };
        let standing = weights.saturating_add(members).saturating_add(prefix_cache).saturating_add(driver);
        let activations = |tokens: usize| {
            let load = Load::of(tokens, architecture.max_positions);
            activation_bytes(architecture, way, arithmetic.dtype, arithmetic.batch_invariant, load)
        };
        let max_pack_tokens = request.max_pack_tokens.unwrap_or_else(|| {
            let enough = place.enough_pack_tokens();
            // Where there is room for the swap, the packs leave it free.
            let room = request.memory.map_or(u64::MAX, |memory| memory.saturating_sub(standing));
            let another = if request.swap == Swap::Beside { weights.saturating_add(members) } else { 0 };
            fitting_pack(if room / 2 > another { room - another } else { room }, enough, activations)
        });
        let activations = activations(max_pack_tokens);
        let needed = standing.saturating_add(activations);
        Self {
            device: place.to_string(),
            memory_bytes: request.memory,
            dtype: dtype.safetensors_name().to_owned(),
            way,
            max_pack_tokens,
            weights,
            members,
            activations,
            prefix_cache,
            driver,
            needed,
            needed_with_swap: needed.saturating_add(weights).saturating_add(members),
            problems: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Says so, and what would help.
    fn too_large(&self, request: &DeviceRequest, architecture: &Architecture, manifest: &Manifest, memory: u64) -> String {
        let with = |change: &dyn Fn(&mut DeviceRequest)| {
            let mut other = request.clone();
            change(&mut other);
            Self::parts(&other, architecture, manifest).needed <= memory
        };
        let narrow = |other: &mut DeviceRequest| other.arithmetic.dtype = Dtype::Bf16;
        let alone = |other: &mut DeviceRequest| other.ensemble = Ensemble::Off;
        let spread = |other: &mut DeviceRequest| other.ensemble = Ensemble::Spread;
        let small = |other: &mut DeviceRequest| other.max_pack_tokens = None;
        let mut helps = Vec::new();
        if request.place() != Place::Cpu && request.arithmetic.dtype == Dtype::F32 && with(&narrow) {
            helps.push("with `dtype: bfloat16`".to_owned());
        }
        if request.ensemble == Ensemble::Resident && request.places.len() > 1 && with(&spread) {
            helps.push("with `ensemble: spread`".to_owned());
        }
        if request.ensemble != Ensemble::Off && with(&alone) {
            helps.push("with `ensemble: off`".to_owned());
        }
        if request.max_pack_tokens.is_some() && with(&small) {
            helps.push("with `max_pack_tokens: auto`".to_owned());
        }
        if helps.is_empty() {
            helps.push(format!("on a device with {}", Size(self.needed)));
        }
        format!(
            "device {}: {} are needed and {} are there; a device holds the whole model (tensor parallelism is not done), so it would fit {}",
            self.device,
            Size(self.needed),
            Size(memory),
            helps.join(", or ")
        )
    }
}

impl fmt::Display for DevicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.memory_bytes.map_or(String::new(), |memory| format!(" of {}", Size(memory)));
        let dtype = if self.way == Way::Kernels { "in float32".to_owned() } else { format!("matrices in {}", self.dtype) };
        writeln!(f, "on {}{of}, {dtype}, {}, packs of {} tokens:", self.device, self.way.words(), self.max_pack_tokens)?;
        let lines = [
            ("weights", self.weights),
            ("members", self.members),
            ("activations, at most", self.activations),
            ("prefix cache, at most", self.prefix_cache),
            ("driver, about", self.driver),
        ];
        for (what, bytes) in lines.into_iter().filter(|(_, bytes)| *bytes > 0) {
            writeln!(f, "  {what:22} {:>10}", Size(bytes))?;
        }
        writeln!(f, "  {:22} {:>10}", "together", Size(self.needed))?;
        write!(f, "  {:22} {:>10}", "while a reload swaps", Size(self.needed_with_swap))?;
        self.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::TensorInfo;
    use proptest::prelude::*;
    use serde_json::json;

    /// Llama-3.1-8B's numbers.
    fn eight_billion() -> (Architecture, Manifest) {
        let config = json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "num_hidden_layers": 32, "vocab_size": 128_256, "max_position_embeddings": 8192, "id2label": {"0": "LABEL_0"},
        });
        let (h, m) = (4096, 14336);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![128_256, h]), ("score.weight".to_owned(), vec![1, h])];
        for layer in 0..32 {
            let parts =
                [("q", [h, h]), ("k", [1024, h]), ("v", [1024, h]), ("o", [h, h]), ("gate", [m, h]), ("up", [m, h]), ("down", [h, m])];
            shapes.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape.to_vec())));
        }
        let manifest = shapes.into_iter().map(|(name, shape)| (name, TensorInfo { dtype: Dtype::Bf16, shape })).collect();
        (Architecture::parse(&config).expect("valid"), manifest)
    }

    fn request() -> DeviceRequest {
        DeviceRequest {
            memory: Some(80 << 30),
            arithmetic: Dtype::Bf16.into(),
            ensemble: Ensemble::Off,
            members: 4,
            places: vec![Place::Cuda(0)],
            members_on_one_base: None,
            max_pack_tokens: None,
            prefix_cache_bytes: 1 << 30,
            swap: Swap::Beside,
        }
    }

    fn plan(request: &DeviceRequest) -> DevicePlan {
        let (architecture, manifest) = eight_billion();
        DevicePlan::new(request, &architecture, &manifest)
    }

    #[test]
    fn eight_billion_parameters_fit_a_card_of_80_gib_in_sixteen_bits_with_another_beside_them() {
        let plan = plan(&request());
        // 2 bytes each of 7.5 billion parameters (without the language model's head).
        assert_eq!(plan.weights, 2 * (128_256 * 4096 + 4096 + 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)));
        assert_eq!((plan.max_pack_tokens, plan.prefix_cache, plan.members), (16_384, 0, 0));
        assert!(plan.problems.is_empty() && plan.notes.is_empty(), "{plan:?}");
        assert_eq!(plan.needed, plan.weights + plan.activations + plan.driver);
        assert_eq!(plan.needed_with_swap, plan.needed + plan.weights);
        assert!(plan.needed_with_swap <= 80 << 30);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would_help() {
        let wide = DeviceRequest { arithmetic: Dtype::F32.into(), memory: Some(24 << 30), ..request() };
        let problem = plan(&wide).problems.join("\n");
        assert!(problem.starts_with("device cuda:0: ") && problem.contains("tensor parallelism is not done"), "{problem}");
        assert!(problem.ends_with("it would fit with `dtype: bfloat16`"), "{problem}");
        let crowded = DeviceRequest { ensemble: Ensemble::Resident, memory: Some(40 << 30), ..request() };
        assert!(plan(&crowded).problems[0].ends_with("it would fit with `ensemble: off`"));
        // Half of the members on each of two cards.
        let two = DeviceRequest { places: vec![Place::Cuda(0), Place::Cuda(1)], memory: Some(60 << 30), ..crowded };
        assert!(plan(&two).problems[0].ends_with("it would fit with `ensemble: spread`, or with `ensemble: off`"));
        let spread = plan(&DeviceRequest { ensemble: Ensemble::Spread, ..two });
        assert_eq!((spread.members, spread.problems.len()), (2 * spread.weights, 0));
        let large = DeviceRequest { max_pack_tokens: Some(1 << 20), ..request() };
        assert!(plan(&large).problems[0].ends_with("with `max_pack_tokens: auto`"));
        let tiny = DeviceRequest { memory: Some(8 << 30), ..request() };
        assert!(plan(&tiny).problems[0].contains("it would fit on a device with"));
    }

    #[test]
    fn a_swap_that_does_not_fit_is_a_note() {
        let plan = plan(&DeviceRequest { memory: Some(28 << 30), ..request() });
        assert!(plan.problems.is_empty());
        assert!(plan.notes[0].ends_with("set `swap: in_place`"), "{:?}", plan.notes);
    }

    #[test]
    fn the_cpu_computes_in_float32_and_keeps_prompts() {
        let plan = plan(&DeviceRequest { places: vec![Place::Cpu], memory: None, ..request() });
        assert_eq!((plan.way, plan.dtype.as_str(), plan.max_pack_tokens, plan.driver), (Way::Kernels, "F32", 8192, 0));
        assert_eq!(plan.prefix_cache, 1 << 30);
        assert!(plan.to_string().contains("on cpu, in float32, own kernels, packs of 8192 tokens:"), "{plan}");
    }

    proptest! {
        #[test]
        fn packs_that_are_chosen_fit_where_any_do(gib in 1u64..200, resident in any::<bool>(), invariant in any::<bool>(), wide in any::<bool>()) {
            let dtype = if wide { Dtype::F32 } else { Dtype::Bf16 };
            let request = DeviceRequest {
                memory: Some(gib << 30),
                ensemble: if resident { Ensemble::Resident } else { Ensemble::Off },
                arithmetic: Arithmetic { dtype, batch_invariant: invariant },
                ..request()
            };
            let chosen = plan(&request);
            let smallest = plan(&DeviceRequest { max_pack_tokens: Some(256), ..request.clone() });
            prop_assert_eq!(chosen.problems.is_empty(), smallest.needed <= gib << 30);
            prop_assert!(chosen.needed <= chosen.needed_with_swap);
            let more = plan(&DeviceRequest { max_pack_tokens: Some(chosen.max_pack_tokens + 1), ..request });
            prop_assert!(more.needed >= chosen.needed);
        }
    }
}
