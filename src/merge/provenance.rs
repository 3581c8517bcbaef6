//! Where merged weights come from, as they carry it with them: in `__metadata__` of every safetensors file, and with the
//! records of earlier merges in `warm.json`.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::recipe::dtype_name;
use super::shards::Metadata;
use super::{MergePlan, Merged, PlannedMember, PlannedSource};
use crate::checkpoint::SourceError;
use crate::domain::WeightsId;

/// The record of a merge, in the folder that the merge has written.
pub const RECORD_FILE: &str = "warm.json";

/// A record of a thousand merges is smaller.
const MAX_RECORD_BYTES: u64 = 16 << 20;

/// What one merge was made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Provenance {
    method: String,
    dtype: String,
    weights_id: WeightsId,
    recipe: Value,
    inputs: Vec<Value>,
    /// Null where the merge does not read it.
    init: Value,
    /// Records of earlier merges that went into this one, the oldest first.
    chain: Vec<Value>,
}

impl Provenance {
    /// Everything but the hashes: those are zero until all has been read.
    pub fn draft(plan: &MergePlan) -> Self {
        let recipe = plan.recipe();
        let source = |name: &str, source: &PlannedSource| {
            let mut input = json!({"name": name, "path": source.path().to_string_lossy(), "content_hash": WeightsId([0; 32]).to_string()});
            if let Some(base) = source.base() {
                input["base"] = base.to_string_lossy().into();
            }
            for (key, origin) in [("origin", source.origin()), ("base_origin", source.base_origin())] {
                origin.into_iter().for_each(|origin| input[key] = origin.into());
            }
            match (&source.nested, earlier(source.path())) {
                (Some(_), _) => input["weights_id"] = WeightsId([0; 32]).to_string().into(),
                (None, Some(record)) => input["weights_id"] = record["weights_id"].clone(),
                (None, None) => {}
            }
            input
        };
        let inputs = plan.members().iter().map(|member| {
            let mut input = source(member.name().as_str(), member.source());
            input["coefficient"] = member.coefficient().into();
            input
        });
        let init = plan.init().filter(|init| !init.reads().is_empty());
        Self {
            method: recipe.method().name().to_owned(),
            dtype: dtype_name(recipe.dtype()).unwrap_or_default().to_owned(),
            weights_id: WeightsId([0; 32]),
            recipe: serde_json::from_str(&recipe.to_resolved_string()).unwrap_or(Value::Null),
            inputs: inputs.collect(),
            init: init.map_or(Value::Null, |init| source("init", init)),
            chain: Vec::new(),
        }
    }

    /// With the hashes of what was read, and the records of what came before.
    pub fn complete(&self, merged: &Merged) -> Result<Self, SourceError> {
        let plan = merged.plan();
        let mut complete = Self { weights_id: merged.weights_id()?, ..self.clone() };
        let hashes = merged.member_hashes()?.into_iter().zip(plan.members().iter().map(PlannedMember::source));
        let inputs = complete.inputs.iter_mut().zip(hashes);
        let init = merged.init_hash()?.zip(plan.init()).map(|init| (&mut complete.init, init));
        for (input, (hash, source)) in inputs.chain(init) {
            input["content_hash"] = WeightsId(hash).to_string().into();
            if let Some(merged) = source.nested.as_ref().and_then(|nested| nested.merged()) {
                input["weights_id"] = merged.weights_id()?.to_string().into();
            }
        }
        complete.chain = chain(plan)?;
        Ok(complete)
    }

    pub fn weights_id(&self) -> WeightsId {
        self.weights_id
    }

    /// For `__metadata__`, where every value is text. `format` is what transformers wants to see there.
    pub fn metadata(&self) -> Metadata {
        let entries = [
            ("format", "pt".to_owned()),
            ("warm_version", env!("CARGO_PKG_VERSION").to_owned()),
            ("warm_method", self.method.clone()),
            ("warm_weights_id", self.weights_id.to_string()),
            ("warm_recipe", self.recipe.to_string()),
            ("warm_inputs", Value::from(self.inputs.clone()).to_string()),
            ("warm_init", self.init.to_string()),
        ];
        entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// For `warm.json`.
    pub fn record(&self) -> Value {
        json!({
            "warm_version": env!("CARGO_PKG_VERSION"),
            "method": self.method,
            "dtype": self.dtype,
            "weights_id": self.weights_id.to_string(),
            "recipe": self.recipe,
            "inputs": self.inputs,
            "init": self.init,
            "chain": self.chain,
        })
    }
}

/// The record of the merge that has written this folder, if one has. What cannot be read as such a record is no reason to
/// refuse a merge, whose inputs are named by their content anyway.
pub fn earlier(folder: &Path) -> Option<Value> {
    let path = folder.join(RECORD_FILE);
    let read = || -> Result<Value, String> {
        let mut text = Vec::new();
        let file =
            File::open(&path).map_err(|error| if error.kind() == ErrorKind::NotFound { String::new() } else { error.to_string() })?;
        file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
        if text.len() as u64 > MAX_RECORD_BYTES {
            return Err(format!("has more than {MAX_RECORD_BYTES} bytes"));
        }
        serde_json::from_slice(&text).map_err(|error| error.to_string())
    };
    match read() {
        Ok(record) if weights_id(&record).is_some() => Some(record),
        Ok(_) => {
            tracing::warn!(file = %path.display(), "names no weights_id; its earlier merges are not recorded");
            None
        }
        Err(problem) => {
            if !problem.is_empty() {
                tracing::warn!(file = %path.display(), problem, "cannot be read; its earlier merges are not recorded");
            }
            None
        }
    }
}

fn weights_id(record: &Value) -> Option<&str> {
    record.get("weights_id")?.as_str()
}

/// The records of everything that a plan reads and that was merged before, each once, the oldest first. Kept flat: a tree
/// would repeat the common past of several inputs, and grow with every merge of merges.
fn chain(plan: &MergePlan) -> Result<Vec<Value>, SourceError> {
    let mut chain = Vec::new();
    for source in plan.sources() {
        let record = match &source.nested {
            None => earlier(source.path()),
            Some(nested) => {
                let merged = nested.merged();
                merged.map(|merged| Ok(Provenance::draft(nested.plan()).complete(merged)?.record())).transpose()?
            }
        };
        link(record, &mut chain);
    }
    Ok(chain)
}

/// Adds a record after those that it carries.
fn link(record: Option<Value>, chain: &mut Vec<Value>) {
    let Some(mut record) = record else { return };
    let before = record.as_object_mut().and_then(|record: &mut Map<String, Value>| record.shift_remove("chain"));
    let before = before.as_ref().and_then(Value::as_array).into_iter().flatten().cloned();
    for record in before.chain([record]) {
        if !chain.iter().any(|known| weights_id(known) == weights_id(&record)) {
            chain.push(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(dir: &Path, name: &str, id: &str, chain: &[Value]) -> Value {
        let record = json!({"weights_id": id, "method": "linear", "chain": chain});
        std::fs::create_dir_all(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join(RECORD_FILE), record.to_string()).unwrap();
        json!({"weights_id": id, "method": "linear"})
    }

    #[test]
    fn the_past_of_all_inputs_is_told_once_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let first = record(dir.path(), "first", "1", &[]);
        let second = record(dir.path(), "second", "2", std::slice::from_ref(&first));
        let third = record(dir.path(), "third", "3", std::slice::from_ref(&first));
        let mut chain = Vec::new();
        for name in ["second", "plain", "third", "first"] {
            link(earlier(&dir.path().join(name)), &mut chain);
        }
        assert_eq!(chain, [first, second, third]);
    }

    #[test]
    fn what_is_no_record_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "[1]", "{\"weights_id\": 7}", "{\"weights_id\""] {
            std::fs::write(dir.path().join(RECORD_FILE), text).unwrap();
            assert_eq!(earlier(dir.path()), None, "{text}");
        }
        assert_eq!(earlier(&dir.path().join("nowhere")), None);
    }
}
