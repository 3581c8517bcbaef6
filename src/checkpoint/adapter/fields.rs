//! The fields of `adapter_config.json`, each checked, and whatever is not supported refused by its name.

use serde_json::{Map, Value};

use super::config::{BiasMode, Layers, Targets};
use super::pattern::{Pattern, Place};

/// Larger than any adapter's; a bound on what a hostile file can cost.
const MAX_RANK: u64 = 1 << 12;
/// More entries than a pattern for every module of any model.
const MAX_ENTRIES: usize = 1 << 14;

/// Fields that other adapters of this kind need, with what to say of them. Whatever else is set that is not known is
/// refused, too, because it may change the weights.
const UNSUPPORTED: [(&str, &str); 13] = [
    ("use_dora", "DoRA scales every row of the merged weight by a trained magnitude"),
    ("layer_replication", "the adapter stands on copies of the base's layers"),
    ("megatron_config", "the adapter is split as Megatron splits layers"),
    ("trainable_token_indices", "single rows of the embedding were trained beside the adapter"),
    ("target_parameters", "parameters were adapted that are no modules"),
    ("use_qalora", "QA-LoRA pools the input before the factors"),
    ("alora_invocation_tokens", "an activated adapter (aLoRA) applies to some tokens only, so no merged weight exists"),
    ("arrow_config", "Arrow chooses among adapters token by token, so no merged weight exists"),
    ("use_bdlora", "block-diagonal factors are stored in another way"),
    ("kasa_config", "KaSA removes part of the base's weights and has a third factor"),
    ("velora_config", "VeLoRA stores more than two factors"),
    ("monteclora_config", "Monte Carlo LoRA samples its weights"),
    ("enable_lora", "LoRA of merged query, key and value parts is stored in another way"),
];

/// Fields that are read, and fields that only say how an adapter was trained or repeat what others say. `fan_in_fan_out` is one of
/// these: PEFT sets it by the kind of layer, whatever the file says.
const KNOWN: [&str; 31] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// The configuration, read field by field; what is wrong is collected, and reading goes on with a harmless value.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    pub problems: Vec<String>,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, problems: Vec::new() }
    }

    /// A field that is set: not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn problem(&mut self, name: &str, problem: String) {
        self.problems.push(format!("{name}: {problem}"));
    }

    pub fn refuse_what_changes_weights(&mut self) {
        for (name, value) in self.map.iter().filter(|(_, value)| is_set(value)) {
            if let Some((_, reason)) = UNSUPPORTED.iter().find(|(unsupported, _)| unsupported == name) {
                self.problems
                    .push(format!("{name}: not supported: {reason}; merge the adapter into its base with PEFT (merge_and_unload)"));
            } else if !KNOWN.contains(&name.as_str()) {
                let value = shortened(value);
                self.problems
                    .push(format!("{name}: is not known to this version and may change the weights, expected nothing, found {value}"));
            }
        }
        // Initialisations that also change the base's weights, of which nothing is left on disk.
        let init = match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => return,
            Some(Value::String(init)) => init.to_lowercase(),
            Some(other) => {
                let problem = format!("expected true, false or a name, found {}", shortened(other));
                return self.problem("init_lora_weights", problem);
            }
        };
        match init.as_str() {
            "gaussian" | "eva" | "orthogonal" | "mica" => {}
            "olora" | "corda" | "lora_ga" | "loftq" => self.refuse_init(&init),
            pissa if pissa.starts_with("pissa") => self.refuse_init(&init),
            _ => {
                let problem = format!("expected true, false, gaussian, eva, orthogonal or mica, found {init:?}, which is not known");
                self.problem("init_lora_weights", problem);
            }
        }
    }

    fn refuse_init(&mut self, init: &str) {
        let problem = format!(
            "not supported: {init:?} changed the base's weights when training began, and the adapter stands on the changed ones; \
             save it as a plain adapter (PEFT: save_pretrained with path_initial_model_for_weight_conversion) or merge it with PEFT"
        );
        self.problem("init_lora_weights", problem);
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.get(name)? {
            Value::String(text) => Some(text.clone()),
            other => {
                let problem = format!("expected text, found {}", shortened(other));
                self.problem(name, problem);
                None
            }
        }
    }

    pub fn flag(&mut self, name: &str) -> bool {
        match self.get(name) {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                let problem = format!("expected true or false, found {}", shortened(other));
                self.problem(name, problem);
                false
            }
        }
    }

    pub fn rank(&mut self, name: &str, value: Option<&Value>) -> Option<usize> {
        let rank = value.and_then(Value::as_u64).filter(|rank| (1..=MAX_RANK).contains(rank));
        if rank.is_none() {
            let found = value.map_or_else(|| "none".to_owned(), shortened);
            self.problem(name, format!("expected a rank from 1 to {MAX_RANK}, found {found}"));
        }
        rank.map(|rank| rank as usize)
    }

    pub fn alpha(&mut self, name: &str, value: Option<&Value>) -> Option<f64> {
        // A bound that keeps products of anything a file can hold finite.
        let alpha = value.and_then(Value::as_f64).filter(|alpha| alpha.abs() <= 1e18);
        if alpha.is_none() {
            let found = value.map_or_else(|| "none".to_owned(), shortened);
            self.problem(name, format!("expected a number, found {found}"));
        }
        alpha
    }

    pub fn bias(&mut self) -> BiasMode {
        match self.text("bias").as_deref() {
            None | Some("none") => BiasMode::None,
            Some("lora_only") => BiasMode::Lora,
            Some("all") => BiasMode::All,
            Some(other) => {
                let problem = format!("expected none, lora_only or all, found {other:?}");
                self.problem("bias", problem);
                BiasMode::None
            }
        }
    }

    /// A list of names, or one name.
    fn names(&mut self, name: &str) -> Vec<String> {
        let names: Option<Vec<String>> = match self.get(name) {
            None => Some(Vec::new()),
            Some(Value::String(one)) => Some(vec![one.clone()]),
            Some(Value::Array(items)) if items.len() <= MAX_ENTRIES => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
            Some(_) => None,
        };
        names.unwrap_or_else(|| {
            let found = self.get(name).map_or_else(String::new, shortened);
            self.problem(name, format!("expected a list of names, found {found}"));
            Vec::new()
        })
    }

    pub fn saved(&mut self) -> Vec<(String, Pattern)> {
        let mut names = self.names("modules_to_save");
        names.sort_unstable();
        names.dedup();
        let mut saved = Vec::new();
        for name in names {
            match Pattern::new(&name, Place::Within) {
                Ok(pattern) => saved.push((name, pattern)),
                Err(problem) => self.problem("modules_to_save", format!("{name:?} {problem}")),
            }
        }
        saved
    }

    pub fn targets(&mut self, name: &str) -> Option<Targets> {
        match self.get(name)?.clone() {
            Value::String(text) if text.to_lowercase() == "all-linear" => Some(Targets::Unknown),
            Value::String(text) => match Pattern::new(&text, Place::Whole) {
                Ok(pattern) => Some(Targets::Expression(pattern)),
                Err(problem) => {
                    self.problem(name, format!("{} {problem}", shortened(&Value::String(text))));
                    None
                }
            },
            _ => Some(Targets::Names(self.names(name))),
        }
    }

    pub fn patterns<T>(&mut self, name: &str, read: impl Fn(&mut Self, &str, Option<&Value>) -> Option<T>) -> Vec<(Pattern, T)> {
        let entries = match self.get(name) {
            None => return Vec::new(),
            Some(Value::Object(entries)) if entries.len() <= MAX_ENTRIES => entries.clone(),
            Some(other) => {
                let problem = format!("expected an object of patterns, found {}", shortened(other));
                self.problem(name, problem);
                return Vec::new();
            }
        };
        let mut patterns = Vec::new();
        for (key, value) in &entries {
            let value = read(self, &format!("{name}[{key:?}]"), Some(value));
            match (Pattern::new(key, Place::End), value) {
                (Ok(pattern), Some(value)) => patterns.push((pattern, value)),
                (Err(problem), _) => self.problem(name, format!("{key:?} {problem}")),
                (Ok(_), None) => {}
            }
        }
        patterns
    }

    pub fn layers(&mut self) -> Option<Layers> {
        let numbers: Option<Vec<u64>> = match self.get("layers_to_transform")? {
            Value::Number(number) => number.as_u64().map(|number| vec![number]),
            Value::Array(items) if items.len() <= MAX_ENTRIES => items.iter().map(Value::as_u64).collect(),
            _ => None,
        };
        let Some(numbers) = numbers else {
            let found = self.get("layers_to_transform").map_or_else(String::new, shortened);
            self.problem("layers_to_transform", format!("expected numbers of layers, found {found}"));
            return None;
        };
        let mut patterns = Vec::new();
        for name in self.names("layers_pattern").into_iter().filter(|name| !name.is_empty()) {
            match Pattern::of_layer_number(&name) {
                Ok(pattern) => patterns.push(pattern),
                Err(problem) => self.problem("layers_pattern", format!("{name:?} {problem}")),
            }
        }
        // An empty list asks for all layers.
        (!numbers.is_empty()).then_some(Layers { numbers, patterns })
    }
}

/// Whether Python would take the value for true.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
    }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((cut, _)) => format!("{}...", text.get(..cut).unwrap_or_default()),
        None => text,
    }
}
