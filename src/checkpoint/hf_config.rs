//! Stub: integrator.

/// What `config.json` says of a model, every number checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture;

impl Architecture {
    pub fn parse(_config: &serde_json::Value) -> Result<Self, Vec<String>> {
        Ok(Self)
    }

    /// Sentences that name each difference which forbids averaging; empty for mergeable architectures.
    pub fn differences(&self, _other: &Self) -> Vec<String> {
        Vec::new()
    }
}
