//! A conversation through the model's chat template, to the text that the model was trained to read.

use std::collections::BTreeMap;

use jiff::civil::DateTime;
use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};

use super::options::{TemplateChoice, TextError};
use crate::{
    checkpoint::TextFacts,
    domain::{Conversation, Failure, FailureKind},
};

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
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(5_000_000));
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let mut hasher = blake3::Hasher::new();
        let mut tells_the_time = false;
        let mut add = |entry: Option<(String, String)>| -> Result<Option<Source>, TextError> {
            let Some((name, text)) = entry else { return Ok(None) };
            hasher.update(name.as_bytes()).update(text.as_bytes());
            tells_the_time |= text.contains("strftime_now");
            let hash = *blake3::hash(text.as_bytes()).as_bytes();
            environment
                .add_template_owned(name.clone(), text)
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

    pub(super) fn render(&self, conversation: &Conversation) -> Result<String, Failure> {
        let refused = |message: String| Failure::new(FailureKind::TemplateRefused, message);
        let source = match (&self.with_tools, conversation.tools()) {
            (Some(source), Some(_)) => source,
            _ => self.plain.as_ref().ok_or_else(|| refused("the model has no chat template".to_owned()))?,
        };
        let messages: Vec<Value> = conversation
            .turns()
            .iter()
            .map(|turn| {
                let mut message = serde_json::Map::new();
                message.insert("role".to_owned(), turn.role().into());
                message.insert("content".to_owned(), turn.content().into());
                message.extend(turn.extra().iter().map(|(k, v)| (k.clone(), v.clone())));
                Value::from(Serde(message))
            })
            .collect();
        let mut context: BTreeMap<String, Value> = self.special_tokens.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect();
        context.insert("messages".to_owned(), Value::from(messages));
        context.insert("tools".to_owned(), conversation.tools().map_or(Value::from(()), |tools| Value::from(Serde(tools))));
        context.insert("documents".to_owned(), Value::from(()));
        context.insert("add_generation_prompt".to_owned(), Value::from(false));
        let template = self.environment.get_template(&source.name).map_err(|error| refused(error.to_string()))?;
        template.render(context).map_err(|error| refused(error.to_string()))
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
