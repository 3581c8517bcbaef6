//! The choices that a text needs beyond what the tokenizer and the template say, and how they are echoed.

use jiff::civil::DateTime;

/// What happens at the beginning of a text, a pair or a rendered conversation. Token ids are never touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BosPolicy {
    /// As the tokenizer (for text) or the template (for conversations) says; but where the tokenizer puts its BOS before
    /// a text that already begins with one, only one stays.
    #[default]
    Auto,
    /// Exactly one BOS, whether or not the tokenizer or the template has one. It is kept when the left is cut.
    Always,
    /// No BOS, not even the tokenizer's or the template's.
    Never,
    /// As the tokenizer says, a doubled BOS included: what transformers does.
    AsIs,
}

impl BosPolicy {
    /// The name in settings and in `GetModel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
            Self::AsIs => "as_is",
        }
    }
}

/// What happens at the end of a text, a pair or a rendered conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EosPolicy {
    /// As the tokenizer and the template say.
    #[default]
    AsIs,
    /// The last token is EOS, also after truncation: for models that were trained to be read there.
    Ensure,
}

impl EosPolicy {
    /// The name in settings and in `GetModel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsIs => "as_is",
            Self::Ensure => "ensure",
        }
    }
}

/// What becomes of the reasoning of thinking policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReasoningPolicy {
    /// The model reads what the caller sent.
    #[default]
    Keep,
    /// Thinking blocks are taken out of what assistants say, and one that never closes is a failure of the sample.
    Strip,
}

impl ReasoningPolicy {
    /// The name in settings and in `GetModel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Strip => "strip",
        }
    }
}

/// Which chat template renders conversations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TemplateChoice {
    /// The model's `default`; for a conversation with tools its `tool_use`, where it has one. As in transformers.
    #[default]
    Default,
    /// One of the model's templates by name.
    Named(String),
    /// A template of the operator's own.
    Source(String),
}

/// How texts become tokens for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct TextOptions {
    /// The longest sequence the model takes, in tokens.
    pub max_tokens: usize,
    /// Rows of the model's embedding: every id is below it.
    pub vocab_rows: usize,
    pub bos: BosPolicy,
    pub eos: EosPolicy,
    pub template: TemplateChoice,
    /// The time that `strftime_now` tells: fixed, so that a score does not depend on the day it was asked for.
    pub template_time: DateTime,
    /// Whether the head reads the last token, so that cutting the right end may cut what it reads. False for models that
    /// read the first token or the mean.
    pub reads_last_token: bool,
    pub reasoning: ReasoningPolicy,
    /// A token that must end every sequence beside those that come as ids, because the head was trained to read there; it
    /// takes the place of EOS in [`EosPolicy::Ensure`].
    pub closing: Option<u32>,
}

impl TextOptions {
    /// The defaults for a model of this size at this time.
    pub fn new(max_tokens: usize, vocab_rows: usize, template_time: DateTime) -> Self {
        Self {
            max_tokens,
            vocab_rows,
            bos: BosPolicy::default(),
            eos: EosPolicy::default(),
            template: TemplateChoice::default(),
            template_time,
            reads_last_token: true,
            reasoning: ReasoningPolicy::default(),
            closing: None,
        }
    }
}

/// A tokenizer or template that cannot be used with these options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TextError(pub String);

/// The text policy in force, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextPolicy {
    pub bos: BosPolicy,
    pub eos: EosPolicy,
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    /// The id of the tokenizer's pad token; the pad id that pooling skips is the model's.
    pub pad_id: Option<u32>,
    /// The name of the template that renders conversations: `default`, another name, or `override`; none if there is none.
    pub template: Option<String>,
    /// BLAKE3 of that template's text, in hex.
    pub template_hash: Option<String>,
    /// The time that templates see, where one asks for it.
    pub template_time: Option<DateTime>,
    pub reasoning: ReasoningPolicy,
    /// The id of the token that ends every sequence, where the head asks for one.
    pub closing: Option<u32>,
    pub max_tokens: usize,
}
