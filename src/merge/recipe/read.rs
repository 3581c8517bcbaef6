//! A recipe as it is written, to a checked one, or every mistake in it.

use std::path::{Path, PathBuf};

use serde_norway::{Mapping, Value};

use super::fields::{check_keys, choice, flag, kind, number, path, required, section, text};
use super::{Coefficients, DTYPES, Granularity, Kind, Member, Method, Recipe, Rule, Take};
use crate::checkpoint::{Dtype, HeadChoice, remote};
use crate::domain::MemberName;
use crate::merge::glob::Glob;
use crate::merge::recipe_head;

const KEYS: [&str; 12] = ["kind", "method", "slerp", "ema", "normalize", "liti", "init", "members", "rules", "dtype", "head", "pooling"];
const METHODS: [&str; 3] = ["linear", "slerp", "ema"];

/// The share of the newest member in WARP's moving average (WARP §3.1 and appendix D.2).
const DEFAULT_MU: f64 = 0.01;

/// A member whose name and coefficient are still as they were written.
struct Draft {
    /// Its place in the list.
    index: usize,
    name: String,
    path: PathBuf,
    base: Option<PathBuf>,
    coefficient: Option<f64>,
}

/// A recipe without its members.
struct Frame {
    kind: Kind,
    method: Method,
    normalize: bool,
    liti: Option<f64>,
    init: Option<PathBuf>,
    dtype: Dtype,
    head: HeadChoice,
}

pub fn resolve(value: &Value, base: &Path) -> Result<Recipe, Vec<String>> {
    let Value::Mapping(recipe) = value else {
        return Err(vec![format!("expected keys {}; found {}", KEYS.join(", "), kind(value))]);
    };
    let mut problems = Vec::new();
    check_keys(recipe, "", &KEYS, &mut problems);
    let members = recipe.get("members");
    let frame = frame(recipe, members.and_then(Value::as_sequence).map_or(0, Vec::len), base, &mut problems);
    let mut drafts = Vec::new();
    match members {
        Some(Value::Sequence(members)) => {
            for (index, member) in members.iter().enumerate() {
                drafts.extend(draft(member, index, base, &mut problems));
            }
            if members.is_empty() {
                problems.push("members: the list is empty, expected at least one checkpoint".to_owned());
            }
        }
        Some(other) => problems.push(format!("members: expected a list, found {}", kind(other))),
        None => problems.push("members: missing, expected a list of checkpoints".to_owned()),
    }
    finish(frame, drafts, recipe.get("rules"), problems)
}

/// The uniform average of some folders, without any file.
pub fn uniform(paths: &[PathBuf]) -> Result<Recipe, Vec<String>> {
    let mut problems = Vec::new();
    let last: Vec<_> = paths.iter().map(|path| default_name(path, 1)).collect();
    let mut drafts = Vec::new();
    for (index, (path, name)) in paths.iter().zip(&last).enumerate() {
        let repeated = last.iter().filter(|other| *other == name).count() > 1;
        let name = if repeated { default_name(path, 2) } else { name.clone() };
        match name {
            Some(name) => drafts.push(Draft { index, name, path: path.clone(), base: None, coefficient: None }),
            None => problems.push(format!("no name can be taken from the path {:?}", path.display().to_string())),
        }
    }
    if paths.is_empty() {
        problems.push("members: the list is empty, expected at least one checkpoint".to_owned());
    }
    let frame = Frame {
        kind: Kind::Reward,
        method: Method::Linear,
        normalize: true,
        liti: None,
        init: None,
        dtype: Dtype::F32,
        head: HeadChoice::default(),
    };
    finish(frame, drafts, None, problems)
}

fn frame(recipe: &Mapping, members: usize, base: &Path, problems: &mut Vec<String>) -> Frame {
    let frame = Frame {
        kind: choice(recipe, "", "kind", &[("reward", Kind::Reward), ("policy", Kind::Policy)], problems).unwrap_or_default(),
        method: method(recipe, members, problems),
        normalize: flag(recipe, "", "normalize", problems).unwrap_or(true),
        liti: section(recipe, "liti", &["eta"], problems).and_then(|liti| required(liti, "liti", "eta", problems)),
        init: path(recipe, "", "init", base, problems),
        dtype: choice(recipe, "", "dtype", &DTYPES, problems).unwrap_or(Dtype::F32),
        head: recipe_head::read(recipe, problems),
    };
    if !recipe.contains_key("init") {
        if matches!(frame.method, Method::Slerp { .. }) {
            problems.push("init: missing; slerp turns task vectors, and these are the way from init to each member".to_owned());
        }
        if recipe.contains_key("liti") {
            problems.push("init: missing; liti goes from init towards the merge".to_owned());
        }
    }
    frame
}

fn method(recipe: &Mapping, members: usize, problems: &mut Vec<String>) -> Method {
    let sections: Vec<&str> = ["slerp", "ema"].into_iter().filter(|name| recipe.contains_key(name)).collect();
    let stated = choice(recipe, "", "method", &METHODS.map(|name| (name, name)), problems);
    let name = stated.or(sections.first().copied()).unwrap_or("linear");
    for other in sections.iter().filter(|other| **other != name) {
        problems.push(format!("{other}: has no meaning where the method is {name}"));
    }
    let slerp = section(recipe, "slerp", &["granularity", "t"], problems);
    let ema = section(recipe, "ema", &["mu"], problems);
    match name {
        "slerp" => {
            let granularities = Granularity::ALL.map(|granularity| (granularity.name(), granularity));
            let granularity = slerp.and_then(|slerp| choice(slerp, "slerp", "granularity", &granularities, problems)).unwrap_or_default();
            let t = slerp.and_then(|slerp| number(slerp, "slerp", "t", problems));
            if t.is_some() && members != 2 {
                problems
                    .push(format!("slerp.t: is for two members, found {members}; more are taken one after the other, the m-th with 1/m"));
            }
            Method::Slerp { granularity, t: t.unwrap_or(0.5) }
        }
        "ema" => {
            let mu = ema.and_then(|ema| number(ema, "ema", "mu", problems)).unwrap_or(DEFAULT_MU);
            if !(mu > 0.0 && mu <= 1.0) {
                problems.push(format!("ema.mu: expected a number above 0 and at most 1, found {mu}"));
            }
            Method::Ema { mu }
        }
        _ => Method::Linear,
    }
}

fn draft(value: &Value, index: usize, base: &Path, problems: &mut Vec<String>) -> Option<Draft> {
    let place = &format!("members[{index}]");
    let (found, stands_on, name, coefficient) = match value {
        Value::String(found) if !found.is_empty() => (Some(remote::join(base, found)), None, None, None),
        Value::Mapping(member) => {
            check_keys(member, place, &["path", "base", "name", "coefficient"], problems);
            let coefficient = number(member, place, "coefficient", problems);
            if !member.contains_key("path") {
                problems.push(format!("{place}.path: missing, expected a checkpoint folder or another recipe"));
            }
            let found = path(member, place, "path", base, problems);
            (found, path(member, place, "base", base, problems), text(member, place, "name", problems), coefficient)
        }
        other => {
            problems.push(format!("{place}: expected a path or {{path, base, name, coefficient}}, found {}", kind(other)));
            (None, None, None, None)
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
    Some(Draft { index, name, path, base: stands_on, coefficient })
}

fn finish(frame: Frame, drafts: Vec<Draft>, rules: Option<&Value>, mut problems: Vec<String>) -> Result<Recipe, Vec<String>> {
    for (place, draft) in drafts.iter().enumerate() {
        if let Some(first) = drafts.iter().take(place).find(|other| other.name == draft.name) {
            let (index, name) = (draft.index, &draft.name);
            problems.push(format!("members[{index}].name: {name:?} is the name of members[{}] already, give it another", first.index));
        }
        if draft.coefficient.is_some() && !matches!(frame.method, Method::Linear) {
            let (index, method) = (draft.index, frame.method.name());
            problems.push(format!("members[{index}].coefficient: has no meaning where the method is {method}"));
        }
    }
    // Without its members, a rule's names would be mistakes that are none; and so would be their sum.
    let rules = if drafts.is_empty() { Vec::new() } else { read_rules(rules, &frame, &drafts, &mut problems) };
    if !problems.is_empty() {
        return Err(problems);
    }
    let shares = shares(&frame, &drafts).map_err(|problem| vec![format!("members: {problem}")])?;
    let member = |(draft, coefficient): (Draft, f64)| {
        let name = MemberName::try_from(draft.name).map_err(|invalid| vec![invalid.to_string()])?;
        Ok(Member { name, path: draft.path, base: draft.base, coefficient, origin: None, base_origin: None })
    };
    let members = drafts.into_iter().zip(shares).map(member).collect::<Result<_, Vec<String>>>()?;
    let Frame { kind, method, normalize, liti, init, dtype, head } = frame;
    Ok(Recipe { kind, method, normalize, liti, init, init_origin: None, members, rules, dtype, head })
}

/// The share of each member in the merge.
fn shares(frame: &Frame, drafts: &[Draft]) -> Result<Vec<f64>, String> {
    let count = drafts.len();
    Ok(match frame.method {
        Method::Linear => {
            let raw: Vec<f64> = drafts.iter().map(|draft| draft.coefficient.unwrap_or(1.0)).collect();
            mixed(&raw, frame.normalize)?.0
        }
        Method::Slerp { t, .. } if count == 2 => vec![1.0 - t, t],
        Method::Slerp { .. } => Coefficients::uniform(count).0,
        Method::Ema { mu } => crate::merge::combine::ema(count, mu),
    })
}

fn mixed(raw: &[f64], normalize: bool) -> Result<Coefficients, String> {
    match normalize {
        false => Coefficients::as_given(raw),
        true if raw.iter().all(|&value| value == 1.0) => Ok(Coefficients::uniform(raw.len())),
        true => Coefficients::try_new(raw),
    }
}

fn read_rules(rules: Option<&Value>, frame: &Frame, drafts: &[Draft], problems: &mut Vec<String>) -> Vec<Rule> {
    let rules = match rules {
        None => return Vec::new(),
        Some(Value::Sequence(rules)) => rules,
        Some(other) => {
            problems.push(format!("rules: expected a list, found {}", kind(other)));
            return Vec::new();
        }
    };
    let read = |(index, value): (usize, &Value)| rule(value, &format!("rules[{index}]"), frame, drafts, problems);
    rules.iter().enumerate().filter_map(read).collect()
}

fn rule(value: &Value, place: &str, frame: &Frame, drafts: &[Draft], problems: &mut Vec<String>) -> Option<Rule> {
    let takes = ["from", "coefficients", "init"];
    let Value::Mapping(rule) = value else {
        problems.push(format!("{place}: expected {{match, and one of from, coefficients, init}}, found {}", kind(value)));
        return None;
    };
    check_keys(rule, place, &["match", "from", "coefficients", "init"], problems);
    if !rule.contains_key("match") {
        problems.push(format!("{place}.match: missing, expected a pattern over tensor names"));
    }
    let pattern = text(rule, place, "match", problems)
        .and_then(|pattern| Glob::try_new(&pattern).map_err(|problem| problems.push(format!("{place}.match: {problem}"))).ok());
    let given: Vec<&str> = takes.into_iter().filter(|take| rule.contains_key(take)).collect();
    let [given] = given.as_slice() else {
        let found = if given.is_empty() { "none".to_owned() } else { given.join(" and ") };
        problems.push(format!("{place}: expected one of {}, found {found}", takes.join(", ")));
        return None;
    };
    let take = match *given {
        "from" => Take::From(member(&text(rule, place, "from", problems)?, &format!("{place}.from"), drafts, problems)?),
        "init" => {
            if flag(rule, place, "init", problems)? && frame.init.is_some() {
                Take::Init
            } else {
                problems.push(format!("{place}.init: expected true, in a recipe that has an `init`"));
                return None;
            }
        }
        _ => Take::Mix(coefficients(rule.get("coefficients")?, &format!("{place}.coefficients"), frame, drafts, problems)?),
    };
    Some(Rule { pattern: pattern?, take })
}

fn coefficients(value: &Value, place: &str, frame: &Frame, drafts: &[Draft], problems: &mut Vec<String>) -> Option<Coefficients> {
    let Value::Mapping(given) = value else {
        problems.push(format!("{place}: expected {{member: number}}, found {}", kind(value)));
        return None;
    };
    let (mut places, mut raw) = (Vec::new(), Vec::new());
    let before = problems.len();
    for key in given.keys() {
        let Some(name) = key.as_str() else {
            problems.push(format!("{place}: a key is {}, expected the name of a member", kind(key)));
            continue;
        };
        if let (Some(index), Some(number)) = (member(name, place, drafts, problems), number(given, place, name, problems)) {
            places.push(index);
            raw.push(number);
        }
    }
    if given.is_empty() {
        problems.push(format!("{place}: names no member"));
    }
    if problems.len() > before {
        return None;
    }
    // Only those that are named are mixed, so that all ones mean their mean.
    let mixed = mixed(&raw, frame.normalize).map_err(|problem| problems.push(format!("{place}: {problem}"))).ok()?;
    let mut all = vec![0.0; drafts.len()];
    for (place, coefficient) in places.into_iter().zip(mixed.0) {
        if let Some(all) = all.get_mut(place) {
            *all = coefficient;
        }
    }
    Some(Coefficients(all))
}

fn member(name: &str, place: &str, drafts: &[Draft], problems: &mut Vec<String>) -> Option<usize> {
    let found = drafts.iter().position(|draft| draft.name == name);
    if found.is_none() {
        let names: Vec<&str> = drafts.iter().map(|draft| draft.name.as_str()).collect();
        problems.push(format!("{place}: {name:?} is no member, expected one of {}", names.join(", ")));
    }
    found
}

/// A member's name from the last `segments` segments of its path; what a name cannot hold becomes `-`, and the ending of
/// a recipe's file goes.
fn default_name(path: &Path, segments: usize) -> Option<String> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.file_name()?;
    let absolute = if super::is_recipe(&absolute) { absolute.with_extension("") } else { absolute };
    let mut parts: Vec<_> = absolute.iter().rev().take(segments).map(|part| part.to_string_lossy().into_owned()).collect();
    parts.reverse();
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    Some(parts.join(".").chars().map(plain).take(128).collect())
}
