//! Members that are adapters on one base, read apart from it: for whoever holds the base once and a delta for each member.

use std::path::Path;
use std::sync::Arc;

use super::listing::listed;
use super::{MergePlan, Merged, PlannedMember, PlannedSource};
use crate::checkpoint::{Adapter, SourceError};

impl PlannedSource {
    /// The adapter that it is, if it is one on a base.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.weights.adapter()
    }
}

impl MergePlan {
    /// The checkpoint that every member is an adapter on, or is itself. The error says which members are in the way.
    pub fn common_base(&self) -> Result<&Path, String> {
        let Some((first, base)) = self.members().iter().find_map(|member| Some((member, member.source().base()?))) else {
            return Err("no member is a LoRA adapter".to_owned());
        };
        let names = |members: &[&PlannedMember]| listed(members.iter().map(|member| member.name().as_str()));
        let shares = |member: &&PlannedMember| member.source().weights.shares_with(&first.source().weights);
        let others: Vec<&PlannedMember> = self.members().iter().filter(|member| !shares(member)).collect();
        let (strangers, whole): (Vec<_>, Vec<_>) = others.into_iter().partition(|member| member.source().base().is_some());
        let mut problems = Vec::new();
        if !whole.is_empty() {
            let are = if whole.len() == 1 { "is not an adapter" } else { "are no adapters" };
            problems.push(format!("{} {are} on it", names(&whole)));
        }
        for member in strangers {
            let other = member.source().base().map(|base| base.display().to_string()).unwrap_or_default();
            problems.push(format!("{} stands on {other}", member.name()));
        }
        if problems.is_empty() {
            return Ok(base);
        }
        Err(format!("{} stands on {}, but {}", first.name(), base.display(), problems.join(", ")))
    }

    /// One member as [`MergePlan::member_source`] gives it, but without what its adapter adds: of every tensor what is stored
    /// of it, in the merge's dtype. Members on one base have the base's tensors from here with the same bits.
    pub fn member_bare(self: &Arc<Self>, index: usize) -> Result<Option<Merged>, SourceError> {
        Ok(self.member_source(index)?.map(Merged::bare))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::fixture::{self, TINY};
    use crate::checkpoint::{Elements, TensorSource};
    use crate::merge::Recipe;

    #[test]
    fn members_on_one_base_have_its_tensors_with_the_same_bits_in_the_dtype_of_the_merge() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = fixture::config(TINY);
        config["architectures"] = json!(["LlamaForCausalLM"]);
        let base = fixture::language_model(TINY, "F32", 1);
        fixture::write(&dir.path().join("base"), &config, &base, 1).unwrap();
        for seed in 0..2 {
            let config = json!({
                "peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
                "modules_to_save": ["score"], "task_type": "SEQ_CLS", "bias": "none",
            });
            let tensors = fixture::lora(TINY, "F32", 2, &["self_attn.q_proj"], seed);
            fixture::write_lora(&dir.path().join(format!("rm-{seed}")), &config, &tensors).unwrap();
        }
        let recipe = Recipe::from_yaml("members: [rm-0, rm-1]\ndtype: bfloat16", dir.path()).unwrap();
        let plan = Arc::new(MergePlan::open(&recipe).unwrap());
        assert_eq!(plan.common_base().unwrap(), std::fs::canonicalize(dir.path().join("base")).unwrap());
        let read = |source: &Merged, name: &str| {
            let mut elements = Elements::default();
            source.read(name, 0..source.manifest().get(name).unwrap().elements(), &mut elements).unwrap();
            match elements {
                Elements::Bf16(values) => values,
                other => panic!("{other:?}"),
            }
        };
        let members = [0, 1].map(|index| (plan.member_bare(index).unwrap().unwrap(), plan.member_source(index).unwrap().unwrap()));
        for name in plan.manifest().names().filter(|name| *name != "score.weight") {
            let stored = base[name].bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            let rounded: Vec<_> = stored.map(half::bf16::from_f32).collect();
            for (bare, whole) in &members {
                assert_eq!(read(bare, name), rounded, "{name}");
                assert_eq!(read(whole, name) != rounded, name.contains("q_proj"), "{name}");
            }
        }
        // A head is each member's own.
        assert_ne!(read(&members[0].0, "score.weight"), read(&members[1].0, "score.weight"));
        assert!(plan.member_bare(2).unwrap().is_none());
    }
}
