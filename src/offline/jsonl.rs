//! One line of input, as people and datasets write it. Pure.

use serde_json::{Map, Value};

use crate::domain::{Completion, Conversation, InvalidInput, Prompt, PromptGroup, Sample, Turn};

/// What one line asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Handed back as it came; absent where the line has none.
    pub id: Option<Value>,
    pub input: Input,
}

/// One sample, one prompt with many completions, or one prompt with two answers of which one is known to be better.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    One(Sample),
    Group(PromptGroup),
    Preference(Box<Preference>),
}

/// Two answers to one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    pub chosen: Sample,
    pub rejected: Sample,
}

/// A line that is not valid input.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LineError(pub String);

impl From<InvalidInput> for LineError {
    fn from(invalid: InvalidInput) -> Self {
        Self(invalid.to_string())
    }
}

const FORMS: &str =
    "expected one of: text (with text_pair), messages, prompt with completion, completions, or chosen and rejected, input_ids";

/// Reads one line: `{"text"}`, `{"text", "text_pair"}`, `{"messages"}`, `{"prompt", "completion"}`,
/// `{"prompt", "completions"}`, `{"prompt", "chosen", "rejected"}` or `{"input_ids"}`, each with an optional `"id"`. A string `prompt` is one user message; with
/// `"raw": true` it is text that the completion follows without a separator. A prompt of token ids is followed by token ids.
pub fn parse_line(line: &str) -> Result<Item, LineError> {
    let value: Value = serde_json::from_str(line).map_err(|error| LineError(format!("expected a JSON object: {error}")))?;
    match value {
        Value::Object(fields) => parse_fields(fields),
        other => Err(LineError(format!("expected a JSON object, found {}", kind(&other)))),
    }
}

/// The same of an object that has been read already.
pub fn parse_fields(mut fields: Map<String, Value>) -> Result<Item, LineError> {
    let id = fields.shift_remove("id").filter(|id| !id.is_null());
    let input = if fields.contains_key("prompt") {
        prompted(&mut fields)?
    } else if fields.contains_key("messages") {
        Input::One(Sample::Conversation(conversation(&mut fields, "messages")?))
    } else if let Some(ids) = fields.shift_remove("input_ids") {
        Input::One(Sample::Tokens(token_ids("input_ids", ids)?))
    } else if let Some(text) = fields.shift_remove("text") {
        let first = string("text", text)?;
        match fields.shift_remove("text_pair") {
            None => Input::One(Sample::Text(first)),
            Some(second) => Input::One(Sample::Pair { first, second: string("text_pair", second)? }),
        }
    } else {
        return Err(LineError(FORMS.to_owned()));
    };
    match fields.keys().next() {
        // A key that is silently ignored would be a score of something else than was meant.
        Some(key) => Err(LineError(format!("`{key}` does not belong to this form; {FORMS}"))),
        None => Ok(Item { id, input }),
    }
}

fn prompted(fields: &mut Map<String, Value>) -> Result<Input, LineError> {
    let raw = match fields.shift_remove("raw") {
        None => false,
        Some(Value::Bool(raw)) => raw,
        Some(other) => return Err(LineError(format!("raw: expected true or false, found {}", kind(&other)))),
    };
    let prompt = match fields.get("prompt") {
        Some(Value::String(text)) if raw => {
            let text = text.clone();
            fields.shift_remove("prompt");
            Prompt::Text(text)
        }
        Some(Value::Array(ids)) if !raw && ids.first().is_some_and(Value::is_number) => {
            let ids = fields.shift_remove("prompt").unwrap_or_default();
            Prompt::Tokens(token_ids("prompt", ids)?)
        }
        _ if raw => return Err(LineError("prompt: expected a string beside `raw`".to_owned())),
        Some(Value::String(text)) => {
            let user = Conversation::user(text.clone());
            fields.shift_remove("prompt");
            Prompt::Conversation(user)
        }
        _ => Prompt::Conversation(conversation(fields, "prompt")?),
    };
    let of_ids = matches!(prompt, Prompt::Tokens(_));
    let completion = |field: &str, value: Value| {
        if of_ids { token_ids(field, value).map(Completion::Tokens) } else { completion(field, value) }
    };
    if fields.contains_key("chosen") || fields.contains_key("rejected") {
        let mut side = |field: &str| {
            let answer =
                fields.shift_remove(field).ok_or_else(|| LineError(format!("{field}: expected an answer beside the other one")))?;
            completion(field, answer)
        };
        let sides = vec![side("chosen")?, side("rejected")?];
        return preference(prompt, sides);
    }
    match (fields.shift_remove("completion"), fields.shift_remove("completions")) {
        (Some(one), None) => {
            let group = PromptGroup::new(prompt, vec![completion("completion", one)?])?;
            let sample = group.samples().next();
            sample.map(Input::One).ok_or_else(|| LineError("completion: expected one".to_owned()))
        }
        (None, Some(Value::Array(many))) => {
            let completions = many.into_iter().enumerate().map(|(i, value)| completion(&format!("completions[{i}]"), value));
            Ok(Input::Group(PromptGroup::new(prompt, completions.collect::<Result<_, _>>()?)?))
        }
        (None, Some(other)) => Err(LineError(format!("completions: expected a list, found {}", kind(&other)))),
        (Some(_), Some(_)) => Err(LineError("expected either completion or completions, found both".to_owned())),
        (None, None) => Err(LineError("expected completion or completions beside prompt, found neither".to_owned())),
    }
}

fn preference(prompt: Prompt, sides: Vec<Completion>) -> Result<Input, LineError> {
    let group = PromptGroup::new(prompt, sides)?;
    let mut samples = group.samples();
    match (samples.next(), samples.next()) {
        (Some(chosen), Some(rejected)) => Ok(Input::Preference(Box::new(Preference { chosen, rejected }))),
        _ => Err(LineError("chosen and rejected: expected two answers".to_owned())),
    }
}

fn completion(field: &str, value: Value) -> Result<Completion, LineError> {
    match value {
        Value::String(text) => Ok(Completion::Text(text)),
        Value::Array(messages) => Ok(Completion::Turns(turns(field, messages)?)),
        other => Err(LineError(format!("{field}: expected a string or messages, found {}", kind(&other)))),
    }
}

/// Messages with the tools and template arguments beside them.
fn conversation(fields: &mut Map<String, Value>, field: &str) -> Result<Conversation, LineError> {
    let turns = match fields.shift_remove(field) {
        Some(Value::Array(messages)) => turns(field, messages)?,
        Some(other) if field == "prompt" => {
            return Err(LineError(format!("prompt: expected a string or messages, found {}", kind(&other))));
        }
        other => return Err(LineError(format!("{field}: expected a list, found {}", other.as_ref().map_or("nothing", kind)))),
    };
    let tools = fields.shift_remove("tools").filter(|tools| !tools.is_null());
    let template_args = match fields.shift_remove("template_args") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(other) => return Err(LineError(format!("template_args: expected an object, found {}", kind(&other)))),
    };
    Ok(Conversation::new(turns, tools, template_args)?)
}

fn turns(field: &str, messages: Vec<Value>) -> Result<Vec<Turn>, LineError> {
    let turn = |(i, message): (usize, Value)| {
        let place = format!("{field}[{i}]");
        let Value::Object(mut extra) = message else {
            return Err(LineError(format!("{place}: expected an object, found {}", kind(&message))));
        };
        let role = extra.shift_remove("role").ok_or_else(|| LineError(format!("{place}.role: expected a string, found nothing")))?;
        let role = string(&format!("{place}.role"), role)?;
        let content = match extra.shift_remove("content") {
            // A message of tool calls alone has none.
            None | Some(Value::Null) => String::new(),
            Some(content) => string(&format!("{place}.content"), content)?,
        };
        Turn::new(role, content, extra).map_err(|invalid| invalid.within(&place).into())
    };
    messages.into_iter().enumerate().map(turn).collect()
}

fn token_ids(field: &str, value: Value) -> Result<Vec<u32>, LineError> {
    let Value::Array(ids) = value else {
        return Err(LineError(format!("{field}: expected a list of token ids, found {}", kind(&value))));
    };
    let id = |(i, value): (usize, Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| LineError(format!("{field}[{i}]: expected a whole number below 4294967296, found {value}")))
    };
    ids.into_iter().enumerate().map(id).collect()
}

fn string(field: &str, value: Value) -> Result<String, LineError> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(LineError(format!("{field}: expected a string, found {}", kind(&other)))),
    }
}

fn kind(value: &Value) -> &'static str {
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<Item, LineError> {
        parse_line(&value.to_string())
    }

    fn one(value: Value) -> Sample {
        match parse(value).expect("valid").input {
            Input::One(sample) => sample,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_form_of_input_is_read() {
        assert_eq!(one(json!({"text": "a"})), Sample::Text("a".into()));
        assert_eq!(one(json!({"text": "a", "text_pair": "b"})), Sample::Pair { first: "a".into(), second: "b".into() });
        assert_eq!(one(json!({"input_ids": [1, 2]})), Sample::Tokens(vec![1, 2]));
        let user = Conversation::user("q");
        assert_eq!(one(json!({"messages": [{"role": "user", "content": "q"}]})), Sample::Conversation(user.clone()));
        assert_eq!(one(json!({"prompt": "q", "completion": "a"})), Sample::Conversation(user.answered("a")));
        assert_eq!(one(json!({"prompt": "q", "completion": "a", "raw": true})), Sample::Text("qa".into()));
        let messages = json!([{"role": "user", "content": "q"}]);
        assert_eq!(one(json!({"prompt": messages, "completion": "a"})), Sample::Conversation(user.answered("a")));
        let item = parse(json!({"id": 7, "prompt": "q", "completions": ["a", [{"role": "assistant", "content": "b"}]]})).expect("valid");
        assert_eq!(item.id, Some(json!(7)));
        match item.input {
            Input::Group(group) => {
                let samples: Vec<_> = group.samples().collect();
                assert_eq!(samples, ["a", "b"].map(|answer| Sample::Conversation(user.answered(answer))));
            }
            other => panic!("{other:?}"),
        }
        let ids = parse(json!({"prompt": [1, 2], "completions": [[3], []]})).expect("valid").input;
        let Input::Group(ids) = ids else { panic!("{ids:?}") };
        assert_eq!(ids.samples().collect::<Vec<_>>(), [Sample::Tokens(vec![1, 2, 3]), Sample::Tokens(vec![1, 2])]);
        assert_eq!(one(json!({"prompt": [1], "completion": [2]})), Sample::Tokens(vec![1, 2]));
        let preference = parse(json!({"prompt": "q", "chosen": "a", "rejected": "b"})).expect("valid").input;
        let [chosen, rejected] = ["a", "b"].map(|answer| Sample::Conversation(user.answered(answer)));
        assert_eq!(preference, Input::Preference(Box::new(Preference { chosen, rejected })));
    }

    #[test]
    fn other_fields_of_a_message_reach_the_template() {
        let Sample::Conversation(found) = one(json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]})) else {
            panic!("a conversation");
        };
        let turn = found.turns().next().expect("a message");
        assert_eq!((turn.content(), &turn.extra()["tool_calls"]), ("", &json!([1])));
    }

    #[test]
    fn what_is_not_valid_says_what_was_expected() {
        for (line, expected) in [
            (json!([1]), "expected a JSON object"),
            (json!({}), "expected one of"),
            (json!({"text": 1}), "text: expected a string, found a number"),
            (json!({"text": "a", "txt_pair": "b"}), "`txt_pair` does not belong"),
            (json!({"prompt": "a"}), "found neither"),
            (json!({"prompt": "a", "chosen": "b"}), "rejected: expected an answer"),
            (json!({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}), "`completion` does not belong"),
            (json!({"prompt": "a", "completion": "b", "completions": []}), "found both"),
            (json!({"prompt": "a", "completions": []}), "at least one completion"),
            (json!({"prompt": "a", "completions": "b"}), "expected a list"),
            (json!({"prompt": [{"role": "user"}], "completion": "b", "raw": true}), "expected a string beside `raw`"),
            (json!({"messages": []}), "at least one message"),
            (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "", "content": "x"}]}), "messages[0].role"),
            (json!({"input_ids": [1, -2]}), "input_ids[1]"),
            (json!({"prompt": [1, "a"], "completion": []}), "prompt[1]"),
            (json!({"prompt": [1], "completions": [[2], "b"]}), "completions[1]: expected a list of token ids, found a string"),
            (json!({"prompt": "a", "completion": [1]}), "completion[0]: expected an object"),
            (json!({"prompt": [1], "completion": [2], "raw": true}), "expected a string beside `raw`"),
            (json!({"input_ids": [4294967296u64]}), "input_ids[0]"),
        ] {
            let error = parse(line.clone()).expect_err("invalid").to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
        assert!(parse_line("{\"text\": \"a\"").is_err());
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in ".{0,120}") {
            let _ = parse_line(&line);
        }

        #[test]
        fn no_object_of_known_keys_makes_it_panic(
            keys in prop::collection::vec(prop_oneof![
                Just("text"), Just("text_pair"), Just("messages"), Just("prompt"), Just("completion"),
                Just("completions"), Just("chosen"), Just("rejected"), Just("input_ids"), Just("id"), Just("raw"), Just("tools"),
            ], 0..5),
            values in prop::collection::vec(prop_oneof![
                Just(json!(null)), Just(json!("x")), Just(json!(3)), Just(json!([])), Just(json!(["x"])), Just(json!([1])), Just(json!([[1]])), Just(json!(true)),
                Just(json!([{"role": "user", "content": "x"}])), Just(json!({"role": 1})),
            ], 5),
        ) {
            let object: Map<String, Value> = keys.into_iter().map(str::to_owned).zip(values).collect();
            let _ = parse(Value::Object(object));
        }
    }
}
