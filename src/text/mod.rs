//! Words to tokens: the model's own chat template, its own tokenizer, and a policy for what neither of them says.

mod before;
mod draft;
mod encoding;
mod options;
mod pipeline;
mod reasoning;
mod template;
mod tokenizer;

pub use before::Before;
pub use encoding::Encoding;
pub use options::{BosPolicy, EosPolicy, ReasoningPolicy, TemplateChoice, TextError, TextOptions, TextPolicy};
pub use pipeline::{Explanation, TextPipeline};
pub use template::TEMPLATE_ARGS;
