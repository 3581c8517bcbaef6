//! Reference scores from a file: what `tools/golden.py` writes, and the two older shapes of the same (a list of cases, and
//! families with the scores of each member). Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::jsonl::{Input, parse_fields};
use crate::domain::Sample;

/// Reference scores, case by case.
#[derive(Clone, Debug, PartialEq)]
pub struct Golden {
    pub cases: Vec<Case>,
    /// Who scored, where the file says so.
    pub referee: Option<String>,
}

/// One input, and what the reference says of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub sample: Sample,
    /// The tokens, where the reference has them.
    pub ids: Option<Vec<u32>>,
    /// Index of the token that the head reads, where the reference has it.
    pub position: Option<usize>,
    pub expected: Expected,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// By the name of what scored: the reward, or every output.
    Scores(BTreeMap<String, Vec<f64>>),
    /// The reference refuses the input.
    Refused,
}

/// A file that holds no reference scores.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GoldenError(pub String);

/// The name of the scores of a case that has them without a name.
pub const UNNAMED: &str = "model";

/// The fields of a case that are its input.
const INPUT: [&str; 8] = ["text", "text_pair", "messages", "prompt", "completion", "raw", "tools", "template_args"];

impl Golden {
    pub fn parse(bytes: &[u8]) -> Result<Self, GoldenError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| GoldenError(format!("expected JSON: {error}")))?;
        let cases = value.get("cases").unwrap_or(&value);
        let Some(cases) = cases.as_array() else { return Err(GoldenError("expected a list of cases".to_owned())) };
        if cases.is_empty() {
            return Err(GoldenError("expected at least one case, found none".to_owned()));
        }
        let numbered = |(index, case): (usize, &Value)| case_of(case).map_err(|problem| GoldenError(format!("cases[{index}]: {problem}")));
        let referee = value.get("transformers").and_then(Value::as_str).map(|version| format!("transformers {version}"));
        Ok(Self { cases: cases.iter().enumerate().map(numbered).collect::<Result<_, _>>()?, referee })
    }

    /// The names that every scored case has scores for.
    pub fn names(&self) -> Vec<&str> {
        let mut scored = self.cases.iter().filter_map(|case| match &case.expected {
            Expected::Scores(scores) => Some(scores),
            Expected::Refused => None,
        });
        let Some(first) = scored.next() else { return Vec::new() };
        let others: Vec<_> = scored.collect();
        first.keys().filter(|name| others.iter().all(|scores| scores.contains_key(*name))).map(String::as_str).collect()
    }
}

fn case_of(value: &Value) -> Result<Case, String> {
    let fields = value.as_object().ok_or("expected an object")?;
    let numbers = |name: &str| -> Result<Option<Vec<u32>>, String> {
        let Some(list) = fields.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = list.as_array().and_then(|list| list.iter().map(id).collect());
        ids.map(Some).ok_or_else(|| format!("{name}: expected token ids"))
    };
    let ids = numbers("input_ids")?;
    let input: Map<String, Value> =
        fields.iter().filter(|(name, _)| INPUT.contains(&name.as_str())).map(|(name, value)| (name.clone(), value.clone())).collect();
    let sample = match (input.is_empty(), &ids) {
        (true, Some(ids)) => Sample::Tokens(ids.clone()),
        _ => match parse_fields(input).map_err(|error| error.to_string())?.input {
            Input::One(sample) => sample,
            Input::Group(_) | Input::Preference(_) => return Err("expected one completion, found several".to_owned()),
        },
    };
    let position = fields.get("pooled_position").and_then(Value::as_u64).map(|position| position as usize);
    Ok(Case { sample, ids, position, expected: expected(fields)? })
}

fn expected(fields: &Map<String, Value>) -> Result<Expected, String> {
    let values = |value: &Value| -> Result<Vec<f64>, String> {
        let list: Option<Vec<f64>> = match value {
            Value::Array(list) => list.iter().map(Value::as_f64).collect(),
            other => other.as_f64().map(|number| vec![number]),
        };
        list.filter(|list| !list.is_empty()).ok_or_else(|| format!("expected a score, found {value}"))
    };
    if fields.get("failure").is_some_and(|failure| !failure.is_null()) {
        return Ok(Expected::Refused);
    }
    let named = |name: &String, value: &Value| Ok((name.clone(), values(value).map_err(|problem| format!("scores.{name}: {problem}"))?));
    match (fields.get("scores"), fields.get("score")) {
        (Some(Value::Object(scores)), _) if !scores.is_empty() => {
            scores.iter().map(|(name, value)| named(name, value)).collect::<Result<_, String>>().map(Expected::Scores)
        }
        (None, Some(score)) => Ok(Expected::Scores(BTreeMap::from([(UNNAMED.to_owned(), values(score)?)]))),
        _ => Err("expected `scores` by name, a `score`, or a `failure`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn every_shape_is_read() {
        let family = json!({"transformers": "5", "cases": [
            {"kind": "text", "text": "a", "input_ids": [1], "scores": {"member-0": 0.5, "warm": [1, 2]}},
            {"kind": "ids", "input_ids": [1, 2], "scores": {"warm": [3, 4]}},
        ]});
        let golden = Golden::parse(family.to_string().as_bytes()).expect("a family");
        assert_eq!((golden.names(), golden.referee.as_deref()), (vec!["warm"], Some("transformers 5")));
        assert_eq!((&golden.cases[0].sample, &golden.cases[1].sample), (&Sample::Text("a".into()), &Sample::Tokens(vec![1, 2])));
        let list = json!([{"messages": [{"role": "user", "content": "a"}], "input_ids": [1], "score": 2, "pooled_position": 0}]);
        let golden = Golden::parse(list.to_string().as_bytes()).expect("a list");
        assert_eq!((golden.names(), golden.cases[0].position), (vec![UNNAMED], Some(0)));
        let refused = json!([{"prompt": "a", "completion": "b", "failure": "no"}]);
        assert_eq!(Golden::parse(refused.to_string().as_bytes()).expect("refused").cases[0].expected, Expected::Refused);
    }

    #[test]
    fn what_is_no_golden_says_what_was_expected() {
        for (value, expected) in [
            (json!({}), "list of cases"),
            (json!([]), "at least one case"),
            (json!([{"text": "a"}]), "cases[0]: expected `scores`"),
            (json!([{"text": "a", "scores": {"warm": "x"}}]), "scores.warm"),
            (json!([{"input_ids": [-1], "score": 1}]), "input_ids"),
            (json!([{"score": 1}]), "expected one of"),
        ] {
            let error = Golden::parse(value.to_string().as_bytes()).expect_err("no golden").to_string();
            assert!(error.contains(expected), "{value}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Golden::parse(&bytes);
        }
    }
}
