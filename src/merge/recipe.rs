//! The recipe: which checkpoints, in which order, mixed how, to which dtype. As a file it is YAML:
//!
//! ```yaml
//! method: slerp               # linear (WARM; the default), slerp (WARP) or ema
//! slerp:                      # how; for slerp alone
//!   granularity: layer        # layer (default), tensor or global: what is one vector, with one angle
//!   t: 0.5                    # with two members: how far to go from the first to the second; 0.5 is the default
//! liti: {eta: 0.3}            # optional, after any method: the way from init to the merge, 1 being all of it
//! init: ./init                # the shared initialisation; slerp and liti need it
//! members:
//!   - {path: ./rm-0, name: rm-0}
//!   - ./rm-1                  # name: last path segment
//!   - {path: ./rm-2-lora, base: ./sft}   # a LoRA adapter; base: as its adapter_config.json says, if left out
//! rules:                      # optional, per tensor; the first that matches decides alone, method and liti do not apply
//!   - {match: "score.*", from: rm-0}                                            # one member's
//!   - {match: "model.embed_tokens.*", coefficients: {rm-0: 0.75, rm-1: 0.25}}   # a weighted mean
//!   - {match: "model.norm.*", init: true}                                       # the initialisation's
//! kind: reward                # reward (default), or policy: any language model, merged and written but never served
//! dtype: float32              # float32 (default), bfloat16 or float16
//! ```
//!
//! | method | the merged tensor, with task vectors `δ_m = φ_m − init` | source |
//! |---|---|---|
//! | `linear` | `Σ c_m φ_m`; `c` is each member's `coefficient` (1 unless given), divided by their sum unless `normalize: false` | WARM 2401.12187 §3.1, `φ_WARM = (1/M) Σ φ_m` |
//! | `slerp` | `init + sin((1−t)Ω)/sin Ω · δ_1 + sin(tΩ)/sin Ω · δ_2`, `Ω` the angle of the two; more members one after the other in the listed order, the `m`-th with `t = 1/m` | WARP 2406.16768 §3.2, Eq. 26 |
//! | `ema` | `a ← (1−μ) a + μ φ_m` from the first member on, in the listed order, with `ema: {mu: 0.01}` | WARP §3.1 |
//! | `liti` | `init + η (merged − init)`; `η` above 1 extrapolates | WARP §3.3 |
//!
//! A running average goes on where its first member is what the earlier run has written. `method:` may be left out where
//! `slerp:` or `ema:` stands. A path, also that of `init`, is a checkpoint folder (such as one that `warm merge` has
//! written) or another recipe (`.yaml`, `.yml` or `.json`), whose merge is then made while it is read. A tensor may be
//! absent from a member only where a rule says whose is taken.
//!
//! Paths are relative to the file. Unknown keys are mistakes, and all mistakes are reported at once.

mod fields;
mod read;

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, json};
use serde_norway::Value;

use super::glob::Glob;
use crate::checkpoint::{Dtype, HeadChoice};
use crate::domain::MemberName;

/// A recipe is written by hand; more is another file by mistake.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// What is merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A reward model: its family is known, its tensors are those that the model reads.
    #[default]
    Reward,
    /// Any language model: all of its tensors, whatever the family. It cannot be served.
    Policy,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Policy => "policy",
        }
    }
}

/// How members become one model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// The weighted mean of all members (WARM).
    Linear,
    /// Spherical interpolation of task vectors (WARP §3.2, Eq. 26). `t` counts with two members.
    Slerp { granularity: Granularity, t: f64 },
    /// The exponential moving average over the members in order (WARP §3.1).
    Ema { mu: f64 },
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Slerp { .. } => "slerp",
            Self::Ema { .. } => "ema",
        }
    }
}

/// What SLERP takes as one vector, with one angle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Granularity {
    /// All tensors under a name up to and including its first numeric segment; any other tensor is its own group.
    #[default]
    Layer,
    Tensor,
    /// The whole model, but for what rules decide.
    Global,
}

impl Granularity {
    const ALL: [Self; 3] = [Self::Layer, Self::Tensor, Self::Global];

    pub fn name(self) -> &'static str {
        match self {
            Self::Layer => "layer",
            Self::Tensor => "tensor",
            Self::Global => "global",
        }
    }
}

/// A checked recipe: at least one member, unique names, coefficients that are finite, and an init wherever one is needed.
/// Whether its folders can be merged is for the plan to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    kind: Kind,
    method: Method,
    normalize: bool,
    liti: Option<f64>,
    init: Option<PathBuf>,
    /// Where it was fetched from, where `init` is a copy.
    pub(super) init_origin: Option<String>,
    members: Vec<Member>,
    rules: Vec<Rule>,
    dtype: Dtype,
    pub(super) head: HeadChoice,
}

/// One checkpoint of a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub name: MemberName,
    pub path: PathBuf,
    /// The checkpoint that a LoRA adapter stands on, in place of the one that its configuration names.
    pub base: Option<PathBuf>,
    /// Its share in the merge. Those of all members sum to 1, unless the recipe says `normalize: false`. What SLERP
    /// multiplies with follows from angles; the shares of its members are those at an angle of zero.
    pub coefficient: f64,
    /// Where it was fetched from, where `path` is a copy.
    pub origin: Option<String>,
    /// Likewise of the base.
    pub base_origin: Option<String>,
}

/// What is taken where a tensor's name matches, whatever the method.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub pattern: Glob,
    pub take: Take,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Take {
    /// The member's at this place of the list.
    From(usize),
    /// The sum of members, one coefficient for each of them.
    Mix(Coefficients),
    Init,
}

/// Every mistake of a recipe, as sentences.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct RecipeError {
    /// The recipe's file, if it is one.
    pub file: Option<String>,
    pub problems: Vec<String>,
}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "recipe {file}: ")?,
            None => f.write_str("recipe: ")?,
        }
        f.write_str(&self.problems.join("; "))
    }
}

/// Mixing numbers: finite, not all zero, and their sum is 1 unless they were asked for as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct Coefficients(Vec<f64>);

impl Coefficients {
    /// The same for each of `count` members.
    pub fn uniform(count: usize) -> Self {
        Self(vec![1.0 / count as f64; count])
    }

    /// Divides by the sum. Negative coefficients extrapolate and are allowed; a sum that is not positive, or so much
    /// smaller than its parts that dividing by it would blow them up, is not. Coefficients that sum to 1 up to rounding
    /// stay as they are, so that a resolved recipe resolves to itself.
    pub fn try_new(raw: &[f64]) -> Result<Self, String> {
        Self::check(raw)?;
        let sum: f64 = raw.iter().sum();
        let size: f64 = raw.iter().map(|value| value.abs()).sum();
        if sum.is_nan() || sum <= 1e-6 * size {
            return Err(format!("the coefficients sum to {sum}, expected a sum clearly above 0, because they are divided by it"));
        }
        // The rounding of a sum grows with what is summed, which extrapolation makes large.
        if (sum - 1.0).abs() <= raw.len() as f64 * f64::EPSILON * size.max(1.0) {
            return Ok(Self(raw.to_vec()));
        }
        let normalised: Vec<f64> = raw.iter().map(|value| value / sum).collect();
        if normalised.iter().all(|value| value.is_finite()) {
            Ok(Self(normalised))
        } else {
            Err(format!("the coefficients sum to {sum}, which is too small to divide by"))
        }
    }

    /// Takes them as they are.
    pub fn as_given(raw: &[f64]) -> Result<Self, String> {
        Self::check(raw)?;
        if raw.iter().all(|&value| value == 0.0) {
            return Err("the coefficients are all 0, expected at least one other".to_owned());
        }
        Ok(Self(raw.to_vec()))
    }

    fn check(raw: &[f64]) -> Result<(), String> {
        if let Some((index, value)) = raw.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            return Err(format!("coefficient {index} is {value}, expected a finite number"));
        }
        if raw.iter().map(|value| value.abs()).sum::<f64>().is_finite() {
            Ok(())
        } else {
            Err("the coefficients are too large to be summed".to_owned())
        }
    }

    pub fn as_slice(&self) -> &[f64] {
        &self.0
    }
}

impl Recipe {
    /// Reads a recipe; paths in it are relative to `base`.
    pub fn from_yaml(text: &str, base: &Path) -> Result<Self, RecipeError> {
        let value: Value = serde_norway::from_str(text)
            .map_err(|error| RecipeError { file: None, problems: vec![format!("is not valid YAML: {error}")] })?;
        read::resolve(&value, base).map_err(|problems| RecipeError { file: None, problems })
    }

    /// Reads a recipe file; paths in it are relative to its folder.
    pub fn from_file(path: &Path) -> Result<Self, RecipeError> {
        let wrong = |problem: String| RecipeError { file: Some(path.display().to_string()), problems: vec![problem] };
        let cannot = |error: std::io::Error| wrong(format!("cannot be read: {error}"));
        let found = std::fs::metadata(path).map_err(cannot)?;
        if !found.is_file() {
            return Err(wrong("is not a file".to_owned()));
        }
        if found.len() > MAX_RECIPE_BYTES {
            return Err(wrong(format!("has {} bytes, expected at most {MAX_RECIPE_BYTES}", found.len())));
        }
        let text = std::fs::read_to_string(path).map_err(cannot)?;
        let base = path.parent().unwrap_or(Path::new(""));
        Self::from_yaml(&text, base).map_err(|error| RecipeError { file: Some(path.display().to_string()), ..error })
    }

    /// The uniform average of some folders. Folders with the same last path segment are told apart by the one before it.
    pub fn uniform(paths: &[PathBuf]) -> Result<Self, RecipeError> {
        read::uniform(paths).map_err(|problems| RecipeError { file: None, problems })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn method(&self) -> Method {
        self.method
    }

    /// How far to go from init to the merge; `None` for all the way, without looking at init.
    pub fn liti(&self) -> Option<f64> {
        self.liti
    }

    pub fn init(&self) -> Option<&Path> {
        self.init.as_deref()
    }

    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The first that matches a tensor's name decides.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What the merged model is stored and run in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same recipe for another output dtype; integers have none.
    pub fn with_dtype(self, dtype: Dtype) -> Option<Self> {
        dtype_name(dtype).map(|_| Self { dtype, ..self })
    }

    /// All places, and where they were fetched from, for those who fetch them.
    pub fn places_mut(&mut self) -> impl Iterator<Item = (&mut PathBuf, &mut Option<String>)> {
        let members = self.members.iter_mut().flat_map(|Member { path, base, origin, base_origin, .. }| {
            std::iter::once((path, origin)).chain(base.as_mut().zip(Some(base_origin)))
        });
        members.chain(self.init.as_mut().zip(Some(&mut self.init_origin)))
    }

    /// The recipe with nothing left to default: JSON (which is YAML, too) that reads as this same recipe.
    pub fn to_resolved_string(&self) -> String {
        self.to_json().to_string()
    }

    /// The same as a value.
    pub fn to_json(&self) -> serde_json::Value {
        let mut resolved = Map::new();
        resolved.insert("kind".to_owned(), self.kind.name().into());
        resolved.insert("method".to_owned(), self.method.name().into());
        match self.method {
            Method::Linear => _ = resolved.insert("normalize".to_owned(), self.normalize.into()),
            Method::Slerp { granularity, t } => {
                let mut slerp = Map::from_iter([("granularity".to_owned(), granularity.name().into())]);
                if self.members.len() == 2 {
                    slerp.insert("t".to_owned(), t.into());
                }
                resolved.insert("slerp".to_owned(), slerp.into());
            }
            Method::Ema { mu } => _ = resolved.insert("ema".to_owned(), json!({ "mu": mu })),
        }
        if !matches!(self.method, Method::Linear) && !self.normalize {
            resolved.insert("normalize".to_owned(), false.into());
        }
        if let Some(eta) = self.liti {
            resolved.insert("liti".to_owned(), json!({ "eta": eta }));
        }
        let named = |path: &Path, origin: &Option<String>| origin.clone().unwrap_or_else(|| path.to_string_lossy().into_owned());
        if let Some(init) = &self.init {
            resolved.insert("init".to_owned(), named(init, &self.init_origin).into());
        }
        let member = |member: &Member| {
            let mut resolved = json!({"path": named(&member.path, &member.origin), "name": member.name.as_str()});
            if let Some(base) = &member.base {
                resolved["base"] = named(base, &member.base_origin).into();
            }
            if matches!(self.method, Method::Linear) {
                resolved["coefficient"] = member.coefficient.into();
            }
            resolved
        };
        resolved.insert("members".to_owned(), self.members.iter().map(member).collect());
        if !self.rules.is_empty() {
            resolved.insert("rules".to_owned(), self.rules.iter().map(|rule| self.rule_to_json(rule)).collect());
        }
        resolved.insert("dtype".to_owned(), dtype_name(self.dtype).unwrap_or_default().into());
        resolved.extend(self.head.to_json());
        serde_json::Value::Object(resolved)
    }

    fn rule_to_json(&self, rule: &Rule) -> serde_json::Value {
        let pattern = rule.pattern.as_str();
        match &rule.take {
            Take::From(index) => json!({"match": pattern, "from": self.members.get(*index).map(|member| member.name.as_str())}),
            Take::Init => json!({"match": pattern, "init": true}),
            Take::Mix(coefficients) => {
                let named = self.members.iter().zip(coefficients.as_slice()).filter(|(_, coefficient)| **coefficient != 0.0);
                let named: Map<String, serde_json::Value> =
                    named.map(|(member, &coefficient)| (member.name.to_string(), coefficient.into())).collect();
                json!({"match": pattern, "coefficients": named})
            }
        }
    }
}

/// The names of output dtypes in a recipe.
const DTYPES: [(&str, Dtype); 3] = [("float32", Dtype::F32), ("bfloat16", Dtype::Bf16), ("float16", Dtype::F16)];

/// The name of an output dtype in a recipe.
pub fn dtype_name(dtype: Dtype) -> Option<&'static str> {
    DTYPES.iter().find(|(_, known)| *known == dtype).map(|(name, _)| *name)
}

/// Whether a path is another recipe by its name.
pub fn is_recipe(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ["yaml", "yml", "json"].iter().any(|known| ending == *known))
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
