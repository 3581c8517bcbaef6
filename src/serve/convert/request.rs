//! Requests: wire to domain.

use serde_json::{Map, Value};

use super::parsed::{Asked, Batch, ConvertLimits, ParsedCompare, ParsedScore};
use super::violations::{Path, Violations};
use crate::domain::{Completion, Conversation, InvalidInput, MemberName, MemberScale, Prompt, PromptGroup, Sample, Truncation, Turn};
use crate::wire;

const MAX_JSON_BYTES: usize = 1 << 20;
const MAX_JSON_DEPTH: usize = 32;
const MAX_REQUEST_ID_BYTES: usize = 256;

/// Checks a `ScoreRequest`; the error names everything that is wrong with it.
pub fn parse_score(request: wire::ScoreRequest, limits: ConvertLimits) -> Result<ParsedScore, Violations> {
    let mut parser = Parser::new(limits);
    parser.request_id(&request.request_id);
    parser.samples(request.samples);
    parser.groups(request.groups);
    let asked = parser.options(request.options.unwrap_or_default());
    let batch = parser.finish("samples", "samples or groups")?;
    Ok(ParsedScore { request_id: request.request_id, batch, asked })
}

/// Checks a `CompareRequest`; the error names everything that is wrong with it.
pub fn parse_compare(request: wire::CompareRequest, limits: ConvertLimits) -> Result<ParsedCompare, Violations> {
    let mut parser = Parser::new(limits);
    parser.request_id(&request.request_id);
    parser.samples(request.samples);
    parser.groups(request.groups);
    parser.pairs(request.pairs);
    let asked = parser.options(request.options.unwrap_or_default());
    if asked.calibrated {
        parser.refuse(&Path::root("options.scale"), "expected SCALE_RAW in a comparison, which has member_scale instead");
    }
    if asked.scorer.is_some() {
        parser.refuse(&Path::root("options.scorer"), "expected none in a comparison, which asks every scorer");
    }
    let members = request.members.into_iter().enumerate();
    let members = members.filter_map(|(i, name)| parser.member(&Path::item("members", i), name)).collect();
    if let Some(lambda) = request.uwo_lambda
        && !(lambda.is_finite() && lambda >= 0.0)
    {
        parser.refuse(&Path::root("uwo_lambda"), format!("expected a finite number, not negative, found {lambda}"));
    }
    let member_scale = match wire::MemberScale::try_from(request.member_scale) {
        Ok(wire::MemberScale::Raw) => MemberScale::Raw,
        Ok(wire::MemberScale::Centered) => MemberScale::Centered,
        Ok(wire::MemberScale::Standardized) => MemberScale::Standardized,
        Err(_) => parser.unknown_enum("member_scale", "MemberScale", request.member_scale),
    };
    let batch = parser.finish("samples", "samples, groups or pairs")?;
    let (request_id, uwo_lambda) = (request.request_id, request.uwo_lambda);
    Ok(ParsedCompare { request_id, batch, asked, members, uwo_lambda, member_scale })
}

struct Parser {
    limits: ConvertLimits,
    batch: Batch,
    expanded_bytes: usize,
    violations: Violations,
    /// Things to score that were seen, valid or not.
    seen: usize,
}

impl Parser {
    fn new(limits: ConvertLimits) -> Self {
        Self { limits, batch: Batch::default(), expanded_bytes: 0, violations: Violations::default(), seen: 0 }
    }

    fn refuse(&mut self, path: &Path<'_>, problem: impl Into<String>) {
        self.violations.push(path.to_string(), problem.into());
    }

    fn refuse_input(&mut self, path: &Path<'_>, invalid: InvalidInput) {
        self.refuse(&path.field(&invalid.field), invalid.problem);
    }

    fn unknown_enum<T: Default>(&mut self, field: &str, name: &str, number: i32) -> T {
        self.refuse(&Path::root(field), format!("{number} is not a value of {name}"));
        T::default()
    }

    fn finish(mut self, field: &str, wanted: &str) -> Result<Batch, Violations> {
        if self.seen == 0 {
            self.refuse(&Path::root(field), format!("expected {wanted} to score, found none"));
        }
        if self.violations.is_empty() { Ok(self.batch) } else { Err(self.violations) }
    }

    fn request_id(&mut self, id: &str) {
        if id.len() > MAX_REQUEST_ID_BYTES {
            let problem = format!("expected at most {MAX_REQUEST_ID_BYTES} bytes, found {}", id.len());
            self.refuse(&Path::root("request_id"), problem);
        }
    }

    /// Whether `count` further samples of `bytes` bytes fit; refuses them by name otherwise.
    fn charge(&mut self, path: &Path<'_>, count: usize, bytes: usize) -> bool {
        self.seen = self.seen.saturating_add(count.max(1));
        if self.seen > self.limits.max_samples {
            let problem = format!("expected at most {} samples in one request, found {} up to here", self.limits.max_samples, self.seen);
            self.refuse(path, problem);
            return false;
        }
        self.expanded_bytes = self.expanded_bytes.saturating_add(bytes);
        if self.expanded_bytes > self.limits.max_expanded_bytes {
            let limit = self.limits.max_expanded_bytes;
            let problem = format!(
                "expected at most {limit} bytes in one request with every completion beside its prompt, found {} up to here",
                self.expanded_bytes
            );
            self.refuse(path, problem);
            return false;
        }
        true
    }

    fn samples(&mut self, samples: Vec<wire::Sample>) {
        self.batch.samples.reserve(samples.len().min(self.limits.max_samples));
        for (i, sample) in samples.into_iter().enumerate() {
            let path = Path::item("samples", i);
            if let Some(sample) = self.sample(&path, sample) {
                self.batch.shape.singles += 1;
                self.batch.samples.push(sample);
            }
            if self.seen > self.limits.max_samples {
                return;
            }
        }
    }

    fn sample(&mut self, path: &Path<'_>, sample: wire::Sample) -> Option<Sample> {
        use wire::sample::Input;
        if !self.charge(path, 1, 0) {
            return None;
        }
        match sample.input {
            Some(Input::Conversation(conversation)) => {
                self.conversation(&path.field("conversation"), conversation).map(Sample::Conversation)
            }
            Some(Input::Text(text)) => Some(Sample::Text(text)),
            Some(Input::Pair(wire::TextPair { first, second })) => Some(Sample::Pair { first, second }),
            Some(Input::Tokens(tokens)) => Some(Sample::Tokens(tokens.ids)),
            None => {
                self.refuse(path, "expected one of conversation, text, pair or tokens, found none");
                None
            }
        }
    }

    fn groups(&mut self, groups: Vec<wire::PromptGroup>) {
        for (i, group) in groups.into_iter().enumerate() {
            let path = Path::item("groups", i);
            if let Some(group) = self.group(&path, group) {
                self.expand(&path, &group);
            }
            if self.seen > self.limits.max_samples {
                return;
            }
        }
    }

    fn expand(&mut self, path: &Path<'_>, group: &PromptGroup) {
        let count = group.completions().len();
        if self.charge(path, count, group.prompt().size_bytes().saturating_mul(count)) {
            self.batch.shape.groups.push(count);
            self.batch.samples.extend(group.samples());
        }
    }

    fn group(&mut self, path: &Path<'_>, group: wire::PromptGroup) -> Option<PromptGroup> {
        use wire::prompt_group::Prompt as WirePrompt;
        let prompt = match group.prompt {
            Some(WirePrompt::Conversation(conversation)) => {
                self.conversation(&path.field("conversation"), conversation).map(Prompt::Conversation)
            }
            Some(WirePrompt::Text(text)) => Some(Prompt::Text(text)),
            Some(WirePrompt::Tokens(tokens)) => Some(Prompt::Tokens(tokens.ids)),
            None => {
                self.refuse(path, "expected a prompt: one of conversation, text or tokens, found none");
                None
            }
        };
        let wanted = group.completions.len();
        let completions: Vec<_> = group
            .completions
            .into_iter()
            .enumerate()
            .filter_map(|(i, completion)| self.completion(&path.element("completions", i), completion))
            .collect();
        // What was refused already is still something to score that was seen.
        self.seen = self.seen.max(1);
        let prompt = prompt?;
        if completions.len() < wanted {
            return None;
        }
        PromptGroup::new(prompt, completions).map_err(|invalid| self.refuse_input(path, invalid)).ok()
    }

    fn completion(&mut self, path: &Path<'_>, completion: wire::Completion) -> Option<Completion> {
        use wire::completion::Kind;
        match completion.kind {
            Some(Kind::Text(text)) => Some(Completion::Text(text)),
            Some(Kind::Tokens(tokens)) => Some(Completion::Tokens(tokens.ids)),
            Some(Kind::Messages(messages)) => {
                let path = path.field("messages");
                if !messages.tools_json.is_empty() || !messages.template_args_json.is_empty() {
                    self.refuse(&path, "tools_json and template_args_json belong to the prompt, not to a completion");
                    return None;
                }
                self.turns(&path, messages.messages).map(Completion::Turns)
            }
            None => {
                self.refuse(path, "expected one of text, messages or tokens, found none");
                None
            }
        }
    }

    fn pairs(&mut self, pairs: Vec<wire::PreferencePair>) {
        for (i, pair) in pairs.into_iter().enumerate() {
            let path = Path::item("pairs", i);
            let (chosen, rejected) = (pair.chosen.unwrap_or_default(), pair.rejected.unwrap_or_default());
            let prompt = self.conversation(&path.field("prompt"), pair.prompt.unwrap_or_default());
            let chosen = self.completion(&path.field("chosen"), chosen);
            let rejected = self.completion(&path.field("rejected"), rejected);
            self.seen = self.seen.max(1);
            if let (Some(prompt), Some(chosen), Some(rejected)) = (prompt, chosen, rejected) {
                match PromptGroup::new(Prompt::Conversation(prompt), vec![chosen, rejected]) {
                    Ok(pair) => self.expand_pair(&path, &pair),
                    Err(InvalidInput { problem, field }) => {
                        let side = if field == "completions[0]" { "chosen" } else { "rejected" };
                        self.refuse(&path.field(side), problem);
                    }
                }
            }
            if self.seen > self.limits.max_samples {
                return;
            }
        }
    }

    fn expand_pair(&mut self, path: &Path<'_>, pair: &PromptGroup) {
        if self.charge(path, 2, 0) {
            self.batch.shape.pairs += 1;
            self.batch.samples.extend(pair.samples());
        }
    }

    fn conversation(&mut self, path: &Path<'_>, conversation: wire::Conversation) -> Option<Conversation> {
        let turns = self.turns(path, conversation.messages);
        let tools = match self.json(&path.field("tools_json"), &conversation.tools_json)? {
            None => None,
            Some(tools @ Value::Array(_)) => Some(tools),
            Some(other) => {
                self.refuse(&path.field("tools_json"), format!("expected a JSON list, found {}", kind_of(&other)));
                return None;
            }
        };
        let template_args = self.object(&path.field("template_args_json"), &conversation.template_args_json)?;
        Conversation::new(turns?, tools, template_args).map_err(|invalid| self.refuse_input(path, invalid)).ok()
    }

    fn turns(&mut self, path: &Path<'_>, messages: Vec<wire::Message>) -> Option<Vec<Turn>> {
        let wanted = messages.len();
        let mut turns = Vec::with_capacity(wanted);
        for (i, message) in messages.into_iter().enumerate() {
            let path = path.element("messages", i);
            let Some(extra) = self.object(&path.field("extra_json"), &message.extra_json) else { continue };
            match Turn::new(message.role, message.content, extra) {
                Ok(turn) => turns.push(turn),
                Err(invalid) => {
                    let field = if invalid.field == "extra" { "extra_json" } else { &invalid.field };
                    self.refuse(&path.field(field), invalid.problem);
                }
            }
        }
        (turns.len() == wanted).then_some(turns)
    }

    /// An optional JSON object; `None` if it was refused.
    fn object(&mut self, path: &Path<'_>, text: &str) -> Option<Map<String, Value>> {
        match self.json(path, text)? {
            None => Some(Map::new()),
            Some(Value::Object(object)) => Some(object),
            Some(other) => {
                self.refuse(path, format!("expected a JSON object, found {}", kind_of(&other)));
                None
            }
        }
    }

    /// Optional JSON of bounded size and depth: `None` if it was refused, `Some(None)` if there is none.
    fn json(&mut self, path: &Path<'_>, text: &str) -> Option<Option<Value>> {
        if text.is_empty() {
            return Some(None);
        }
        if text.len() > MAX_JSON_BYTES {
            self.refuse(path, format!("expected at most {MAX_JSON_BYTES} bytes of JSON, found {}", text.len()));
            return None;
        }
        match serde_json::from_str::<Value>(text) {
            Ok(value) if depth(&value) > MAX_JSON_DEPTH => {
                self.refuse(path, format!("expected JSON of at most {MAX_JSON_DEPTH} levels, found {}", depth(&value)));
                None
            }
            Ok(value) => Some(Some(value)),
            Err(error) => {
                self.refuse(path, format!("expected JSON: {error}"));
                None
            }
        }
    }

    fn options(&mut self, options: wire::ScoreOptions) -> Asked {
        let truncation = match wire::Truncation::try_from(options.truncation) {
            Ok(wire::Truncation::Refuse) => Truncation::Refuse,
            Ok(wire::Truncation::Left) => Truncation::Left,
            Ok(wire::Truncation::Right) => Truncation::Right,
            Err(_) => self.unknown_enum("options.truncation", "Truncation", options.truncation),
        };
        let calibrated = match wire::Scale::try_from(options.scale) {
            Ok(scale) => scale == wire::Scale::Calibrated,
            Err(_) => self.unknown_enum("options.scale", "Scale", options.scale),
        };
        let hex = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !options.fingerprint.is_empty() && !hex(&options.fingerprint) {
            let found = options.fingerprint.len();
            self.refuse(&Path::root("options.fingerprint"), format!("expected 64 hexadecimal digits, found {found} bytes"));
        }
        let scorer = if options.scorer.is_empty() { None } else { self.member(&Path::root("options.scorer"), options.scorer) };
        Asked {
            truncation,
            calibrated,
            fingerprint: (!options.fingerprint.is_empty()).then(|| options.fingerprint.to_ascii_lowercase()),
            details: options.details,
            priority: options.priority,
            strict: options.strict,
            scorer,
        }
    }

    fn member(&mut self, path: &Path<'_>, name: String) -> Option<MemberName> {
        MemberName::try_from(name).map_err(|invalid| self.refuse(path, invalid.to_string())).ok()
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
