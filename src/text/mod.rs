//! Words to tokens: the model's own chat template, its own tokenizer, and a policy for what neither of them says.

mod encoding;

pub use encoding::Encoding;
