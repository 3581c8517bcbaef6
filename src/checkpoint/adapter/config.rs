//! `adapter_config.json`, as PEFT writes it, to the numbers and patterns that the weights depend on. Pure; every mistake and
//! everything that is not supported is told at once, by its name.

use fancy_regex::Regex;
use serde_json::Value;

use super::fields::Fields;
use super::pattern::Pattern;

/// What a LoRA adapter's configuration says of its weights.
#[derive(Debug)]
pub struct AdapterConfig {
    /// `base_model_name_or_path`.
    pub base: Option<String>,
    pub bias: BiasMode,
    /// `lora_bias`: the second factor has a bias of its own.
    pub factor_bias: bool,
    /// `modules_to_save`, each as it is found in a module's name.
    pub saved: Vec<(String, Pattern)>,
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
    targets: Targets,
    excluded: Option<Targets>,
    layers: Option<Layers>,
}

/// Which biases of the base were trained with the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasMode {
    None,
    /// Those of the adapted modules.
    Lora,
    All,
}

/// `target_modules` or `exclude_modules`.
#[derive(Debug)]
pub enum Targets {
    /// By PEFT's table for the family, or every linear layer: which ones, the file alone knows.
    Unknown,
    /// Names, or ends of names.
    Names(Vec<String>),
    Expression(Pattern),
}

/// `layers_to_transform` and `layers_pattern`.
#[derive(Debug)]
pub struct Layers {
    pub numbers: Vec<u64>,
    pub patterns: Vec<Regex>,
}

impl AdapterConfig {
    /// The error lists every mistake as a sentence that names the field.
    pub fn parse(config: &Value) -> Result<Self, Vec<String>> {
        let Value::Object(map) = config else {
            return Err(vec!["expected a JSON object".to_owned()]);
        };
        let mut fields = Fields::new(map);
        let peft_type = fields.text("peft_type").unwrap_or_default();
        if peft_type != "LORA" {
            return Err(vec![format!("peft_type: expected \"LORA\", found {peft_type:?}: no other kind of adapter is supported")]);
        }
        fields.refuse_what_changes_weights();
        let layers = fields.layers();
        let parsed = Self {
            base: fields.text("base_model_name_or_path"),
            bias: fields.bias(),
            factor_bias: fields.flag("lora_bias"),
            saved: fields.saved(),
            rank: fields.rank("r", fields.get("r").cloned().as_ref()).unwrap_or(1),
            alpha: fields.alpha("lora_alpha", fields.get("lora_alpha").cloned().as_ref()).unwrap_or(1.0),
            rank_stabilised: fields.flag("use_rslora"),
            ranks: fields.patterns("rank_pattern", Fields::rank),
            alphas: fields.patterns("alpha_pattern", Fields::alpha),
            targets: fields.targets("target_modules").unwrap_or(Targets::Unknown),
            excluded: fields.targets("exclude_modules"),
            layers,
        };
        if fields.problems.is_empty() { Ok(parsed) } else { Err(fields.problems) }
    }

    /// The rank of the factors of a module.
    pub fn rank(&self, module: &str) -> usize {
        self.ranks.iter().find(|(pattern, _)| pattern.matches(module)).map_or(self.rank, |(_, rank)| *rank)
    }

    /// What the product of a module's factors is multiplied with (LoRA, 2106.09685; rsLoRA, 2312.03732).
    pub fn scale(&self, module: &str) -> f64 {
        let alpha = self.alphas.iter().find(|(pattern, _)| pattern.matches(module)).map_or(self.alpha, |(_, alpha)| *alpha);
        let rank = self.rank(module) as f64;
        alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }

    /// Whether PEFT adapts a module of this name (`check_target_module_exists`); `None` where the configuration does not say.
    pub fn adapts(&self, module: &str) -> Option<bool> {
        if self.excluded.as_ref().is_some_and(|excluded| excluded.contain(module) == Some(true)) || self.is_saved(module) {
            return Some(false);
        }
        let adapted = self.targets.contain(module)?;
        match (&self.layers, &self.targets) {
            (Some(layers), Targets::Names(names)) if adapted && !names.iter().any(|name| name == module) => Some(layers.contain(module)),
            _ => Some(adapted),
        }
    }

    /// Whether a module of this name is trained and stored as a whole.
    pub fn is_saved(&self, module: &str) -> bool {
        self.saved.iter().any(|(_, pattern)| pattern.matches(module))
    }
}

impl Targets {
    fn contain(&self, module: &str) -> Option<bool> {
        match self {
            Self::Unknown => None,
            Self::Names(names) => Some(
                names
                    .iter()
                    .any(|name| module.strip_suffix(name.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))),
            ),
            Self::Expression(pattern) => Some(pattern.matches(module)),
        }
    }
}

impl Layers {
    fn contain(&self, module: &str) -> bool {
        let number = if self.patterns.is_empty() {
            // The first number that follows two segments.
            let segments: Vec<&str> = module.split('.').collect();
            let numbers = segments.iter().enumerate().skip(2).take(segments.len().saturating_sub(3));
            numbers.map(|(_, segment)| *segment).find(|segment| is_number(segment)).and_then(|segment| segment.parse().ok())
        } else {
            let found = self.patterns.iter().find_map(|pattern| pattern.captures(module).ok().flatten());
            found.and_then(|found| found.name("idx")?.as_str().parse().ok())
        };
        number.is_some_and(|number: u64| self.numbers.contains(&number))
    }
}

fn is_number(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
