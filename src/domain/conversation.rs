//! What is judged: a conversation, a text, a pair of texts, or token ids; alone or as one prompt with many completions.

use std::sync::Arc;

use serde_json::{Map, Value};

/// The longest role name that is taken; templates know a handful of short ones.
const MAX_ROLE_BYTES: usize = 64;

/// Of few texts does a token have less: English has 4 to 5, code and most other scripts about 3.
const BYTES_PER_TOKEN: usize = 3;

/// An input that cannot be a [`Conversation`], [`Sample`] or [`PromptGroup`]: the field, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidInput {
    /// The path of the field inside the input, such as `messages[2].role`.
    pub field: String,
    /// What was expected and what was found.
    pub problem: String,
}

impl InvalidInput {
    /// Names a field and its problem.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The same problem seen from one level further out: `role` becomes `messages[2].role`.
    pub fn within(self, outer: &str) -> Self {
        let field = if self.field.is_empty() { outer.to_owned() } else { format!("{outer}.{}", self.field) };
        Self { field, ..self }
    }
}

/// One message of a conversation. Its content may be empty: only the chat template may refuse it.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    role: String,
    content: String,
    extra: Map<String, Value>,
    bytes: usize,
}

impl Turn {
    /// A message with a role of 1 to 64 bytes. `extra` holds the other fields that templates read (`tool_calls`,
    /// `name`, `reasoning_content`), in their own order; it may not name `role` or `content` again.
    pub fn new(role: impl Into<String>, content: impl Into<String>, extra: Map<String, Value>) -> Result<Self, InvalidInput> {
        let role = role.into();
        if role.is_empty() || role.len() > MAX_ROLE_BYTES {
            let problem = format!("expected a role of 1 to {MAX_ROLE_BYTES} bytes, found {} bytes", role.len());
            return Err(InvalidInput::new("role", problem));
        }
        if let Some(name) = ["role", "content"].into_iter().find(|name| extra.contains_key(*name)) {
            return Err(InvalidInput::new("extra", format!("may not name `{name}`, which has a field of its own")));
        }
        Ok(Self::sized(role, content.into(), extra))
    }

    /// The same role with another content.
    pub fn with(&self, content: String, extra: Map<String, Value>) -> Self {
        Self::sized(self.role.clone(), content, extra)
    }

    fn sized(role: String, content: String, extra: Map<String, Value>) -> Self {
        let bytes = role.len() + content.len() + 8 + object_bytes(&extra);
        Self { role, content, extra, bytes }
    }

    pub fn role(&self) -> &str {
        &self.role
    }

    pub fn content(&self) -> &str {
        &self.content
    }

    pub fn extra(&self) -> &Map<String, Value> {
        &self.extra
    }
}

/// Bytes of text in a JSON value, and a few for each node. Its depth is bounded by the parser.
pub fn json_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 8,
        Value::Array(items) => items.iter().map(json_bytes).sum::<usize>() + 8,
        Value::Object(fields) => object_bytes(fields) + 8,
        _ => 8,
    }
}

fn object_bytes(fields: &Map<String, Value>) -> usize {
    fields.iter().map(|(name, item)| name.len() + json_bytes(item)).sum()
}

/// At least one message; the last one is judged. The order of roles is the template's business. What it begins with is
/// shared by all that it is extended to, so a prompt stands in memory once for all of its completions.
#[derive(Clone, Debug)]
pub struct Conversation {
    prompt: Arc<[Turn]>,
    /// What came after it.
    rest: Vec<Turn>,
    beside: Arc<Beside>,
    bytes: usize,
}

/// What templates read beside the messages.
#[derive(Debug, Default, PartialEq)]
struct Beside {
    tools: Option<Value>,
    template_args: Map<String, Value>,
}

impl PartialEq for Conversation {
    fn eq(&self, other: &Self) -> bool {
        self.beside == other.beside && self.turns().eq(other.turns())
    }
}

impl Conversation {
    pub fn new(turns: Vec<Turn>, tools: Option<Value>, template_args: Map<String, Value>) -> Result<Self, InvalidInput> {
        if turns.is_empty() {
            return Err(InvalidInput::new("messages", "expected at least one message, found none"));
        }
        if let Some(tools) = &tools
            && !tools.is_array()
        {
            return Err(InvalidInput::new("tools", "expected a list of tools"));
        }
        Ok(Self::of(turns, Arc::new(Beside { tools, template_args })))
    }

    fn of(turns: Vec<Turn>, beside: Arc<Beside>) -> Self {
        let beside_bytes = beside.tools.as_ref().map_or(0, json_bytes) + object_bytes(&beside.template_args);
        let bytes = beside_bytes + turns.iter().map(|turn| turn.bytes).sum::<usize>();
        Self { prompt: turns.into(), rest: Vec::new(), beside, bytes }
    }

    /// One user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self::of(vec![Turn::sized("user".to_owned(), content.into(), Map::new())], Arc::default())
    }

    /// This conversation with further messages at its end.
    pub fn extended(&self, turns: impl IntoIterator<Item = Turn>) -> Self {
        let mut longer = self.clone();
        longer.rest.extend(turns);
        longer.bytes += longer.rest[self.rest.len()..].iter().map(|turn| turn.bytes).sum::<usize>();
        longer
    }

    /// This conversation with one assistant message at its end.
    pub fn answered(&self, content: impl Into<String>) -> Self {
        self.extended([Turn::sized("assistant".to_owned(), content.into(), Map::new())])
    }

    /// The same conversation with these messages in the place of its own, of which there must be as many.
    pub fn with_turns(&self, turns: Vec<Turn>) -> Self {
        debug_assert_eq!(turns.len(), self.turns().count());
        Self::of(turns, self.beside.clone())
    }

    pub fn turns(&self) -> impl DoubleEndedIterator<Item = &Turn> + Clone {
        self.prompt.iter().chain(&self.rest)
    }

    pub fn tools(&self) -> Option<&Value> {
        self.beside.tools.as_ref()
    }

    pub fn template_args(&self) -> &Map<String, Value> {
        &self.beside.template_args
    }

    /// Bytes of text, of messages and of all that stands beside them, shared or not.
    pub fn size_bytes(&self) -> usize {
        self.bytes
    }
}

/// What one score is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// Rendered by the model's own chat template.
    Conversation(Conversation),
    /// Already rendered text.
    Text(String),
    /// Two segments, as the tokenizer joins them.
    Pair { first: String, second: String },
    /// Already tokenised; taken as they are.
    Tokens(Vec<u32>),
}

impl Sample {
    /// Bytes of text or ids.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Conversation(conversation) => conversation.size_bytes(),
            Self::Text(text) => text.len(),
            Self::Pair { first, second } => first.len() + second.len(),
            Self::Tokens(ids) => ids.len() * 4,
        }
    }

    /// How many tokens it is taken for before they are counted: more than most texts have.
    pub fn estimated_tokens(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            _ => self.size_bytes() / BYTES_PER_TOKEN,
        }
    }
}

/// What the completions of a [`PromptGroup`] have in common.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Conversation(Conversation),
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Bytes of text or ids, before every completion.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Conversation(conversation) => conversation.size_bytes(),
            Self::Text(text) => text.len(),
            Self::Tokens(ids) => ids.len() * 4,
        }
    }
}

/// One answer to the prompt of a [`PromptGroup`], of the prompt's own kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Completion {
    /// After a conversation one assistant message; after a text, appended to it without a separator.
    Text(String),
    /// After a conversation: several turns.
    Turns(Vec<Turn>),
    /// After token ids.
    Tokens(Vec<u32>),
}

/// One prompt with many completions: what a GRPO or best-of-n step has in hand. Each completion is rendered, scored and
/// truncated as if it came alone.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptGroup {
    prompt: Prompt,
    completions: Vec<Completion>,
}

impl PromptGroup {
    /// At least one completion, each of a kind that can follow the prompt.
    pub fn new(prompt: Prompt, completions: Vec<Completion>) -> Result<Self, InvalidInput> {
        if completions.is_empty() {
            return Err(InvalidInput::new("completions", "expected at least one completion, found none"));
        }
        for (i, completion) in completions.iter().enumerate() {
            let problem = match (&prompt, completion) {
                (Prompt::Conversation(_), Completion::Text(_))
                | (Prompt::Text(_), Completion::Text(_))
                | (Prompt::Tokens(_), Completion::Tokens(_)) => continue,
                (Prompt::Conversation(_), Completion::Turns(turns)) if !turns.is_empty() => continue,
                (Prompt::Conversation(_), Completion::Turns(_)) => "expected at least one message, found none",
                (Prompt::Conversation(_), Completion::Tokens(_)) => "after a conversation expected text or messages, found token ids",
                (Prompt::Text(_), _) => "after a text prompt expected text",
                (Prompt::Tokens(_), _) => "after a prompt of token ids expected token ids",
            };
            return Err(InvalidInput::new(format!("completions[{i}]"), problem));
        }
        Ok(Self { prompt, completions })
    }

    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    pub fn completions(&self) -> &[Completion] {
        &self.completions
    }

    /// The samples this group stands for, one per completion, in order: each is the full input as if it came alone.
    pub fn samples(&self) -> impl Iterator<Item = Sample> + '_ {
        self.completions.iter().map(|completion| match (&self.prompt, completion) {
            (Prompt::Conversation(prompt), Completion::Text(answer)) => Sample::Conversation(prompt.answered(answer.clone())),
            (Prompt::Conversation(prompt), Completion::Turns(turns)) => Sample::Conversation(prompt.extended(turns.iter().cloned())),
            (Prompt::Text(prompt), Completion::Text(answer)) => Sample::Text(format!("{prompt}{answer}")),
            (Prompt::Tokens(prompt), Completion::Tokens(answer)) => Sample::Tokens([prompt.as_slice(), answer].concat()),
            (Prompt::Conversation(_) | Prompt::Text(_) | Prompt::Tokens(_), _) => {
                unreachable!("PromptGroup::new refuses completions of another kind")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(role: &str, content: &str) -> Turn {
        Turn::new(role, content, Map::new()).expect("valid turn")
    }

    #[test]
    fn a_conversation_needs_one_message_and_takes_any_order_of_roles() {
        let none = Conversation::new(vec![], None, Map::new()).expect_err("no messages");
        assert_eq!(none.to_string(), "messages: expected at least one message, found none");
        assert!(Conversation::new(vec![turn("assistant", ""), turn("assistant", "x")], None, Map::new()).is_ok());
    }

    #[test]
    fn a_role_is_short_and_extra_fields_cannot_shadow_it() {
        assert!(Turn::new("", "x", Map::new()).is_err());
        assert!(Turn::new("r".repeat(65), "x", Map::new()).is_err());
        let extra = Map::from_iter([("role".to_owned(), Value::from("system"))]);
        assert!(Turn::new("user", "x", extra).is_err());
    }

    #[test]
    fn a_group_stands_for_its_full_samples_in_order() {
        let prompt = Conversation::user("hi");
        let group = PromptGroup::new(
            Prompt::Conversation(prompt.clone()),
            vec![Completion::Text("a".into()), Completion::Turns(vec![turn("tool", "b")])],
        )
        .expect("valid");
        let samples: Vec<_> = group.samples().collect();
        assert_eq!(samples[0], Sample::Conversation(prompt.answered("a")));
        assert_eq!(samples[1], Sample::Conversation(prompt.extended([turn("tool", "b")])));
        let text = PromptGroup::new(Prompt::Text("ab".into()), vec![Completion::Text("c".into())]).expect("valid");
        assert_eq!(text.samples().next(), Some(Sample::Text("abc".into())));
        let tokens = PromptGroup::new(Prompt::Tokens(vec![1, 2]), vec![Completion::Tokens(vec![3])]).expect("valid");
        assert_eq!(tokens.samples().next(), Some(Sample::Tokens(vec![1, 2, 3])));
    }

    #[test]
    fn all_that_a_template_reads_is_counted_and_a_prompt_is_there_once_for_all_completions() {
        let big = Value::from("x".repeat(1000));
        let object = || Map::from_iter([("field".to_owned(), big.clone())]);
        let turn = Turn::new("user", "y", object()).expect("valid turn");
        let prompt = Conversation::new(vec![turn], Some(Value::Array(vec![big.clone()])), object()).expect("valid");
        let bytes = prompt.size_bytes();
        assert!((3000..3200).contains(&bytes), "{bytes}");
        let answers = (0..3).map(|_| Completion::Text("z".repeat(100))).collect();
        let group = PromptGroup::new(Prompt::Conversation(prompt.clone()), answers).expect("valid");
        for sample in group.samples() {
            let Sample::Conversation(sample) = sample else { panic!("a conversation") };
            assert!((bytes + 100..bytes + 130).contains(&sample.size_bytes()), "{}", sample.size_bytes());
            assert!(std::ptr::eq(sample.tools().expect("tools"), prompt.tools().expect("tools")), "shared");
            assert!(sample.turns().zip(prompt.turns()).all(|(own, prompt)| std::ptr::eq(own, prompt)), "shared");
            let spelled_out = Conversation::new(sample.turns().cloned().collect(), sample.tools().cloned(), object()).expect("valid");
            assert_eq!((spelled_out.size_bytes(), &spelled_out), (sample.size_bytes(), &sample), "as if it came alone");
        }
    }

    #[test]
    fn a_completion_of_another_kind_than_its_prompt_is_refused_by_name() {
        let mixed = PromptGroup::new(Prompt::Text("p".into()), vec![Completion::Text("ok".into()), Completion::Tokens(vec![1])])
            .expect_err("mixed kinds");
        assert_eq!(mixed.field, "completions[1]");
        assert!(PromptGroup::new(Prompt::Tokens(vec![1]), vec![]).is_err());
        assert!(PromptGroup::new(Prompt::Conversation(Conversation::user("p")), vec![Completion::Turns(vec![])]).is_err());
    }
}
