//! Stub: owner C.
use std::path::Path;

use super::CheckpointError;

#[derive(Clone, Debug)]
pub struct TextFacts(Vec<u8>);

impl TextFacts {
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let file = dir.join("tokenizer.json");
        Ok(Self(std::fs::read(&file).map_err(|error| CheckpointError::new(file.display(), error.to_string()))?))
    }

    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.0).as_bytes()
    }

    pub fn differences(&self, other: &Self) -> Vec<String> {
        if self.0 == other.0 { vec![] } else { vec!["tokenizer.json differs".to_owned()] }
    }
}
