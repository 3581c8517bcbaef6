//! What a merge would do, and what it would take, before any weight is read.

use std::fmt;

use serde::Serialize;

use crate::merge::{GroupPlan, Kind, MergePlan, PlannedSource, Size};
use crate::model::{self, Place};
use crate::registry::members_on_one_base;

/// A plan for people and programs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanSummary {
    pub kind: String,
    pub method: String,
    pub dtype: String,
    pub members: Vec<Source>,
    pub init: Option<Source>,
    pub tensors: usize,
    pub parameters: u64,
    /// Bytes of all tensors that are read, in one pass.
    pub bytes_to_read: u64,
    pub passes: u64,
    pub merged_bytes: u64,
    /// Files of weights that `warm merge` would write.
    pub files: usize,
    pub peaks: Peaks,
    /// Members on one base (`ensemble: adapters`); null where they are not.
    pub adapters: Option<Adapters>,
    pub groups: Vec<GroupPlan>,
    pub notes: Vec<String>,
    /// The plan in words.
    #[serde(skip)]
    words: String,
}

/// A checkpoint or recipe that is read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Source {
    pub name: String,
    pub path: String,
    /// Where it was fetched from, by its commit, where `path` is a copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The checkpoint that a LoRA adapter stands on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Null for init.
    pub coefficient: Option<f64>,
    pub dtypes: Vec<String>,
    pub bytes: u64,
}

/// What members take on the device as adapters on one base, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Adapters {
    pub base: String,
    /// What they have of the base, once.
    pub base_bytes: u64,
    /// What each has of its own, in order.
    pub member_bytes: Vec<u64>,
}

/// The most memory that is held at once, in bytes, beside the program itself (some 20 MB) and its tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Peaks {
    /// Of `warm merge`: buffers, whatever the size of the members and of their tensors.
    pub merge_host_bytes: u64,
    /// Of loading to serve, beside the device's; zero for a policy, which is not served.
    pub load_host_bytes: u64,
    /// The loaded model.
    pub device_bytes: u64,
    /// With every member beside it (`ensemble: resident`).
    pub device_bytes_with_members: u64,
    /// With the members' base beside it, once, and what each has of its own (`ensemble: adapters`); null where the members are no
    /// adapters on one base.
    pub device_bytes_adapters: Option<u64>,
    /// With one member at a time beside it (`ensemble: streamed`).
    pub device_bytes_streamed: u64,
    /// Keys and values that a server keeps for samples to come, of all models together; zero for models that keep none.
    pub prefix_cache_bytes: u64,
}

impl PlanSummary {
    /// For so many compute threads, files of weights of at most so many bytes, and a server with prefix caches of so many bytes.
    pub fn new(plan: &MergePlan, threads: usize, max_shard_bytes: u64, prefix_cache_bytes: u64) -> Self {
        let recipe = plan.recipe();
        let source = |name: &str, coefficient: Option<f64>, source: &PlannedSource| Source {
            name: name.to_owned(),
            path: source.path().to_string_lossy().into_owned(),
            origin: source.origin().map(str::to_owned),
            base: source.base().map(|base| base.to_string_lossy().into_owned()),
            coefficient,
            dtypes: source.dtypes().iter().map(|dtype| dtype.safetensors_name().to_owned()).collect(),
            bytes: source.bytes(),
        };
        let members = plan.members().iter();
        let served = recipe.kind() == Kind::Reward;
        let device_bytes = if served { model::device_bytes(plan.manifest()) } else { 0 };
        let several = served && plan.members().len() > 1;
        let bytes = several.then(|| members_on_one_base(plan, &[Place::Cpu], recipe.dtype()));
        let mut notes = plan.notes().to_vec();
        // Worth knowing where it could have been.
        if let Some(Err(problem)) = &bytes
            && plan.members().iter().any(|member| member.source().base().is_some())
        {
            notes.push(format!("no `ensemble: adapters` with these members: {problem}"));
        }
        let bytes = bytes.and_then(Result::ok);
        let adapters = bytes.as_ref().map(|bytes| Adapters {
            base: plan.common_base().map(|base| base.display().to_string()).unwrap_or_default(),
            base_bytes: bytes.base,
            member_bytes: bytes.own.clone(),
        });
        let keeps = served && plan.reward().is_ok_and(|reward| model::keeps_prefixes(&[Place::Cpu], reward.architecture));
        Self {
            kind: recipe.kind().name().to_owned(),
            method: recipe.method().name().to_owned(),
            dtype: recipe.dtype().safetensors_name().to_owned(),
            members: members.map(|member| source(member.name().as_str(), Some(member.coefficient()), member.source())).collect(),
            init: plan.init().map(|init| source("init", None, init)),
            tensors: plan.manifest().len(),
            parameters: plan.parameters(),
            bytes_to_read: plan.bytes_to_read(),
            passes: plan.passes(),
            merged_bytes: plan.merged_bytes(),
            files: plan.files(max_shard_bytes),
            peaks: Peaks {
                merge_host_bytes: plan.write_buffer_bytes(threads),
                load_host_bytes: if served { plan.read_buffer_bytes(threads) + model::load_buffer_bytes(plan.manifest()) } else { 0 },
                device_bytes,
                // The merge of one is that one.
                device_bytes_with_members: if plan.members().len() == 1 {
                    device_bytes
                } else {
                    device_bytes * (1 + plan.members().len() as u64)
                },
                device_bytes_adapters: bytes.map(|bytes| device_bytes.saturating_add(bytes.total())),
                device_bytes_streamed: device_bytes * 2,
                prefix_cache_bytes: if keeps { prefix_cache_bytes } else { 0 },
            },
            adapters,
            groups: plan.group_plans(),
            notes,
            words: plan.to_string(),
        }
    }
}

impl fmt::Display for PlanSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The notes come last.
        let plan = self.words.lines().filter(|line| !line.starts_with("note: "));
        plan.into_iter().try_for_each(|line| writeln!(f, "{line}"))?;
        let twice = if self.passes > 1 { ", twice: once for the angles" } else { "" };
        writeln!(f, "reads {}{twice}; writes {} in {} files of weights", Size(self.bytes_to_read), Size(self.merged_bytes), self.files)?;
        let Peaks { merge_host_bytes, load_host_bytes, device_bytes, device_bytes_with_members, .. } = self.peaks;
        let Peaks { device_bytes_adapters, device_bytes_streamed, prefix_cache_bytes, .. } = self.peaks;
        writeln!(f, "memory beside the program's own: {} to merge to disk", Size(merge_host_bytes))?;
        if device_bytes > 0 {
            let (load, device, all) = (Size(load_host_bytes), Size(device_bytes), Size(device_bytes_with_members));
            writeln!(f, "  to serve: {load} while loading, {device} on the device (float32), {all} with every member beside it")?;
            if let (Some(Adapters { base, base_bytes, member_bytes }), Some(all)) = (&self.adapters, device_bytes_adapters) {
                let own = member_bytes.iter().fold(0u64, |sum, own| sum.saturating_add(*own));
                let (all, shared, own) = (Size(all), Size(*base_bytes), Size(own));
                writeln!(
                    f,
                    "  with `ensemble: adapters`: {all} on the device, of it {shared} for the base {base} once and {own} for all members' own"
                )?;
            }
            writeln!(f, "  to compare with `ensemble: streamed`: {} while a member is asked", Size(device_bytes_streamed))?;
            if prefix_cache_bytes > 0 {
                writeln!(f, "  for prompts that come again: up to {} (`prefix_cache_bytes`) while it is live", Size(prefix_cache_bytes))?;
            }
        }
        write!(f, "tensors:")?;
        let width = |lines: &[Lines<'_>]| lines.iter().map(|line| line.name().len()).max().unwrap_or_default();
        let lines = folded(&self.groups);
        let width = width(&lines);
        for line in &lines {
            let GroupPlan { method, tensors, parameters, .. } = line.first;
            let (name, each) = (line.name(), if line.last.is_some() { " each" } else { "" });
            write!(f, "\n  {name:width$}  {method}: {tensors} tensors, {parameters} parameters{each}")?;
        }
        self.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

/// One line, or the lines of some layers in one.
struct Lines<'g> {
    first: &'g GroupPlan,
    /// Prefix, and the first and last number.
    last: Option<(&'g str, usize, usize)>,
}

impl Lines<'_> {
    fn name(&self) -> String {
        match self.last {
            None if self.first.name.is_empty() => "(all)".to_owned(),
            None => self.first.name.clone(),
            Some((prefix, first, last)) => format!("{prefix}{{{first}..{last}}}."),
        }
    }
}

/// Layers that differ in nothing but their numbers are told in one line.
fn folded(groups: &[GroupPlan]) -> Vec<Lines<'_>> {
    let mut sorted: Vec<&GroupPlan> = groups.iter().collect();
    // By name, but layers by their numbers.
    sorted.sort_by_key(|group| (numbered(group).map_or((group.name.as_str(), 0), |(prefix, number)| (prefix, number)), &group.method));
    let mut lines: Vec<Lines<'_>> = Vec::new();
    for group in sorted {
        let same = |first: &GroupPlan| (&first.method, first.tensors, first.parameters) == (&group.method, group.tensors, group.parameters);
        if let (Some((prefix, number)), Some(line)) = (numbered(group), lines.last_mut())
            && let Some((of_first, from)) = numbered(line.first)
            && prefix == of_first
            && number == line.last.map_or(from, |(.., last)| last) + 1
            && same(line.first)
        {
            line.last = Some((prefix, from, number));
            continue;
        }
        lines.push(Lines { first: group, last: None });
    }
    lines
}

/// `model.layers.3.` to its prefix and number.
fn numbered(group: &GroupPlan) -> Option<(&str, usize)> {
    let (prefix, number) = group.name.strip_suffix('.')?.rsplit_once('.')?;
    Some((group.name.get(..=prefix.len())?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, method: &str, tensors: usize) -> GroupPlan {
        GroupPlan { name: name.to_owned(), method: method.to_owned(), tensors, parameters: 10 }
    }

    #[test]
    fn like_layers_are_told_in_one_line_and_others_apart() {
        let mut groups: Vec<_> = (0..12).map(|layer| group(&format!("model.layers.{layer}."), "slerp", 9)).collect();
        groups[5].method = "rule model.layers.5.*: from rm-0".to_owned();
        groups.push(group("model.norm.weight", "slerp", 1));
        groups.push(group("", "slerp", 1));
        let names: Vec<_> = folded(&groups).iter().map(Lines::name).collect();
        assert_eq!(names, ["(all)", "model.layers.{0..4}.", "model.layers.5.", "model.layers.{6..11}.", "model.norm.weight"]);
    }
}
