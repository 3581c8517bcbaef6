//! What is done about each tensor, and who takes part in it. Pure: names and facts of manifests in, treatments out.

use std::collections::{BTreeMap, BTreeSet};

use super::combine::Combination;
use super::recipe::{Granularity, Method, Recipe, Take};
use crate::checkpoint::{Manifest, TensorInfo};

/// Buffers of floating-point numbers that mean something only as they are.
const CONSTANTS: [&str; 1] = ["reward_transform_matrix"];

/// How a tensor of the merged model comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Treatment {
    /// As the recipe's method says.
    Method,
    /// As the rule at this place says.
    Rule(usize),
    /// It is no number to average (integers, and constants by an explicit list): all members must hold the same.
    Equal,
}

impl Treatment {
    /// The treatment of a tensor that some member, or init under a rule, has.
    pub fn of(recipe: &Recipe, name: &str, info: &TensorInfo) -> Self {
        match recipe.rules().iter().position(|rule| rule.pattern.matches(name)) {
            Some(rule) => Self::Rule(rule),
            None if !info.dtype.is_float() || is_constant(name) => Self::Equal,
            None => Self::Method,
        }
    }

    /// The sources that are read for it, by their places: members in order, then init.
    pub fn sources(self, recipe: &Recipe) -> Vec<usize> {
        let members = recipe.members().len();
        match self {
            Self::Equal => (0..members).collect(),
            Self::Method if turns(recipe) => (0..=members).collect(),
            _ => self.combination(recipe).parts().into_iter().map(|(source, _)| source).collect(),
        }
    }

    /// The sources that must have the tensor.
    pub fn holders(self, recipe: &Recipe) -> BTreeSet<usize> {
        let all = if self == Self::Method { 0..recipe.members().len() } else { 0..0 };
        all.chain(self.sources(recipe)).collect()
    }

    /// The coefficients, as far as they are known without weights: those of SLERP are its shares.
    pub fn combination(self, recipe: &Recipe) -> Combination {
        let members = recipe.members();
        if let Self::Rule(rule) = self
            && let Some(rule) = recipe.rules().get(rule)
        {
            return match &rule.take {
                Take::From(member) => Combination::one(members.len(), *member),
                Take::Mix(coefficients) => Combination::of_members(coefficients.as_slice()),
                Take::Init => Combination::init(members.len()),
            };
        }
        let shares: Vec<f64> = members.iter().map(|member| member.coefficient).collect();
        finished(recipe, Combination::of_members(&shares))
    }
}

/// The last step of every method.
pub fn finished(recipe: &Recipe, combination: Combination) -> Combination {
    match recipe.liti() {
        Some(eta) => combination.towards(eta),
        None => combination,
    }
}

/// Whether coefficients follow from weights: SLERP of one member is that member.
pub fn turns(recipe: &Recipe) -> bool {
    matches!(recipe.method(), Method::Slerp { .. }) && recipe.members().len() > 1
}

fn is_constant(name: &str) -> bool {
    let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
    CONSTANTS.contains(&last)
}

/// The name of the group that a tensor belongs to.
pub fn group_of(name: &str, granularity: Granularity) -> &str {
    match granularity {
        Granularity::Global => "",
        Granularity::Tensor => name,
        Granularity::Layer => {
            let mut end = 0;
            for segment in name.split_inclusive('.') {
                end += segment.len();
                let number =
                    segment.strip_suffix('.').is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
                if number {
                    return name.get(..end).unwrap_or(name);
                }
            }
            name
        }
    }
}

/// The tensors that some member has, or that a rule takes from init, and what is done about each.
pub fn treatments<'m>(recipe: &Recipe, members: &[Option<&'m Manifest>], init: Option<&'m Manifest>) -> BTreeMap<&'m str, Treatment> {
    let mut found = BTreeMap::new();
    for (name, info) in members.iter().flatten().flat_map(|manifest| manifest.iter()) {
        found.entry(name).or_insert_with(|| Treatment::of(recipe, name, info));
    }
    for (name, info) in init.into_iter().flat_map(|manifest| manifest.iter()) {
        let treatment = Treatment::of(recipe, name, info);
        if let Treatment::Rule(rule) = treatment
            && recipe.rules().get(rule).is_some_and(|rule| rule.take == Take::Init)
        {
            found.insert(name, treatment);
        }
    }
    found
}

#[cfg(test)]
#[path = "choice_tests.rs"]
mod tests;
