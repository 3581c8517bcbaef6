//! What every tensor of an adapted checkpoint is made from: the names and shapes of a base and of an adapter's file, joined.
//! Pure; whatever does not fit is told at once, with file, tensor, expected and found.

use std::collections::{BTreeMap, BTreeSet};

use super::super::names::{BackboneNames, rides_along};
use super::super::{Dtype, Manifest, TensorInfo};
use super::config::{AdapterConfig, BiasMode};
use super::keys::{Factors, Keys};

/// How many problems are listed before the rest is counted.
const LISTED: usize = 20;

/// What a tensor is made from: one that is stored, and perhaps a term that is added to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub origin: Origin,
    pub term: Option<Term>,
}

/// A stored tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// Of the base, by its canonical name.
    Base(String),
    /// Of the adapter, by its name in the file.
    Adapter(String),
}

/// What an adapter adds to a tensor. Tensors are named as in the adapter's file.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    pub scale: f64,
    pub summand: Summand,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Summand {
    /// The product of two factors, `B A`.
    Product { a: String, b: String, rank: usize, orientation: Orientation },
    /// The bias of the second factor.
    Vector(String),
}

/// How the base stores the matrix that `B A` is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// `[outputs, inputs]`, as linear layers do.
    Rows,
    /// `[inputs, outputs]`, as embeddings and GPT-2's layers do: `(B A)^T` is added.
    Columns,
}

/// All tensors of an adapted checkpoint.
#[derive(Debug)]
pub struct Parts {
    pub manifest: Manifest,
    pub parts: BTreeMap<String, Part>,
    /// Sentences that are worth knowing and forbid nothing.
    pub notes: Vec<String>,
    /// Neither the adapter nor its base has a tensor that could be a reward head.
    pub headless: bool,
}

/// What is joined.
pub struct Sides<'a> {
    pub config: &'a AdapterConfig,
    pub model_type: &'a str,
    /// `lm_head` is the embedding, and the base is a language model.
    pub tied: bool,
    pub base: &'a Manifest,
    /// The base's folder, for messages.
    pub base_place: &'a str,
    pub adapter: &'a Manifest,
}

impl Parts {
    /// The error lists every problem as a sentence.
    pub fn new(sides: &Sides) -> Result<Self, Vec<String>> {
        let keys = Keys::new(&sides.adapter.names().collect::<Vec<_>>())?;
        let names = BackboneNames::of(sides.model_type);
        let mut joining = Joining { sides, names, parts: BTreeMap::new(), notes: Vec::new(), problems: Vec::new() };
        for name in sides.base.names() {
            joining.parts.insert(name.to_owned(), Part { origin: Origin::Base(name.to_owned()), term: None });
        }
        joining.untie(&keys);
        joining.take_whole(&keys);
        for (module, factors) in &keys.factors {
            joining.take_factors(module, factors);
        }
        joining.check_biases(&keys);
        joining.check_saved(&keys);
        joining.check_targets(&keys);
        let headless = joining.check_head(&keys);
        let Joining { parts, notes, mut problems, .. } = joining;
        if !problems.is_empty() {
            let count = problems.len();
            problems.truncate(LISTED);
            if count > LISTED {
                problems.push(format!("and {} more problems like these", count - LISTED));
            }
            return Err(problems);
        }
        let manifest = parts.iter().filter_map(|(name, part)| Some((name.clone(), part.info(sides.base, sides.adapter)?))).collect();
        Ok(Self { manifest, parts, notes, headless })
    }
}

impl Part {
    /// A sum is in float64 and not rounded.
    fn info(&self, base: &Manifest, adapter: &Manifest) -> Option<TensorInfo> {
        let origin = self.origin.info(base, adapter)?;
        let dtype = if self.term.is_some() { Dtype::F64 } else { origin.dtype };
        Some(TensorInfo { dtype, shape: origin.shape.clone() })
    }
}

impl Origin {
    pub fn info<'m>(&self, base: &'m Manifest, adapter: &'m Manifest) -> Option<&'m TensorInfo> {
        match self {
            Self::Base(name) => base.get(name),
            Self::Adapter(name) => adapter.get(name),
        }
    }
}

struct Joining<'a> {
    sides: &'a Sides<'a>,
    names: BackboneNames,
    parts: BTreeMap<String, Part>,
    notes: Vec<String>,
    problems: Vec<String>,
}

impl Joining<'_> {
    /// An adapter on the embedding leaves a language-model head that shares the embedding's weights as it was.
    fn untie(&mut self, keys: &Keys) {
        let Some(embedding) = self.names.embedding().filter(|_| self.sides.tied) else { return };
        let touched = |raw: &String| self.names.canonical(raw) == embedding;
        let changed = keys.whole.keys().any(touched) || keys.factors.keys().any(|module| touched(&format!("{module}.weight")));
        let head = keys.factors.contains_key("lm_head");
        if (changed || head) && self.parts.contains_key(&embedding) {
            self.parts.insert("lm_head.weight".to_owned(), Part { origin: Origin::Base(embedding), term: None });
        }
    }

    fn take_whole(&mut self, keys: &Keys) {
        let (base, adapter) = (self.sides.base, self.sides.adapter);
        for (raw, stored) in &keys.whole {
            let (canonical, Some(found)) = (self.names.canonical(raw), adapter.get(stored)) else { continue };
            if let Some(expected) = base.get(&canonical)
                && found.shape != expected.shape
                && !self.may_be_resized(&canonical, found, expected)
            {
                self.problems.push(format!(
                    "tensor {stored:?}: expected shape {:?} as tensor {canonical:?} of the base {}, found {:?}",
                    expected.shape, self.sides.base_place, found.shape
                ));
            }
            let part = Part { origin: Origin::Adapter(stored.clone()), term: None };
            if let Some(Part { origin: Origin::Adapter(other), .. }) = self.parts.insert(canonical.clone(), part) {
                self.problems.push(format!("tensors {other:?} and {stored:?} are both {canonical:?} of the model, expected it once"));
            }
        }
    }

    /// Heads may have other outputs than those of the base, and embeddings other tokens.
    fn may_be_resized(&self, canonical: &str, found: &TensorInfo, expected: &TensorInfo) -> bool {
        let rows_alone = found.shape.len() == 2 && found.shape.get(1) == expected.shape.get(1);
        let is_head = self.names.is_known() && !self.names.is_backbone(canonical);
        is_head || (rows_alone && self.names.embedding().as_deref() == Some(canonical))
    }

    fn take_factors(&mut self, module: &str, factors: &Factors) {
        let (sides, names) = (self.sides, self.names);
        let (a, b) = match (&factors.a, &factors.b) {
            (Some(a), Some(b)) => (a, b),
            (Some(present), None) | (None, Some(present)) => {
                let missing = if factors.a.is_some() { "B" } else { "A" };
                return self
                    .problems
                    .push(format!("tensor {present:?}: expected the other factor lora_{missing} of its module, found none"));
            }
            (None, None) => return self.problems.push(format!("module {module:?}: expected two factors, found a bias alone")),
        };
        if sides.config.adapts(module) == Some(false) {
            return self.problems.push(format!(
                "tensor {a:?}: expected no factors of module {module:?}, which target_modules (with exclude_modules, layers_to_transform and \
                 modules_to_save) does not choose: PEFT would not apply them"
            ));
        }
        let weight = names.canonical(&format!("{module}.weight"));
        let Some(origin) = self.parts.get(&weight).map(|part| part.origin.clone()) else {
            return self.problems.push(format!(
                "tensor {a:?}: expected tensor {weight:?} in the base {}, which it adapts, found none: another base?",
                sides.base_place
            ));
        };
        let info = |stored: &str| sides.adapter.get(stored);
        let (Some(wide), Some(of_a), Some(of_b)) = (origin.info(sides.base, sides.adapter), info(a), info(b)) else { return };
        let &[rows, columns] = wide.shape.as_slice() else {
            return self.problems.push(format!("tensor {a:?}: expected the adapted {weight:?} to be a matrix, found {wide}"));
        };
        let orientation =
            if factors.embedding || stores_columns(sides.model_type, &weight) { Orientation::Columns } else { Orientation::Rows };
        let (outputs, inputs) = if orientation == Orientation::Rows { (rows, columns) } else { (columns, rows) };
        let rank = sides.config.rank(module);
        let mut fits = true;
        for (stored, found, expected) in [(a, of_a, [rank, inputs]), (b, of_b, [outputs, rank])] {
            if found.shape != expected {
                fits = false;
                self.problems.push(format!(
                    "tensor {stored:?}: expected shape {expected:?} (rank {rank} by {}, and {weight:?} of the base {} is {wide}), found {:?}",
                    super::CONFIG, sides.base_place, found.shape
                ));
            }
        }
        for (stored, found) in [(a.as_str(), of_a), (b.as_str(), of_b), (weight.as_str(), wide)] {
            if !found.dtype.is_float() {
                fits = false;
                self.problems.push(format!(
                    "tensor {stored:?}: expected floating-point numbers, found {} (a quantised base cannot be adapted)",
                    found.dtype
                ));
            }
        }
        let scale = sides.config.scale(module);
        if fits && let Some(part) = self.parts.get_mut(&weight) {
            part.term = Some(Term { scale, summand: Summand::Product { a: a.clone(), b: b.clone(), rank, orientation } });
        }
        self.take_factor_bias(module, factors, b, outputs, scale);
    }

    fn take_factor_bias(&mut self, module: &str, factors: &Factors, b: &str, outputs: usize, scale: f64) {
        let name = self.names.canonical(&format!("{module}.bias"));
        match &factors.bias {
            None if self.sides.config.factor_bias && !factors.embedding => {
                self.problems.push(format!("tensor {b:?}: expected a bias beside it, as lora_bias says, found none"));
            }
            None => {}
            Some(bias) if !self.sides.config.factor_bias => {
                self.problems.push(format!("tensor {bias:?}: expected no such tensor, as lora_bias is false: PEFT would not apply it"));
            }
            Some(bias) => {
                let found = self.sides.adapter.get(bias);
                match self.parts.get_mut(&name) {
                    Some(part) if found.is_some_and(|found| found.shape == [outputs] && found.dtype.is_float()) => {
                        part.term = Some(Term { scale, summand: Summand::Vector(bias.clone()) });
                    }
                    Some(_) => {
                        let found = found.map(ToString::to_string).unwrap_or_default();
                        self.problems.push(format!("tensor {bias:?}: expected {outputs} floating-point numbers, found {found}"));
                    }
                    None => self.problems.push(format!(
                        "tensor {bias:?}: expected tensor {name:?} in the base {}, to which lora_bias adds, found none",
                        self.sides.base_place
                    )),
                }
            }
        }
    }

    /// Whether a sequence classifier of the family reads a tensor of the base's backbone.
    fn is_read(&self, canonical: &str, info: &TensorInfo) -> bool {
        self.names.is_backbone(canonical) && !rides_along(canonical, info)
    }

    /// Biases that were trained must be in the file.
    fn check_biases(&mut self, keys: &Keys) {
        let of_factors: BTreeSet<String> = keys.factors.keys().map(|module| self.names.canonical(&format!("{module}.bias"))).collect();
        let trained = |(name, info): &(&str, &TensorInfo)| match self.sides.config.bias {
            BiasMode::None => false,
            BiasMode::All => name.ends_with(".bias") && self.is_read(name, info),
            BiasMode::Lora => of_factors.contains(*name),
        };
        let unsaved = |name: &&str| matches!(self.parts.get(*name), Some(Part { origin: Origin::Base(_), .. }));
        let lost: Vec<&str> = self.sides.base.iter().filter(trained).map(|(name, _)| name).filter(unsaved).collect();
        if let Some(first) = lost.first() {
            let mode = if self.sides.config.bias == BiasMode::All { "all" } else { "lora_only" };
            self.problems.push(format!(
                "bias is {mode:?} in {}, so {} biases of the base were trained; expected them in the file, found none of {first:?} \
                 (PEFT before 0.18 did not save them with lora_only)",
                super::CONFIG,
                lost.len()
            ));
        }
    }

    /// Modules that were trained as a whole must be in the file, but for a head, which may be the base's.
    fn check_saved(&mut self, keys: &Keys) {
        let module = |name: &str| name.rsplit_once('.').map_or_else(String::new, |(module, _)| module.to_owned());
        for (name, pattern) in &self.sides.config.saved {
            let of_base = |(name, info): &(&str, &TensorInfo)| pattern.matches(&module(name)) && self.is_read(name, info);
            if keys.whole.keys().any(|raw| pattern.matches(&module(raw))) {
                continue;
            }
            if let Some((lost, _)) = self.sides.base.iter().find(of_base) {
                self.problems.push(format!("modules_to_save names {name:?}, so {lost:?} was trained; expected it in the file, found none"));
            }
        }
    }

    /// Modules that were adapted must have factors in the file.
    fn check_targets(&mut self, keys: &Keys) {
        // What the adapter's own names have in front of the backbone, where canonical ones have the family's prefix.
        let canonical = |module: &str| self.names.canonical(&format!("{module}.weight"));
        let in_front = |module: &String| {
            let weight = canonical(module);
            let behind = weight.strip_prefix(self.names.prefix())?.strip_suffix(".weight")?;
            self.names.is_backbone(&weight).then(|| module.strip_suffix(behind).map(str::to_owned)).flatten()
        };
        let in_front = keys.factors.keys().find_map(in_front).unwrap_or_else(|| self.names.prefix().to_owned());
        let adapted: BTreeSet<String> = keys.factors.keys().map(|module| canonical(module)).collect();
        let lacks = |(name, info): &(&str, &TensorInfo)| {
            let Some(behind) = name.strip_prefix(self.names.prefix()).and_then(|name| name.strip_suffix(".weight")) else { return false };
            info.shape.len() == 2
                && self.is_read(name, info)
                && self.sides.config.adapts(&format!("{in_front}{behind}")) == Some(true)
                && !adapted.contains(*name)
        };
        let lost: Vec<&str> = self.sides.base.iter().filter(lacks).map(|(name, _)| name).collect();
        if let Some(first) = lost.first() {
            let count = lost.len();
            self.problems.push(format!("target_modules chooses {count} matrices of the base that have no factors in the file; expected lora_A and lora_B for {first:?}"));
        }
    }

    fn check_head(&mut self, keys: &Keys) -> bool {
        if !self.names.is_known() {
            return false;
        }
        let may_be_head = |name: &str, info: &TensorInfo| !self.names.is_backbone(name) && !rides_along(name, info);
        let is_head = |(raw, stored): (&String, &String)| {
            self.sides.adapter.get(stored).is_some_and(|info| may_be_head(&self.names.canonical(raw), info))
        };
        if keys.whole.iter().any(is_head) {
            return false;
        }
        let of_base: Vec<&str> = self.sides.base.iter().filter(|(name, info)| may_be_head(name, info)).map(|(name, _)| name).collect();
        if of_base.is_empty() {
            return true;
        }
        self.notes.push(format!(
            "the adapter was saved without a reward head; that of its base {} is used ({})",
            self.sides.base_place,
            of_base.join(", ")
        ));
        false
    }
}

/// Layers that store their weights as `[inputs, outputs]` (`Conv1D` of transformers): GPT-2's alone.
fn stores_columns(model_type: &str, weight: &str) -> bool {
    model_type == "gpt2" && weight.starts_with("transformer.h.")
}
