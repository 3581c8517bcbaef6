//! The recipe: which checkpoints, in which order, with which coefficients, to which dtype. As a file it is YAML:
//!
//! ```yaml
//! method: linear              # WARM; the default
//! init: ./init                # optional: the shared initialisation
//! members:
//!   - {path: ./rm-0, name: rm-0, coefficient: 1.0}
//!   - ./rm-1                  # name: last path segment; coefficient: 1
//! dtype: float32              # float32 (default), bfloat16 or float16
//! pooling: last_token         # optional: where the head reads, and
//! head: {name: score}         # which head, where the checkpoint leaves it open; `checkpoint::head_choice` has all keys
//! ```
//!
//! Paths are relative to the file. Unknown keys are mistakes, and all mistakes are reported at once.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_norway::{Mapping, Value};

use super::recipe_head;
use crate::checkpoint::{Dtype, HeadChoice};
use crate::domain::MemberName;

/// A recipe is written by hand; more is another file by mistake.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// How members become one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The weighted mean of all members (WARM).
    Linear,
}

impl Method {
    const ALL: [Self; 1] = [Self::Linear];

    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
        }
    }
}

/// A checked recipe: at least one member, unique names, coefficients that sum to 1. Whether its folders can be merged is
/// for the plan to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    method: Method,
    init: Option<PathBuf>,
    members: Vec<Member>,
    dtype: Dtype,
    pub(super) head: HeadChoice,
}

/// One checkpoint of a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub name: MemberName,
    pub path: PathBuf,
    /// Normalised: those of all members sum to 1.
    pub coefficient: f64,
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

/// Mixing numbers: finite, and their sum is 1.
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
        if let Some((index, value)) = raw.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            return Err(format!("coefficient {index} is {value}, expected a finite number"));
        }
        let sum: f64 = raw.iter().sum();
        let size: f64 = raw.iter().map(|value| value.abs()).sum();
        if !size.is_finite() {
            return Err("the coefficients are too large to be summed".to_owned());
        }
        if sum.is_nan() || sum <= 1e-6 * size {
            return Err(format!("the coefficients sum to {sum}, expected a sum clearly above 0, because they are divided by it"));
        }
        if (sum - 1.0).abs() <= raw.len() as f64 * f64::EPSILON {
            return Ok(Self(raw.to_vec()));
        }
        let normalised: Vec<f64> = raw.iter().map(|value| value / sum).collect();
        if normalised.iter().all(|value| value.is_finite()) {
            Ok(Self(normalised))
        } else {
            Err(format!("the coefficients sum to {sum}, which is too small to divide by"))
        }
    }

    pub fn as_slice(&self) -> &[f64] {
        &self.0
    }
}

/// A recipe as it was written, not yet checked; a configuration file holds one under `model:`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RecipeFile(Value);

impl RecipeFile {
    /// Checks the recipe; paths in it are relative to `base`.
    pub fn resolve(&self, base: &Path) -> Result<Recipe, RecipeError> {
        let mut problems = Vec::new();
        let recipe = resolve(&self.0, base, &mut problems);
        match recipe {
            Some(recipe) if problems.is_empty() => Ok(recipe),
            _ => Err(RecipeError { file: None, problems }),
        }
    }
}

impl Recipe {
    /// Reads a recipe; paths in it are relative to `base`.
    pub fn from_yaml(text: &str, base: &Path) -> Result<Self, RecipeError> {
        let value: Value = serde_norway::from_str(text)
            .map_err(|error| RecipeError { file: None, problems: vec![format!("is not valid YAML: {error}")] })?;
        RecipeFile(value).resolve(base)
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
        let mut problems = Vec::new();
        let last: Vec<_> = paths.iter().map(|path| default_name(path, 1)).collect();
        let mut drafts = Vec::new();
        for (index, (path, name)) in paths.iter().zip(&last).enumerate() {
            let repeated = last.iter().filter(|other| *other == name).count() > 1;
            let name = if repeated { default_name(path, 2) } else { name.clone() };
            match name {
                Some(name) => drafts.push(Draft { index, name, path: path.clone(), coefficient: 1.0 }),
                None => problems.push(format!("no name can be taken from the path {:?}", path.display().to_string())),
            }
        }
        match finish(Method::Linear, None, drafts, Dtype::F32, &mut problems) {
            Some(recipe) if problems.is_empty() => Ok(recipe),
            _ => Err(RecipeError { file: None, problems }),
        }
    }

    pub fn method(&self) -> Method {
        self.method
    }

    pub fn init(&self) -> Option<&Path> {
        self.init.as_deref()
    }

    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// What the merged model is stored and run in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same recipe for another output dtype; integers have none.
    pub fn with_dtype(self, dtype: Dtype) -> Option<Self> {
        dtype_name(dtype).map(|_| Self { dtype, ..self })
    }

    /// The recipe with nothing left to default: JSON (which is YAML, too) that reads as this same recipe.
    pub fn to_resolved_string(&self) -> String {
        let members: Vec<_> = self
            .members
            .iter()
            .map(|member| {
                serde_json::json!({"path": member.path.to_string_lossy(), "name": member.name.as_str(), "coefficient": member.coefficient})
            })
            .collect();
        let mut resolved = serde_json::Map::new();
        resolved.insert("method".to_owned(), self.method.name().into());
        if let Some(init) = &self.init {
            resolved.insert("init".to_owned(), init.to_string_lossy().into());
        }
        resolved.insert("members".to_owned(), members.into());
        resolved.insert("dtype".to_owned(), dtype_name(self.dtype).unwrap_or_default().into());
        resolved.extend(self.head.to_json());
        serde_json::Value::Object(resolved).to_string()
    }
}

/// The names of output dtypes in a recipe.
const DTYPES: [(&str, Dtype); 3] = [("float32", Dtype::F32), ("bfloat16", Dtype::Bf16), ("float16", Dtype::F16)];

/// The name of an output dtype in a recipe.
pub fn dtype_name(dtype: Dtype) -> Option<&'static str> {
    DTYPES.iter().find(|(_, known)| *known == dtype).map(|(name, _)| *name)
}

/// A member whose name and coefficient are still as they were written.
struct Draft {
    /// Its place in the list.
    index: usize,
    name: String,
    path: PathBuf,
    coefficient: f64,
}

fn resolve(value: &Value, base: &Path, problems: &mut Vec<String>) -> Option<Recipe> {
    let Value::Mapping(recipe) = value else {
        problems.push(format!("expected keys method, init, members, dtype, head, pooling; found {}", kind(value)));
        return None;
    };
    check_keys(recipe, "", &["method", "init", "members", "dtype", "head", "pooling"], problems);
    let head = recipe_head::read(recipe, problems);
    let method = match text(recipe, "", "method", problems) {
        None => Method::Linear,
        Some(name) => Method::ALL.into_iter().find(|method| method.name() == name).unwrap_or_else(|| {
            problems.push(format!("method: {name:?} is not known to this version, expected {:?}", Method::Linear.name()));
            Method::Linear
        }),
    };
    let dtype = match text(recipe, "", "dtype", problems) {
        None => Dtype::F32,
        Some(name) => DTYPES.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype).unwrap_or_else(|| {
            problems.push(format!("dtype: {name:?} is unknown, expected float32, bfloat16 or float16"));
            Dtype::F32
        }),
    };
    let init = path(recipe, "", "init", base, problems);
    let mut drafts = Vec::new();
    match recipe.get("members") {
        Some(Value::Sequence(members)) => {
            for (index, member) in members.iter().enumerate() {
                drafts.extend(draft(member, index, base, problems));
            }
            if members.is_empty() {
                problems.push("members: the list is empty, expected at least one checkpoint".to_owned());
            }
        }
        Some(other) => problems.push(format!("members: expected a list, found {}", kind(other))),
        None => problems.push("members: missing, expected a list of checkpoints".to_owned()),
    }
    if drafts.is_empty() { None } else { finish(method, init, drafts, dtype, problems).map(|recipe| Recipe { head, ..recipe }) }
}

fn draft(value: &Value, index: usize, base: &Path, problems: &mut Vec<String>) -> Option<Draft> {
    let place = &format!("members[{index}]");
    let (found, name, coefficient) = match value {
        Value::String(found) if !found.is_empty() => (Some(base.join(found)), None, 1.0),
        Value::Mapping(member) => {
            check_keys(member, place, &["path", "name", "coefficient"], problems);
            let coefficient = match member.get("coefficient") {
                None => 1.0,
                Some(value) => value.as_f64().filter(|number| number.is_finite()).unwrap_or_else(|| {
                    problems.push(format!("{place}.coefficient: expected a finite number, found {}", kind(value)));
                    1.0
                }),
            };
            if !member.contains_key("path") {
                problems.push(format!("{place}.path: missing, expected a checkpoint folder"));
            }
            (path(member, place, "path", base, problems), text(member, place, "name", problems), coefficient)
        }
        other => {
            problems.push(format!("{place}: expected a path or {{path, name, coefficient}}, found {}", kind(other)));
            (None, None, 1.0)
        }
    };
    let path = found?;
    let Some(name) = name.or_else(|| default_name(&path, 1)) else {
        problems.push(format!("{place}.name: missing, and no name can be taken from the path {:?}", path.display().to_string()));
        return None;
    };
    if let Err(invalid) = MemberName::try_from(name.clone()) {
        problems.push(format!("{place}.name: {invalid}"));
    }
    Some(Draft { index, name, path, coefficient })
}

fn finish(method: Method, init: Option<PathBuf>, drafts: Vec<Draft>, dtype: Dtype, problems: &mut Vec<String>) -> Option<Recipe> {
    // With a mistake in a member, the sum of all would give mistakes that are none.
    let sum_is_known = problems.is_empty();
    for (place, draft) in drafts.iter().enumerate() {
        if let Some(first) = drafts.iter().take(place).find(|other| other.name == draft.name) {
            let (index, name) = (draft.index, &draft.name);
            problems.push(format!("members[{index}].name: {name:?} is the name of members[{}] already, give it another", first.index));
        }
    }
    if drafts.is_empty() && problems.is_empty() {
        problems.push("members: the list is empty, expected at least one checkpoint".to_owned());
    }
    if !sum_is_known {
        return None;
    }
    let raw: Vec<f64> = drafts.iter().map(|draft| draft.coefficient).collect();
    let coefficients =
        if raw.iter().all(|&value| value == 1.0) { Ok(Coefficients::uniform(raw.len())) } else { Coefficients::try_new(&raw) };
    let coefficients = coefficients.map_err(|problem| problems.push(format!("members: {problem}"))).ok()?;
    let mut members = Vec::new();
    for (draft, &coefficient) in drafts.into_iter().zip(coefficients.as_slice()) {
        match MemberName::try_from(draft.name) {
            Ok(name) => members.push(Member { name, path: draft.path, coefficient }),
            Err(invalid) => problems.push(invalid.to_string()),
        }
    }
    Some(Recipe { method, init, members, dtype, head: HeadChoice::default() })
}

/// A member's name from the last `segments` segments of its path; what a name cannot hold becomes `-`.
fn default_name(path: &Path, segments: usize) -> Option<String> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.file_name()?;
    let mut parts: Vec<_> = absolute.iter().rev().take(segments).map(|part| part.to_string_lossy().into_owned()).collect();
    parts.reverse();
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    Some(parts.join(".").chars().map(plain).take(128).collect())
}

fn check_keys(mapping: &Mapping, place: &str, known: &[&str], problems: &mut Vec<String>) {
    for key in mapping.keys() {
        match key.as_str() {
            Some(key) if known.contains(&key) => {}
            Some(key) => problems.push(format!("{}: unknown key, expected one of {}", at(place, key), known.join(", "))),
            None => problems.push(format!("{}: a key is {}, expected one of {}", at(place, "?"), kind(key), known.join(", "))),
        }
    }
}

fn text(mapping: &Mapping, place: &str, key: &str, problems: &mut Vec<String>) -> Option<String> {
    match mapping.get(key)? {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        other => {
            problems.push(format!("{}: expected text, found {}", at(place, key), kind(other)));
            None
        }
    }
}

fn path(mapping: &Mapping, place: &str, key: &str, base: &Path, problems: &mut Vec<String>) -> Option<PathBuf> {
    text(mapping, place, key, problems).map(|path| base.join(path))
}

fn at(place: &str, key: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) if value.is_empty() => "empty text".to_owned(),
        Value::String(value) => format!("{:?}", value.chars().take(60).collect::<String>()),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Tagged(_) => "a tagged value".to_owned(),
    }
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
