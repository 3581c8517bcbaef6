//! What the model reads.

/// A tokenised sample. Made only by [`super::TextPipeline::encode`], which guarantees: at least one token, at most the
/// limit, every id below the number of rows of the model's embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoding {
    ids: Vec<u32>,
    type_ids: Option<Vec<u32>>,
    truncated: bool,
    rendered: Option<String>,
    doubled_bos: bool,
}

impl Encoding {
    pub(super) fn new(ids: Vec<u32>, type_ids: Option<Vec<u32>>, truncated: bool, rendered: Option<String>) -> Self {
        debug_assert!(!ids.is_empty() && type_ids.as_ref().is_none_or(|types| types.len() == ids.len()));
        Self { ids, type_ids, truncated, rendered, doubled_bos: false }
    }

    pub(super) fn with_doubled_bos(self, doubled_bos: bool) -> Self {
        Self { doubled_bos, ..self }
    }

    /// Without the text that the template gave, which is larger than the ids.
    pub fn without_rendered(self) -> Self {
        Self { rendered: None, ..self }
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Segment numbers, where the tokenizer's `model_input_names` has them; all zero otherwise.
    pub fn type_ids(&self) -> Option<&[u32]> {
        self.type_ids.as_deref()
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn truncated(&self) -> bool {
        self.truncated
    }

    /// Whether a BOS was dropped because there were two.
    pub fn doubled_bos(&self) -> bool {
        self.doubled_bos
    }

    /// The text that the chat template gave; `None` where there was no template to apply.
    pub fn rendered(&self) -> Option<&str> {
        self.rendered.as_deref()
    }
}

/// Encodings for tests of the layers below the text.
#[cfg(test)]
impl Encoding {
    pub(crate) fn for_test(ids: Vec<u32>) -> Self {
        Self::new(ids, None, false, None)
    }

    pub(crate) fn with_types(self, type_ids: Option<Vec<u32>>) -> Self {
        Self { type_ids, ..self }
    }

    pub(crate) fn with_rendered(self, rendered: &str) -> Self {
        Self { rendered: Some(rendered.to_owned()), ..self }
    }

    pub(crate) fn cut(self) -> Self {
        Self { truncated: true, ..self }
    }
}
