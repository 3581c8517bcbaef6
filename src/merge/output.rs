//! `warm merge`: merged weights as a checkpoint folder that transformers, and this program, load as any other.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::provenance::{Provenance, RECORD_FILE};
use super::recipe::dtype_name;
use super::staging::{FileError, Staging};
use super::write::{DEFAULT_SHARD_BYTES, Progress, Stage, WriteError, check_place, write_tensors};
use super::{MergePlan, Merged, PlannedMember};
use crate::checkpoint::{SourceError, TensorSource, TextFacts, Weights};
use crate::domain::WeightsId;

/// What a checkpoint folder holds for its tokenizer and templates, of all tokenizers that transformers knows, and what
/// generation wants of a policy.
const TEXT_FILES: [&str; 14] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];
const TEMPLATES: &str = "additional_chat_templates";

/// How a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Replace a checkpoint that stands there.
    pub overwrite: bool,
    /// The largest file of weights, in bytes; a larger tensor gets a file of its own.
    pub max_shard_bytes: u64,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { overwrite: false, max_shard_bytes: DEFAULT_SHARD_BYTES }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub weights_id: WeightsId,
    /// Safetensors files.
    pub files: Vec<String>,
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Merges into the folder `place`, which appears when all is written and synced, and not before. Whatever goes wrong, what
/// stands there stays as it is and nothing is left beside it.
pub fn write_checkpoint(merged: &Merged, place: &Path, options: WriteOptions, progress: Progress<'_>) -> Result<Written, WriteError> {
    let plan = merged.plan();
    let mut inputs = Vec::new();
    folders(plan, &mut inputs);
    refuse_input(place, &inputs)?;
    let draft = Provenance::draft(plan);
    let mut provenance = |stage| if stage == Stage::Draft { Ok(draft.clone()) } else { draft.complete(merged) };
    Job { source: merged, plan, text_folder: &text_folder(plan), provenance: &mut provenance }.write(place, options, progress)
}

/// Everything that a plan was made from: folders, and the files of recipes within.
fn folders(plan: &MergePlan, into: &mut Vec<PathBuf>) {
    for source in plan.sources() {
        into.push(source.path().to_owned());
        into.extend(source.base().map(Path::to_owned));
        if let Some(plan) = source.plan() {
            folders(plan, into);
        }
    }
}

/// Where tokenizer and templates are taken from: the first member, or its first member if it is a recipe; of an adapter that
/// was saved without a tokenizer, its base.
fn text_folder(plan: &MergePlan) -> PathBuf {
    let Some(source) = plan.members().first().map(PlannedMember::source) else { return PathBuf::new() };
    match (source.plan(), source.weights.adapter()) {
        (Some(plan), _) => text_folder(plan),
        (None, Some(adapter)) => adapter.place().text.clone(),
        (None, None) => source.path().to_owned(),
    }
}

/// What goes into a folder.
struct Job<'a> {
    source: &'a dyn TensorSource,
    plan: &'a MergePlan,
    /// Where tokenizer and templates are taken from.
    text_folder: &'a Path,
    provenance: &'a mut dyn FnMut(Stage) -> Result<Provenance, SourceError>,
}

impl Job<'_> {
    fn write(self, place: &Path, options: WriteOptions, progress: Progress<'_>) -> Result<Written, WriteError> {
        check_place(place, options.overwrite)?;
        let staging = Staging::new(place)?;
        copy_text(self.text_folder, &staging)?;
        // A policy may have a tokenizer that this program cannot read, whose files are copied as they are.
        if let Ok(planned) = self.plan.text() {
            let copied = TextFacts::open(staging.folder()).map_err(|error| WriteError::Refused(error.to_string()))?;
            if let Some(difference) = planned.differences(&copied).first() {
                let folder = self.text_folder.display();
                let problem = format!("{folder}: the tokenizer's files have changed since the plan was made: {difference}");
                return Err(WriteError::Refused(problem));
            }
        }
        let dtype = dtype_name(self.plan.recipe().dtype()).unwrap_or_default();
        staging.write("config.json", format!("{:#}\n", config(self.plan.config(), dtype)).as_bytes())?;
        let mut last = None;
        let mut metadata = |stage| {
            let provenance = (self.provenance)(stage)?;
            let metadata = provenance.metadata();
            last = Some(provenance);
            Ok(metadata)
        };
        let shards = write_tensors(self.source, &staging, options.max_shard_bytes, &mut metadata, progress)?;
        let Some(provenance) = last else { return Err(WriteError::Refused("no provenance was made".to_owned())) };
        staging.write(RECORD_FILE, format!("{:#}\n", provenance.record()).as_bytes())?;
        // The headers are read back as any reader will read them.
        let found = Weights::open(staging.folder()).map_err(|error| WriteError::Refused(error.to_string()))?;
        if found.manifest() != self.source.manifest() {
            return Err(WriteError::Refused(format!("{}: the file system gives back other headers than were written", place.display())));
        }
        staging.publish(place, options.overwrite)?;
        Ok(Written {
            weights_id: provenance.weights_id(),
            files: shards.iter().map(|shard| shard.file.clone()).collect(),
            tensors: self.source.manifest().len(),
            bytes: shards.iter().map(|shard| shard.data_bytes()).sum(),
        })
    }
}

/// The configuration of the merged model: the first member's, in the merge's dtype. `mean` and `std` are statistics of that
/// member's rewards, which the merged model does not have.
fn config(first: &Value, dtype: &str) -> Value {
    let mut config = first.clone();
    if let Some(fields) = config.as_object_mut() {
        fields.shift_remove("mean");
        fields.shift_remove("std");
        // transformers 5 reads the one, 4 the other.
        fields.insert("dtype".to_owned(), dtype.into());
        fields.insert("torch_dtype".to_owned(), dtype.into());
    }
    config
}

fn copy_text(folder: &Path, staging: &Staging) -> Result<(), FileError> {
    for name in TEXT_FILES {
        copy(&folder.join(name), staging, name)?;
    }
    let templates = folder.join(TEMPLATES);
    let mut names: Vec<String> = std::fs::read_dir(&templates)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".jinja"))
        .collect();
    names.sort_unstable();
    for name in names {
        copy(&templates.join(&name), staging, &format!("{TEMPLATES}/{name}"))?;
    }
    Ok(())
}

/// Copies a file if it exists.
fn copy(from: &Path, staging: &Staging, name: &str) -> Result<(), FileError> {
    let cannot = |error: io::Error| FileError::new(from, format_args!("cannot be copied: {error}"));
    let mut file = match File::open(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(cannot(error)),
        Ok(file) => file,
    };
    let (_, mut to) = staging.create(name)?;
    io::copy(&mut file, &mut to).and_then(|_| to.sync_all()).map_err(cannot)
}

/// A merge never replaces what it is made from.
fn refuse_input(place: &Path, inputs: &[PathBuf]) -> Result<(), WriteError> {
    let Ok(target) = std::fs::canonicalize(place) else { return Ok(()) };
    let same = |input: &&PathBuf| std::fs::canonicalize(input).is_ok_and(|input: PathBuf| input.starts_with(&target));
    match inputs.iter().find(same) {
        None => Ok(()),
        Some(input) => {
            let (place, input) = (place.display(), input.display());
            Err(WriteError::Refused(format!("{place}: the recipe reads {input}, which a merge to this place would remove")))
        }
    }
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
