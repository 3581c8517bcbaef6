//! The weight-space report: how far members have moved and in which directions, layer by layer, and what that says of the
//! premises of averaging (WARM 2401.12187 §3.1, WARP 2406.16768 §3.2 and App. C.2).
//!
//! One pass over all weights gives the products of all task vectors of each tensor; norms, angles and distances to the
//! merge follow from those, because the merge is a combination of the same vectors. They are those of the exact merge,
//! before it is rounded to its dtype.

mod text;
mod verdict;

use std::collections::BTreeMap;

use serde::Serialize;

use super::MergePlan;
use super::choice::{Treatment, finished, group_of, turns};
use super::combine::{Combination, Gram, Step, slerp};
use super::planned::PlannedSource;
use super::products::{Buffers, Vectors, sum_products};
use super::recipe::{Granularity, Method, dtype_name};
use crate::checkpoint::{SourceError, TensorInfo};
pub use verdict::{Finding, Standing};

/// What task vectors are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Around {
    /// The shared initialisation.
    Init,
    /// The merge, where no initialisation is named: angles and norms are then those of what each member adds to the mean.
    Merge,
}

/// The report on one recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub method: String,
    pub dtype: String,
    pub around: Around,
    pub members: Vec<Member>,
    /// All tensors.
    pub overall: Section,
    /// All but the reward head.
    pub body: Section,
    /// The reward head; a policy has none.
    pub head: Option<Section>,
    /// By layer, in name order.
    pub layers: Vec<Section>,
    /// Pairs of members that hold the same weights.
    pub duplicates: Vec<[String; 2]>,
    /// What follows from the numbers.
    pub verdict: Vec<Finding>,
}

/// A member of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Member {
    pub name: String,
    pub coefficient: f64,
    /// What its tensors are stored in.
    pub dtypes: Vec<String>,
}

/// Some tensors taken as one vector. Lists have a place for each member, tables a row and a column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Section {
    /// `model.layers.3.` for a layer, else the name of a tensor, or what it is.
    pub name: String,
    pub tensors: usize,
    pub parameters: u64,
    /// What task vectors are taken from here. Tensors that init lacks count only where all do.
    pub around: Around,
    /// Of each member's weights.
    pub weight_norms: Vec<f64>,
    /// Of each task vector.
    pub norms: Vec<f64>,
    /// Of task vectors; null where one has no direction.
    pub cosines: Vec<Vec<Option<f64>>>,
    /// The row's norm divided by the column's.
    pub norm_ratios: Vec<Vec<Option<f64>>>,
    /// Of whole weights.
    pub weight_cosines: Vec<Vec<Option<f64>>>,
    /// Of whole weights, to those of init.
    pub init_cosines: Option<Vec<Option<f64>>>,
    /// How far each member is from the merge.
    pub distances: Vec<f64>,
}

impl Report {
    /// Reads all members, and init if there is one, once. `progress` gets tensors done and tensors in all.
    pub fn new(plan: &MergePlan, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, SourceError> {
        let tensors = measure(plan, progress)?;
        let recipe = plan.recipe();
        let heads = plan.reward().map(|reward| reward.layout.head.tensors()).unwrap_or_default();
        let of_head = |name: &str| heads.contains(&name);
        let (head, body): (Vec<_>, Vec<_>) = tensors.iter().partition(|tensor| of_head(tensor.name));
        let mut layers: BTreeMap<&str, Vec<&Measured<'_>>> = BTreeMap::new();
        for tensor in &tensors {
            layers.entry(group_of(tensor.name, Granularity::Layer)).or_default().push(tensor);
        }
        let members = plan.members().iter().map(|member| Member {
            name: member.name().as_str().to_owned(),
            coefficient: member.coefficient(),
            dtypes: member.dtypes().iter().map(|dtype| dtype.safetensors_name().to_owned()).collect(),
        });
        let mut report = Self {
            method: recipe.method().name().to_owned(),
            dtype: dtype_name(recipe.dtype()).unwrap_or_default().to_owned(),
            around: if plan.init().is_some() { Around::Init } else { Around::Merge },
            members: members.collect(),
            overall: section("all tensors", &tensors),
            head: (!head.is_empty()).then(|| section("head", head)),
            body: section("all but the head", body),
            layers: layers.into_iter().map(|(name, tensors)| section(name, tensors)).collect(),
            duplicates: duplicates(plan, &tensors),
            verdict: Vec::new(),
        };
        report.verdict = verdict::verdict(&report);
        Ok(report)
    }
}

/// Equal vectors have equal products, down to the last bit, because they are taken in one order.
fn duplicates(plan: &MergePlan, tensors: &[Measured<'_>]) -> Vec<[String; 2]> {
    let same = |i: usize, j: usize| {
        let same = |gram: &Gram| gram.get(i, i) == gram.get(i, j) && gram.get(j, j) == gram.get(i, j);
        tensors.iter().all(|tensor| same(&tensor.gram))
    };
    let name = |index: usize| plan.members().get(index).map_or_else(String::new, |member| member.name().as_str().to_owned());
    let pairs = Gram::pairs(plan.members().len()).filter(|&(i, j)| j < i && same(i, j));
    pairs.map(|(i, j)| [name(j), name(i)]).collect()
}

/// One tensor's products, and how it is merged.
struct Measured<'p> {
    name: &'p str,
    elements: u64,
    /// Of `φ_m − base` for every member, and base.
    gram: Gram,
    /// Whether base is init, and not the first member.
    from_init: bool,
    /// The merge as a combination of the same vectors.
    merge: Vec<f64>,
}

fn measure<'p>(plan: &'p MergePlan, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Measured<'p>>, SourceError> {
    let members: Vec<&PlannedSource> = plan.members().iter().map(|member| member.source()).collect();
    let Some(first) = members.first() else { return Ok(Vec::new()) };
    for source in plan.sources() {
        source.nested.as_ref().map_or(Ok(()), |nested| nested.prepare())?;
    }
    let has = |source: &PlannedSource, name: &str| source.weights.get(name).is_some_and(|info| info.dtype.is_float());
    // What a member lacks cannot be compared.
    let compared = |(name, info): &(&'p str, &TensorInfo)| info.dtype.is_float() && members.iter().all(|member| has(member, name));
    let tensors: Vec<(&str, &TensorInfo)> = plan.manifest().iter().filter(compared).collect();
    let base = |name: &str| plan.init().filter(|init| has(init, name)).unwrap_or(first);
    let mut grams = vec![Gram::zero(members.len() + 1); tensors.len()];
    for (place, ((name, info), gram)) in tensors.iter().zip(&mut grams).enumerate() {
        let products =
            |buffers: &mut Buffers, tensor: &str, range| buffers.products(Vectors::TasksAndBase, tensor, range, &members, base(tensor));
        sum_products(std::iter::once((0, *name, *info)), std::slice::from_mut(gram), products)?;
        progress(place as u64 + 1, tensors.len() as u64);
    }
    let turned = turned(plan, &tensors, &grams);
    let treatments: BTreeMap<&str, Treatment> = plan.treatments().collect();
    let measured = tensors.into_iter().zip(grams).map(|((name, info), gram)| {
        let recipe = plan.recipe();
        let from_init = plan.init().is_some_and(|init| std::ptr::eq(init, base(name)));
        let combination = match (turned.get(name), treatments.get(name)) {
            (Some(combination), _) => finished(recipe, combination.clone()),
            (None, Some(treatment)) => treatment.combination(recipe),
            (None, None) => Combination::one(members.len(), 0),
        };
        Measured { name, elements: info.elements() as u64, gram, from_init, merge: around_base(&combination) }
    });
    Ok(measured.collect())
}

/// A combination of weights as one of task vectors and base.
fn around_base(combination: &Combination) -> Vec<f64> {
    let base = combination.members.iter().sum::<f64>() + combination.init;
    combination.members.iter().copied().chain([base]).collect()
}

/// SLERP's coefficients, by tensor: from the sum of the products of each group.
fn turned<'p>(plan: &'p MergePlan, tensors: &[(&str, &TensorInfo)], grams: &[Gram]) -> BTreeMap<&'p str, Combination> {
    let (Method::Slerp { t, .. }, true) = (plan.recipe().method(), turns(plan.recipe())) else { return BTreeMap::new() };
    let count = plan.members().len();
    let places: BTreeMap<&str, usize> = tensors.iter().enumerate().map(|(place, (name, _))| (*name, place)).collect();
    let mut turned = BTreeMap::new();
    for names in plan.groups().into_values() {
        let mut sum = Gram::zero(count);
        for gram in names.iter().filter_map(|name| grams.get(*places.get(name)?)) {
            let products: Vec<f64> = Gram::pairs(count).map(|(i, j)| gram.get(i, j)).collect();
            sum.add(&products);
        }
        let (coefficients, steps) = slerp(&sum, t);
        let straight = steps.iter().all(|step| !matches!(step, Step::Arc(_)));
        let combination = if straight { Combination::of_members(&coefficients) } else { Combination::of_task_vectors(&coefficients) };
        turned.extend(names.into_iter().map(|name| (name, combination.clone())));
    }
    turned
}

/// Sums over tensors, which may be merged each in its own way.
fn section<'m>(name: &str, tensors: impl IntoIterator<Item = &'m Measured<'m>>) -> Section {
    let mut sums: Option<Sums> = None;
    let (mut count, mut parameters) = (0, 0);
    for tensor in tensors {
        count += 1;
        parameters += tensor.elements;
        sums.get_or_insert_with(|| Sums::zero(tensor.gram.count() - 1)).add(tensor);
    }
    let Sums { tasks, with_init, to_merge, weights, from_init } = sums.unwrap_or_else(|| Sums::zero(0));
    let (around, tasks) = if from_init { (Around::Init, &tasks) } else { (Around::Merge, &to_merge) };
    let members = weights.count();
    let ratio = |i: usize, j: usize| tasks.cosine(i, j).map(|_| tasks.norm(i) / tasks.norm(j));
    Section {
        name: name.to_owned(),
        tensors: count,
        parameters,
        around,
        weight_norms: (0..members).map(|i| weights.norm(i)).collect(),
        norms: (0..members).map(|i| tasks.norm(i)).collect(),
        cosines: table(members, |i, j| tasks.cosine(i, j)),
        norm_ratios: table(members, ratio),
        weight_cosines: table(members, |i, j| weights.cosine(i, j)),
        init_cosines: from_init.then(|| (0..members).map(|i| with_init.cosine(i, members)).collect()),
        distances: (0..members).map(|i| to_merge.norm(i)).collect(),
    }
}

fn table(members: usize, cell: impl Fn(usize, usize) -> Option<f64>) -> Vec<Vec<Option<f64>>> {
    (0..members).map(|i| (0..members).map(|j| cell(i, j)).collect()).collect()
}

/// Products over several tensors.
struct Sums {
    /// Of members minus init, over tensors that init has.
    tasks: Gram,
    /// Of members, and init, over tensors that init has.
    with_init: Gram,
    /// Of members minus merge.
    to_merge: Gram,
    /// Of members.
    weights: Gram,
    /// Whether init has any of the tensors.
    from_init: bool,
}

impl Sums {
    fn zero(members: usize) -> Self {
        let zero = Gram::zero(members);
        Self { tasks: zero.clone(), with_init: Gram::zero(members + 1), to_merge: zero.clone(), weights: zero, from_init: false }
    }

    fn add(&mut self, tensor: &Measured<'_>) {
        let members = self.weights.count();
        let unit = |place: usize| -> Vec<f64> { (0..=members).map(|i| f64::from(u8::from(i == place))).collect() };
        let plus = |a: &[f64], factor: f64, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + factor * b).collect() };
        let base = unit(members);
        let tasks: Vec<Vec<f64>> = (0..members).map(unit).collect();
        let mut weights: Vec<Vec<f64>> = tasks.iter().map(|task| plus(task, 1.0, &base)).collect();
        let to_merge: Vec<Vec<f64>> = weights.iter().map(|weight| plus(weight, -1.0, &tensor.merge)).collect();
        add_products(&mut self.to_merge, &tensor.gram, &to_merge);
        add_products(&mut self.weights, &tensor.gram, &weights);
        if tensor.from_init {
            self.from_init = true;
            weights.push(base);
            add_products(&mut self.tasks, &tensor.gram, &tasks);
            add_products(&mut self.with_init, &tensor.gram, &weights);
        }
    }
}

/// Adds the products of combinations of measured vectors.
fn add_products(sum: &mut Gram, gram: &Gram, vectors: &[Vec<f64>]) {
    let product = |(i, j): (usize, usize)| match (vectors.get(i), vectors.get(j)) {
        (Some(a), Some(b)) => product(gram, a, b, i == j),
        _ => 0.0,
    };
    sum.add(&Gram::pairs(vectors.len()).map(product).collect::<Vec<_>>());
}

/// The product of two combinations of measured vectors. A square is never negative, whatever rounding says.
fn product(gram: &Gram, a: &[f64], b: &[f64], square: bool) -> f64 {
    let mut sum = 0.0;
    for (i, a) in a.iter().enumerate().filter(|(_, a)| **a != 0.0) {
        for (j, b) in b.iter().enumerate().filter(|(_, b)| **b != 0.0) {
            sum += a * b * gram.get(i, j);
        }
    }
    if square { sum.max(0.0) } else { sum }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
