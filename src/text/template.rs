//! A conversation through the model's chat template, to the text that the model was trained to read.

use std::collections::BTreeMap;

use jiff::civil::DateTime;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};

use super::options::{TemplateChoice, TextError};
use crate::{
    checkpoint::TextFacts,
    domain::{Conversation, Failure, FailureKind, Turn, json_bytes},
};

mod functions;
mod json;
mod python;
mod syntax;

/// What one rendering may cost: one per instruction and per 64 bytes moved. A long conversation with a large template
/// takes a hundredth; an endless loop is over in a fraction of a second.
const FUEL: u64 = 4_000_000;
/// How deep macros, loops and calls may nest; templates in use stay below 20.
const MAX_RECURSION: usize = 120;
/// A template may write this many bytes on its own, ...
const MIN_OUTPUT_BYTES: usize = 2 << 20;
/// ... and this many for each byte that the caller sent; indented JSON of short values is the widest honest use.
const OUTPUT_FACTOR: usize = 32;

/// The arguments that a caller may hand to a template. A list, because templates are programs and arguments are their
/// input; special tokens, messages, tools and the template itself can never be replaced by one.
pub const TEMPLATE_ARGS: [&str; 14] = [
    "add_vision_id",
    "builtin_tools",
    "citation_mode",
    "clear_thinking",
    "date_string",
    "documents",
    "enable_thinking",
    "keep_past_thinking",
    "model_identity",
    "preserve_thinking",
    "reasoning_effort",
    "safety_mode",
    "thinking",
    "tools_in_user_message",
];

/// The names under which the reasoning of a message is passed; templates read the first, or (gpt-oss) the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as templates see it. As in transformers 5, fields that are null are absent, and reasoning that comes under
/// one of its names is there under the two that templates read.
fn message(turn: &Turn) -> serde_json::Value {
    let given = |name: &str| turn.extra().get(name).filter(|value| !value.is_null());
    let reasoning = REASONING.into_iter().find_map(given);
    let mut fields = serde_json::Map::new();
    if let Some(reasoning) = reasoning {
        fields.insert("thinking".to_owned(), reasoning.clone());
    }
    fields.insert("role".to_owned(), turn.role().into());
    fields.insert("content".to_owned(), turn.content().into());
    fields.extend(turn.extra().iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.clone(), value.clone())));
    if let Some(reasoning) = reasoning {
        fields.insert("reasoning_content".to_owned(), reasoning.clone());
    }
    serde_json::Value::Object(fields)
}

/// The words of `raise_exception`, or what the engine says.
fn explain(error: &minijinja::Error) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(functions::Refusal(message)) = inner.downcast_ref() {
            return message.clone();
        }
        cause = inner.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => "the chat template takes too many steps for this conversation".to_owned(),
        _ => format!("the chat template fails: {error}"),
    }
}

/// Takes what a template writes, up to a limit.
struct Capped {
    bytes: Vec<u8>,
    limit: usize,
    full: bool,
}

impl std::io::Write for &mut Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            self.full = true;
            return Err(std::io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The compiled templates of one model.
#[derive(Debug)]
pub(super) struct Templates {
    environment: Environment<'static>,
    /// The template for conversations, and the one for those with tools; none where the model has none.
    plain: Option<Source>,
    with_tools: Option<Source>,
    special_tokens: BTreeMap<String, String>,
    tells_the_time: bool,
    fingerprint: [u8; 32],
}

#[derive(Debug)]
struct Source {
    name: String,
    hash: [u8; 32],
}

impl Templates {
    pub(super) fn new(facts: &TextFacts, choice: &TemplateChoice, time: DateTime) -> Result<Self, TextError> {
        let named = |name: &str| facts.templates().get(name).map(|text| (name.to_owned(), text.clone()));
        let (plain, with_tools) = match choice {
            TemplateChoice::Default => (named("default"), named("tool_use")),
            TemplateChoice::Source(text) => (Some(("override".to_owned(), text.clone())), None),
            TemplateChoice::Named(name) => {
                let found = named(name).ok_or_else(|| {
                    let names: Vec<_> = facts.templates().keys().cloned().collect();
                    TextError(format!("template: the model has none named {name:?}, only {names:?}"))
                })?;
                (Some(found), None)
            }
        };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| TextError(error.to_string()))?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        functions::install(&mut environment, time);
        let mut hasher = blake3::Hasher::new();
        let mut tells_the_time = false;
        let mut add = |entry: Option<(String, String)>| -> Result<Option<Source>, TextError> {
            let Some((name, text)) = entry else { return Ok(None) };
            hasher.update(name.as_bytes()).update(text.as_bytes());
            tells_the_time |= text.contains("strftime_now");
            let hash = *blake3::hash(text.as_bytes()).as_bytes();
            environment
                .add_template_owned(name.clone(), syntax::rewrite(&text))
                .map_err(|error| TextError(format!("chat template {name:?} does not parse: {error}")))?;
            Ok(Some(Source { name, hash }))
        };
        let (plain, with_tools) = (add(plain)?, add(with_tools)?);
        if tells_the_time {
            hasher.update(time.to_string().as_bytes());
        }
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(Self { environment, plain, with_tools, special_tokens: facts.special_tokens().clone(), tells_the_time, fingerprint })
    }

    /// The conversation as the template writes it: no generation prompt, special tokens as variables, `tools` and
    /// `documents` none where there are none. Its own refusal and every other failure of the template is a failure of
    /// this sample; so is running out of fuel or of room for the output.
    pub(super) fn render(&self, conversation: &Conversation) -> Result<String, Failure> {
        let refused = |message: String| Failure::new(FailureKind::TemplateRefused, message);
        let source = match (&self.with_tools, conversation.tools()) {
            (Some(source), Some(_)) => source,
            _ => self.plain.as_ref().ok_or_else(|| {
                refused("the model has no chat template for conversations: send text, or set `template` in the configuration".to_owned())
            })?,
        };
        let (context, size) = self.context(conversation)?;
        self.write(source, context, size)
    }

    fn write(&self, source: &Source, context: BTreeMap<String, Value>, size: usize) -> Result<String, Failure> {
        let refused = |message: String| Failure::new(FailureKind::TemplateRefused, message);
        let template = self.environment.get_template(&source.name).map_err(|error| refused(error.to_string()))?;
        let limit = MIN_OUTPUT_BYTES + OUTPUT_FACTOR.saturating_mul(size);
        let mut output = Capped { bytes: Vec::new(), limit, full: false };
        let rendered = template.render_captured_to(context, &mut output).map(drop);
        if output.full {
            return Err(refused(format!("the chat template writes more than {limit} bytes for this conversation")));
        }
        rendered.map_err(|error| refused(explain(&error)))?;
        String::from_utf8(output.bytes).map_err(|_| refused("the chat template writes broken UTF-8".to_owned()))
    }

    /// What the template puts before an answer, at the end of a short prompt: with the generation prompt, which scoring
    /// never has. `None` where there is no template or where it refuses.
    pub(super) fn opening(&self) -> Option<String> {
        let source = self.plain.as_ref()?;
        let (mut context, size) = self.context(&Conversation::user("x")).ok()?;
        context.insert("add_generation_prompt".to_owned(), Value::from(true));
        self.write(source, context, size).ok()
    }

    /// The template's variables, and the bytes of what came from the caller.
    fn context(&self, conversation: &Conversation) -> Result<(BTreeMap<String, Value>, usize), Failure> {
        let refused = |message: String| Failure::new(FailureKind::TemplateRefused, message);
        let mut size = 0;
        let mut take = |value: &serde_json::Value| {
            size += json_bytes(value);
            Value::from(Serde(value))
        };
        let messages: Vec<Value> = conversation.turns().map(|turn| take(&message(turn))).collect();
        let mut context: BTreeMap<String, Value> =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))).collect();
        for (name, value) in conversation.template_args() {
            if !TEMPLATE_ARGS.contains(&name.as_str()) {
                return Err(refused(format!("template argument `{name}` is not one of {}", TEMPLATE_ARGS.join(", "))));
            }
            if name == "documents"
                && !value.is_null()
                && !value.as_array().is_some_and(|list| list.iter().all(serde_json::Value::is_object))
            {
                return Err(refused("template argument `documents`: expected a list of objects".to_owned()));
            }
            context.insert(name.clone(), take(value));
        }
        context.insert("messages".to_owned(), Value::from(messages));
        context.insert("tools".to_owned(), conversation.tools().map_or(Value::from(()), take));
        context.entry("documents".to_owned()).or_insert_with(|| Value::from(()));
        context.insert("add_generation_prompt".to_owned(), Value::from(false));
        Ok((context, size))
    }

    pub(super) fn name(&self) -> Option<&str> {
        self.plain.as_ref().map(|source| source.name.as_str())
    }

    pub(super) fn hash(&self) -> Option<[u8; 32]> {
        self.plain.as_ref().map(|source| source.hash)
    }

    pub(super) fn tells_the_time(&self) -> bool {
        self.tells_the_time
    }

    pub(super) fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
