//! Stub: owner C.
#[derive(Clone, Debug)]
pub struct TextFacts;
