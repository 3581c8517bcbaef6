//! The operator's `head:` and `pooling:`, as recipes and settings write them. Pure; every mistake is told at once.
//!
//! ```yaml
//! pooling: last_token         # or {token: "<name>"}
//! head:
//!   name: score               # which tensors, where there are several heads
//!   tokens: {plus: ["+"], minus: ["-"]}   # rows of the language-model head instead
//!   at: last                  # or: each "<step>"
//!   reduce: min               # last (default), min, product, mean: of the steps
//!   weights: [0.7, 0.3]       # or {helpfulness: 0.7, ...}: of the outputs
//!   as: probability           # or logit
//!   gate_at: "<text>"         # where a gating network reads
//! ```

use serde_json::{Map, Value, json};

use super::head_config::{At, HeadChoice, Link, RECORD_KEY, Reduce, TokenName, TokenRows, Weights};
use super::pooling::Pooling;

const KEYS: [&str; 7] = ["name", "tokens", "at", "reduce", "weights", "as", "gate_at"];

impl HeadChoice {
    /// Reads what stands under `head` and `pooling`; absent or null is no choice.
    pub fn parse(head: Option<&Value>, pooling: Option<&Value>) -> Result<Self, Vec<String>> {
        let mut choice = Self::default();
        let mut problems = Vec::new();
        let none = |value: &&Value| !value.is_null();
        if let Some(value) = pooling.filter(none) {
            match parse_pooling(value) {
                Ok((pooling, token)) => (choice.pooling, choice.pooling_token) = (Some(pooling), token),
                Err(problem) => problems.push(format!("pooling: {problem}")),
            }
        }
        match head.filter(none) {
            None => {}
            Some(Value::Object(fields)) => choice.read(fields, &mut problems),
            Some(other) => problems.push(format!("head: expected keys {}; found {}", KEYS.join(", "), shown(other))),
        }
        if problems.is_empty() { Ok(choice) } else { Err(problems) }
    }

    /// What a merge has recorded in its configuration.
    pub(super) fn recorded(record: Option<&Value>, problems: &mut Vec<String>) -> Self {
        let part = |name: &str| record?.get(name);
        Self::parse(part("head"), part("pooling")).unwrap_or_else(|found| {
            problems.extend(found.into_iter().map(|problem| format!("{RECORD_KEY}.{problem}")));
            Self::default()
        })
    }

    /// These choices, and those of `other` where nothing was chosen: `head` and `pooling` are each one choice.
    pub fn or(&self, other: &Self) -> Self {
        let pooling = if self.pooling.is_some() { self } else { other };
        let silent = Self { pooling: None, pooling_token: None, ..self.clone() } == Self::default();
        let head = if silent { other } else { self };
        Self { pooling: pooling.pooling, pooling_token: pooling.pooling_token.clone(), ..head.clone() }
    }

    fn read(&mut self, fields: &Map<String, Value>, problems: &mut Vec<String>) {
        for key in fields.keys().filter(|key| !KEYS.contains(&key.as_str())) {
            problems.push(format!("head.{key}: unknown key, expected one of {}", KEYS.join(", ")));
        }
        let mut take = |key: &str, read: &mut dyn FnMut(&Value) -> Result<(), String>| {
            if let Some(value) = fields.get(key).filter(|value| !value.is_null())
                && let Err(expected) = read(value)
            {
                problems.push(format!("head.{key}: {expected}, found {}", shown(value)));
            }
        };
        take("name", &mut |value| text(value).map(|name| self.name = Some(name)));
        take("gate_at", &mut |value| text(value).map(|text| self.gate_at = Some(text)));
        take("tokens", &mut |value| parse_tokens(value).map(|rows| self.tokens = Some(rows)));
        take("at", &mut |value| parse_at(value).map(|at| self.at = Some(at)));
        take("weights", &mut |value| parse_weights(value).map(|weights| self.weights = Some(weights)));
        take("reduce", &mut |value| {
            let found = Reduce::ALL.into_iter().find(|reduce| value.as_str() == Some(reduce.name()));
            self.reduce = Some(found.ok_or("expected one of last, min, product, mean")?);
            Ok(())
        });
        take("as", &mut |value| {
            let found = Link::ALL.into_iter().find(|link| value.as_str() == Some(link.name()));
            self.link = Some(found.ok_or("expected logit or probability")?);
            Ok(())
        });
        if self.name.is_some() && self.tokens.is_some() {
            problems.push("head: expected either name or tokens, found both".to_owned());
        }
    }

    /// What [`HeadChoice::parse`] reads as this choice: `head` and `pooling`, each absent where nothing was chosen.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut head = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                head.insert(key.to_owned(), value);
            }
        };
        let names = |list: &[TokenName]| Value::Array(list.iter().map(name_to_json).collect());
        put("name", self.name.as_deref().map(Value::from));
        put("tokens", self.tokens.as_ref().map(|rows| json!({"plus": names(&rows.plus), "minus": names(&rows.minus)})));
        put(
            "at",
            self.at.as_ref().map(|at| match at {
                At::Last => "last".into(),
                At::Each(name) => json!({"each": name_to_json(name)}),
            }),
        );
        put("reduce", self.reduce.map(|reduce| reduce.name().into()));
        put(
            "weights",
            self.weights.as_ref().map(|weights| match weights {
                Weights::List(list) => json!(list),
                Weights::Named(named) => Value::Object(named.iter().map(|(name, weight)| (name.clone(), json!(weight))).collect()),
            }),
        );
        put("as", self.link.map(|link| link.name().into()));
        put("gate_at", self.gate_at.as_deref().map(Value::from));
        let mut both = Map::new();
        if !head.is_empty() {
            both.insert("head".to_owned(), Value::Object(head));
        }
        if let Some(pooling) = self.pooling {
            let value = self.pooling_token.as_ref().map_or_else(|| pooling.name().into(), |name| json!({"token": name_to_json(name)}));
            both.insert("pooling".to_owned(), value);
        }
        both
    }
}

fn name_to_json(name: &TokenName) -> Value {
    match name {
        TokenName::Id(id) => json!(id),
        TokenName::Text(text) => json!(text),
    }
}

/// A mode by its name, or `{token: NAME}`.
fn parse_pooling(value: &Value) -> Result<(Pooling, Option<TokenName>), String> {
    if let Some(name) = value.as_object().filter(|fields| fields.len() == 1).and_then(|fields| fields.get("token")) {
        return Ok((Pooling::Token, Some(token_name(name)?)));
    }
    let mode = Pooling::ALL.into_iter().find(|mode| value.as_str() == Some(mode.name()) && *mode != Pooling::Token);
    let names = || Pooling::ALL.iter().filter(|mode| **mode != Pooling::Token).map(|mode| mode.name()).collect::<Vec<_>>().join(", ");
    mode.map(|mode| (mode, None)).ok_or_else(|| format!("expected one of {}, or {{token: NAME}}; found {}", names(), shown(value)))
}

fn parse_tokens(value: &Value) -> Result<TokenRows, String> {
    let expected = "expected {plus: [NAME, ...], minus: [NAME, ...]}";
    let fields = value.as_object().ok_or(expected)?;
    if fields.keys().any(|key| key != "plus" && key != "minus") {
        return Err(expected.to_owned());
    }
    let list = |key: &str| -> Result<Vec<TokenName>, String> {
        match fields.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(names)) => names.iter().map(token_name).collect(),
            Some(one) => Ok(vec![token_name(one)?]),
        }
    };
    let rows = TokenRows { plus: list("plus")?, minus: list("minus")? };
    if rows.plus.is_empty() { Err("expected at least one token under plus".to_owned()) } else { Ok(rows) }
}

/// `last`, `each "<step>"` or `{each: NAME}`.
fn parse_at(value: &Value) -> Result<At, String> {
    let expected = "expected `last` or `each \"<step>\"`";
    match value {
        Value::String(text) if text == "last" => Ok(At::Last),
        Value::String(text) => {
            let quoted = text.strip_prefix("each").map(str::trim).ok_or(expected)?;
            let plain = || Value::String(quoted.trim_matches('\'').to_owned());
            let name = if quoted.starts_with('"') { serde_json::from_str(quoted).map_err(|_| expected)? } else { plain() };
            token_name(&name).map(At::Each)
        }
        Value::Object(fields) if fields.len() == 1 => token_name(fields.get("each").ok_or(expected)?).map(At::Each),
        _ => Err(expected.to_owned()),
    }
}

fn parse_weights(value: &Value) -> Result<Weights, String> {
    let expected = "expected finite numbers, in a list or by the names of the outputs";
    let number = |value: &Value| value.as_f64().filter(|number| number.is_finite()).ok_or(expected.to_owned());
    match value {
        Value::Array(list) if !list.is_empty() => list.iter().map(number).collect::<Result<_, _>>().map(Weights::List),
        Value::Object(named) if !named.is_empty() => {
            let named = named.iter().map(|(name, weight)| Ok((name.clone(), number(weight)?)));
            named.collect::<Result<_, String>>().map(Weights::Named)
        }
        _ => Err(expected.to_owned()),
    }
}

fn token_name(value: &Value) -> Result<TokenName, String> {
    match value {
        Value::String(text) if !text.is_empty() => Ok(TokenName::Text(text.clone())),
        Value::Number(id) => {
            id.as_u64().and_then(|id| u32::try_from(id).ok()).map(TokenName::Id).ok_or_else(|| "expected a token id".to_owned())
        }
        _ => Err("expected the name of a token, or its id".to_owned()),
    }
}

fn text(value: &Value) -> Result<String, String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned).ok_or_else(|| "expected text".to_owned())
}

fn shown(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(head: Value) -> Result<HeadChoice, Vec<String>> {
        HeadChoice::parse(Some(&head), None)
    }

    #[test]
    fn every_choice_is_read_and_written_as_it_is_read() {
        let text = |text: &str| TokenName::Text(text.to_owned());
        let choice = parse(json!({"tokens": {"plus": ["+", 5], "minus": "-"}, "at": "each \"<step>\"", "reduce": "min", "as": "logit"}));
        let choice = choice.expect("valid");
        assert_eq!(choice.tokens, Some(TokenRows { plus: vec![text("+"), TokenName::Id(5)], minus: vec![text("-")] }));
        assert_eq!((choice.at.clone(), choice.reduce, choice.link), (Some(At::Each(text("<step>"))), Some(Reduce::Min), Some(Link::Logit)));
        for at in [json!({"each": "<step>"}), json!("each '<step>'"), json!("each <step>")] {
            assert_eq!(parse(json!({"at": at})).expect("valid").at, choice.at, "{at}");
        }
        let other = HeadChoice::parse(Some(&json!({"name": "score", "weights": {"a": 1, "b": -0.5}})), Some(&json!({"token": "<r>"})));
        let other = other.expect("valid");
        assert_eq!(other.weights, Some(Weights::Named(vec![("a".to_owned(), 1.0), ("b".to_owned(), -0.5)])));
        assert_eq!((other.pooling, &other.pooling_token), (Some(Pooling::Token), &Some(text("<r>"))));
        for choice in [choice, other, HeadChoice::default()] {
            let json = choice.to_json();
            assert_eq!(HeadChoice::parse(json.get("head"), json.get("pooling")), Ok(choice));
        }
    }

    #[test]
    fn every_mistake_is_told_with_its_place() {
        let head = json!({"tokns": 1, "at": "every", "reduce": "max", "weights": ["a"], "as": "odds", "tokens": {"minus": ["-"]}});
        let problems = HeadChoice::parse(Some(&head), Some(&json!("first"))).expect_err("mistakes");
        let places: Vec<&str> = problems.iter().map(|problem| problem.split(':').next().unwrap_or_default()).collect();
        assert_eq!(places, ["pooling", "head.tokns", "head.tokens", "head.at", "head.weights", "head.reduce", "head.as"]);
        assert!(problems[0].contains("last_non_pad, last_token, first_pad_minus_one, cls, mean"), "{}", problems[0]);
        assert!(parse(json!("score")).is_err() && parse(json!({"name": "score", "tokens": {"plus": ["+"]}})).is_err());
        assert!(HeadChoice::parse(None, Some(&json!("token"))).is_err(), "which token?");
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic(key in prop::sample::select(KEYS.to_vec()), text in ".{0,12}", number in any::<f64>()) {
            for value in [json!(text), json!([text]), json!({"each": text}), json!({"plus": number}), json!(number), json!([number])] {
                let _ = HeadChoice::parse(Some(&json!({key: value})), Some(&value));
            }
        }
    }
}
