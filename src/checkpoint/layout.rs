//! Stub: integrator.

use super::{Architecture, Manifest};

/// Which tensors of a manifest the model reads, and which ride along unused.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    used: Vec<String>,
    unused: Vec<String>,
}

impl Layout {
    /// Every missing or mis-shaped tensor as a sentence, if there is one.
    pub fn new(_architecture: &Architecture, manifest: &Manifest) -> Result<Self, Vec<String>> {
        Ok(Self { used: manifest.names().map(str::to_owned).collect(), unused: Vec::new() })
    }

    /// Names of the tensors that the model reads, sorted.
    pub fn used(&self) -> &[String] {
        &self.used
    }

    /// Names of the tensors that ride along unused, sorted.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }
}
