//! What a plan reads: members and init, each with its weights at hand.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::nested::Nested;
use super::plan::{MergePlan, Size};
use super::tracked::Tracked;
use crate::checkpoint::{Dtype, SourceError};
use crate::domain::MemberName;

/// A checkpoint or merge that a plan reads, with its weights at hand.
pub struct PlannedSource {
    pub(super) path: PathBuf,
    pub(super) origin: Option<String>,
    pub(super) base_origin: Option<String>,
    pub(super) dtypes: BTreeSet<Dtype>,
    pub(super) bytes: u64,
    /// The tensors that the merge reads of it, sorted.
    pub(super) reads: Vec<String>,
    pub(super) weights: Tracked,
    pub(super) nested: Option<Arc<Nested>>,
}

impl PlannedSource {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it was fetched from, by its commit, where [`PlannedSource::path`] is a copy.
    pub fn origin(&self) -> Option<&str> {
        self.origin.as_deref()
    }

    /// Likewise of the base.
    pub fn base_origin(&self) -> Option<&str> {
        self.base_origin.as_deref()
    }

    /// The checkpoint that it stands on, if it is a LoRA adapter.
    pub fn base(&self) -> Option<&Path> {
        self.weights.adapter().map(|adapter| adapter.place().base.as_path())
    }

    /// What the tensors that are read of it are stored in.
    pub fn dtypes(&self) -> &BTreeSet<Dtype> {
        &self.dtypes
    }

    /// Bytes that the merge takes of it; SLERP reads them twice.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The tensors that the merge reads of it, sorted. What is multiplied by zero is not read.
    pub fn reads(&self) -> &[String] {
        &self.reads
    }

    /// The plan of its own, if it is another recipe.
    pub fn plan(&self) -> Option<&Arc<MergePlan>> {
        self.nested.as_ref().map(|nested| nested.plan())
    }

    /// BLAKE3 over name, dtype, shape and bytes of each tensor that the merge reads of it, in name order. Blocks that were
    /// read already are not read again.
    pub fn content_hash(&self) -> Result<[u8; 32], SourceError> {
        self.weights.content_hash(&self.reads)
    }
}

/// A member of a plan.
pub struct PlannedMember {
    pub(super) name: MemberName,
    pub(super) coefficient: f64,
    pub(super) source: PlannedSource,
    /// Tensors of the merged model that it does not have, because a rule takes another's.
    pub(super) lacks: Vec<String>,
}

impl PlannedMember {
    pub fn name(&self) -> &MemberName {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// Its share in the merge, as in the recipe.
    pub fn coefficient(&self) -> f64 {
        self.coefficient
    }

    /// What the tensors that are read of it are stored in.
    pub fn dtypes(&self) -> &BTreeSet<Dtype> {
        &self.source.dtypes
    }

    /// Bytes that the merge takes of it.
    pub fn bytes(&self) -> u64 {
        self.source.bytes
    }

    pub fn source(&self) -> &PlannedSource {
        &self.source
    }

    /// Tensors of the merged model that it does not have; without them it cannot stand alone.
    pub fn lacks(&self) -> &[String] {
        &self.lacks
    }
}

impl fmt::Display for PlannedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtypes: Vec<_> = self.dtypes.iter().map(|dtype| dtype.safetensors_name()).collect();
        let dtypes = if dtypes.is_empty() { "not read".to_owned() } else { dtypes.join("+") };
        let named = |path: &Path, origin: Option<&str>| origin.map_or_else(|| path.display().to_string(), str::to_owned);
        write!(f, "{:>9}  {dtypes}  {}", Size(self.bytes), named(&self.path, self.origin()))?;
        self.base().map_or(Ok(()), |base| write!(f, " on {}", named(base, self.base_origin())))
    }
}

impl fmt::Debug for PlannedMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlannedMember({}, {})", self.name, self.source.path.display())
    }
}
