//! The pass over all weights that SLERP needs before it can merge: the Gram matrix of task vectors of each group.

use super::MergePlan;
use super::combine::{Combination, Gram, Step, slerp};
use super::products::{Buffers, Vectors, sum_products};
use crate::checkpoint::SourceError;

/// What SLERP found in one group of tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// `model.layers.3.` for a layer, else the tensor's name; empty for the whole model.
    pub name: String,
    pub tensors: Vec<String>,
    /// The products of the members' task vectors.
    pub gram: Gram,
    /// How each member after the first was joined to those before it.
    pub steps: Vec<Step>,
    /// The outcome, before LITI.
    pub combination: Combination,
}

/// Reads all members and init once.
pub fn measure(plan: &MergePlan, t: f64) -> Result<Vec<Group>, SourceError> {
    let groups = plan.groups();
    let (members, Some(init)) = (plan.members.iter().map(|member| &member.source).collect::<Vec<_>>(), &plan.init) else {
        // A recipe with SLERP has an init.
        return Ok(Vec::new());
    };
    let tensors = groups.values().enumerate().flat_map(|(group, tensors)| tensors.iter().map(move |tensor| (group, *tensor)));
    let tensors = tensors.filter_map(|(group, tensor)| Some((group, tensor, plan.manifest.get(tensor)?)));
    let mut grams = vec![Gram::zero(members.len()); groups.len()];
    let products = |buffers: &mut Buffers, tensor: &str, range| buffers.products(Vectors::Tasks, tensor, range, &members, init);
    sum_products(tensors, &mut grams, products)?;
    let group = |((name, tensors), gram): ((&str, Vec<&str>), Gram)| {
        let (coefficients, steps) = slerp(&gram, t);
        // Along lines there is no arc, and init falls out.
        let straight = steps.iter().all(|step| !matches!(step, Step::Arc(_)));
        let combination = if straight { Combination::of_members(&coefficients) } else { Combination::of_task_vectors(&coefficients) };
        Group { name: name.to_owned(), tensors: tensors.into_iter().map(str::to_owned).collect(), gram, steps, combination }
    };
    Ok(groups.into_iter().zip(grams).map(group).collect())
}

#[cfg(test)]
#[path = "angles_tests.rs"]
mod tests;
